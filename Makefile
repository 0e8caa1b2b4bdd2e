# make env     an environment in .venv with everything that serving needs
# make serve   the three bundled models on port 30000
# make test    the tests;  make lint  style, types, formatting
# make test-gpu  the tests that need an NVIDIA GPU, with the Python that holds torch (GPU_PYTHON);
#              make bench-gpu  the measurements there. Nothing is installed for either: see docs/gpu.md
# make bench   kernels, hand-over, engine and ablation; records and plots are rewritten
# make sanitize-gpu  the resident loop's GPU tests under compute-sanitizer (GPU_PYTHON: with torch)
# make bench-peers  installs other engines (PEERS="llama vllm": only these) and measures beside them
#
# PyTorch's CPU wheels (no CUDA libraries with them) come from an index of their own:
#   make env TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Other variables: PYTHON (3.11 or newer), VENV, PIP_ARGS (for every pip install), PORT, ARGS.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v))) python3)
PORT ?= 30000
TORCH_INDEX ?=
PIP_ARGS ?=
ARGS ?=
PEERS ?=
GPU_PYTHON ?= python3
GPU_ARCHITECTURES ?= 80;90

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
TORCH := $(shell sed -n 's/^  "\(torch==[^"]*\)",$$/\1/p' pyproject.toml)
NODEPS := requirements/frontend-nodeps.txt
TRITON := $(abspath $(VENV))/triton
TRITON_TESTS := test/test_bare_gpu_machine.py test/kernels/test_triton.py \
  test/kernels/test_triton_compile.py test/kernels/test_triton_exchange.py \
  test/ranks/test_gpu_interpreted.py \
  test/benchmark/test_gpu_benchmark.py test/benchmark/test_gpu_kernels.py
NATIVE := $(shell find sgl-kernel-ext -type f)
CXX_FILES := $(filter %.h %.hpp %.c %.cpp %.cu,$(NATIVE))

# The files and folders that hold tests marked `gpu`; others may need what is not there.
GPU_TESTS = $(sort $(patsubst %/conftest.py,%,$(shell grep -rl --include=conftest.py --include='test_*.py' pytest.mark.gpu test)))
# Beside a resident loop no kernel is loaded, and no stream shares its connection to the device.
GPU_ENV := PYTHONPATH=python:.$(if $(PYTHONPATH),:$(PYTHONPATH)) CUDA_MODULE_LOADING=EAGER \
  CUDA_DEVICE_MAX_CONNECTIONS=32
GPU_BUILD := build/gpu

.PHONY: native-gpu test-gpu bench-gpu sanitize-gpu env dev serve test test-triton test-rest lint format bench bench-peers clean
env: $(VENV)/.env
dev: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make env PYTHON=python3.11"; exit 1; }
	@echo "==> environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.env: pyproject.toml $(NODEPS) $(NATIVE) | $(VENV)/bin/python
	@echo "==> $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "==> crosspool, its native code and its dependencies"
	@$(PIP) --editable '.[planner]'
	@echo "==> SGLang's front end, without the GPU stack"
	@$(PIP) --no-deps -r $(NODEPS)
	@touch $@

$(VENV)/.dev: $(VENV)/.env
	@echo "==> tools for tests and lint"
	@$(PIP) --editable '.[dev]'
	@echo "==> Triton, in a folder of its own: servers run without it"
	@$(PIP) --no-deps --upgrade --target $(TRITON) 'triton==3.6.0'
	@touch $@

serve: env
	@$(BIN)/crosspool demo --port $(PORT) $(ARGS)

test: dev
	@$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),$(MAKE) --no-print-directory -j2 test-triton test-rest)

# One core's work, beside the rest.
test-triton: dev
	@PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -q -p no:cacheprovider $(TRITON_TESTS) >$(TRITON).log 2>&1; \
	  status=$$?; [ $$status = 0 ] && set -- tail -1 || set -- cat; \
	  echo; echo "==> tests that need Triton"; "$$@" $(TRITON).log; exit $$status

test-rest: dev
	@$(BIN)/python -m pytest

lint: dev
	@echo "==> ruff check"; $(BIN)/ruff check .
	@echo "==> ruff format --check"; $(BIN)/ruff format --check .
	@echo "==> mypy"; $(BIN)/mypy
	@$(if $(CXX_FILES),echo "==> clang-format"; $(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

# In place: python/crosspool/kernels/*.so. CMake comes with pip's cmake or the system.
native-gpu:
	@echo "==> native code, in place"
	@cmake -S sgl-kernel-ext -B $(GPU_BUILD) -DCMAKE_BUILD_TYPE=Release \
	  -DCROSSPOOL_CUDA_ARCHITECTURES="$(GPU_ARCHITECTURES)" \
	  -DCROSSPOOL_NVSHMEM="$$($(GPU_PYTHON) scripts/nvshmem_folder.py)"
	@cmake --build $(GPU_BUILD) --parallel
	@cmake --install $(GPU_BUILD) --prefix python

test-gpu: native-gpu
	@$(GPU_ENV) $(GPU_PYTHON) -m pytest -m gpu $(GPU_TESTS) $(ARGS)

bench-gpu: native-gpu
	@$(GPU_ENV) $(GPU_PYTHON) -m benchmark.gpu $(ARGS)

sanitize-gpu: native-gpu
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; exit 1; }
	@for tool in memcheck synccheck; do echo "==> $$tool"; \
	  CROSSPOOL_GPU_STEPS=1000 $(GPU_ENV) compute-sanitizer --tool $$tool --error-exitcode 1 \
	  $(GPU_PYTHON) -m pytest -m gpu test/kernels/test_cuda_loop_gpu.py $(ARGS) || exit 1; done

bench: dev
	@echo "==> kernels"; $(BIN)/python -m benchmark.kernels
	@echo "==> hand-over"; $(BIN)/python -m benchmark.hand_over
	@echo "==> engine"; $(BIN)/python -m benchmark.engine $(ARGS)
	@echo "==> ablation"; $(BIN)/python -m benchmark.ablation $(ARGS)
	@$(BIN)/python -m benchmark.report kernels hand_over engine ablation

bench-peers: dev
	@$(BIN)/python -m benchmark.peers.install $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(PEERS)
	@$(BIN)/python -m benchmark.side_by_side $(if $(PEERS),--peers $(PEERS)) $(ARGS)

format: dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
