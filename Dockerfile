# CrossPool's server in a container, for CPUs unless told otherwise; docs/deploy/docker.md says how
# to build and to start it.
ARG BASE=debian:12-slim

FROM ${BASE} AS build
ARG CUDA=OFF
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates g++ make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/crosspool
COPY . .
# The environment refers to this folder, so it lies in the same one below.
RUN make env CUDA="${CUDA}" TORCH_INDEX="${TORCH_INDEX}" PIP_ARGS=--no-cache-dir \
 && .venv/bin/python -m pip install --no-cache-dir "$(sed -n 's/^router = \["\(.*\)"\]$/\1/p' pyproject.toml)" \
 && rm -rf build

FROM ${BASE}
ENV DEBIAN_FRONTEND=noninteractive
# A compiler builds Triton's launchers on GPUs; nothing else needs one here.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 crosspool \
 && install --directory --owner crosspool /models /cache
COPY --from=build /opt/crosspool /opt/crosspool
ENV PATH=/opt/crosspool/.venv/bin:$PATH XDG_CACHE_HOME=/cache
USER 10001
WORKDIR /models
VOLUME /cache
EXPOSE 30000
# A process that dies leaves children, which somebody must wait for.
ENTRYPOINT ["tini", "--", "crosspool"]
CMD ["demo", "--host", "0.0.0.0", "--port", "30000"]
