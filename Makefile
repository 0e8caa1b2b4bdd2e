# The targets' sentences and the variables below, both after `##`, are what `make help` prints.
#
## Variables
##   VENV          folder of the environment: .venv unless given
##   PYTHON        Python that makes it, 3.11 or newer
##   CUDA          ON builds the GPU libraries, AUTO does where nvcc is found; OFF until given once
##   TORCH_INDEX   package index of torch; https://download.pytorch.org/whl/cpu has it without CUDA
##   PIP_ARGS      words for every pip install
##   PORT          port of `make serve`: 30000 unless given
##   ARGS          words for the program of a target: make test ARGS="test/kvpool -x"
##   PEERS         engines of `make bench-peers`: PEERS="llama vllm"; all unless given
##   GPU_PYTHON    Python with torch for CUDA, for targets that need a GPU: python3 unless given
##   BUNDLE_PYTHON   version of Python for which `make gpu-bundle` packs: 3.12 unless given
##   GPU_ARCHITECTURES   compute capabilities of `make native-gpu`: "90" unless given

# Where it is set, every process compiles what it imports of this project anew.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v))) python3)
CUDA ?= $(or $(shell cat $(VENV)/.cuda 2>/dev/null),OFF)
TORCH_INDEX ?=
PIP_ARGS ?=
PORT ?= 30000
ARGS ?=
PEERS ?=
GPU_PYTHON ?= python3
BUNDLE_PYTHON ?= 3.12
GPU_ARCHITECTURES ?= 90

BIN := $(VENV)/bin
# Byte code is written afterwards, on all cores: pip would do it on one. SGLang lacks most of what its
# metadata asks for, of which pip would warn after every install.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
  --no-warn-conflicts $(PIP_ARGS)
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests?|testing|models|_inductor|multimodal_gen)/' $(VENV)/lib || true
PROJECT = --config-settings=cmake.define.CROSSPOOL_CUDA=$(CUDA) --editable
TORCH := $(shell sed -n 's/^  "\(torch==[^"]*\)",$$/\1/p' pyproject.toml)
NODEPS := requirements/frontend-nodeps.txt
TRITON := $(abspath $(VENV))/triton
TRITON_TESTS := test/test_bare_gpu_machine.py test/test_gpu_bundle.py test/kernels/test_triton.py \
  test/kernels/test_triton_compile.py test/kernels/test_triton_exchange.py \
  test/kernels/test_triton_residency.py test/kernels/gpu \
  test/ranks/test_gpu_interpreted.py test/ranks/test_gpu_compile.py \
  test/benchmark/test_gpu_benchmark.py test/benchmark/test_gpu_kernels.py \
  test/benchmark/test_gpu_report.py
GROUPS := e2e rest triton front kernels
FRONT_TESTS := test/cli test/frontend test/server
NATIVE := $(shell find sgl-kernel-ext -type f)
CXX_FILES := $(filter %.h %.hpp %.c %.cpp %.cu,$(NATIVE))

# The files and folders that hold tests marked `gpu`; others may need what is not there.
GPU_TESTS = $(sort $(patsubst %/conftest.py,%,$(shell grep -rl --include=conftest.py --include='test_*.py' pytest.mark.gpu test)))
# Where a resident loop runs, no kernel may be loaded later, and every stream has its own connection
# to the device.
GPU_ENV := PYTHONPATH=python:.$(if $(PYTHONPATH),:$(PYTHONPATH)) CUDA_MODULE_LOADING=EAGER \
  CUDA_DEVICE_MAX_CONNECTIONS=32
GPU_BUILD := build/gpu

.PHONY: help env dev serve test test-all $(GROUPS:%=test-%) lint format \
  bench bench-agrees bench-peers clients front-door chaos lm-eval sglang-tests vllm-tests \
  native-gpu gpu-report gpu-bundle test-gpu bench-gpu sanitize-gpu clean force

help: ## Prints this list.
	@echo "Targets"
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' Makefile | awk -F '|' '{printf "  %-16s%s\n", $$1, $$2}'
	@echo; sed -n 's/^## \?//p' Makefile

env: $(VENV)/.env ## Makes the environment with everything that serving needs.
dev: $(VENV)/.dev ## Adds the tools for tests and lint to the environment.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make env PYTHON=python3.11"; exit 1; }
	@echo "==> environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)

# Remembers CUDA, and is newer than the environment only after a change of it.
$(VENV)/.cuda: force | $(BIN)/python
	@echo $(CUDA) | cmp --silent - $@ || echo $(CUDA) >$@

$(VENV)/.env: pyproject.toml $(NODEPS) $(NATIVE) $(VENV)/.cuda
	@echo "==> $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "==> crosspool, its native code and its dependencies"
	@$(PIP) $(PROJECT) '.[planner]'
	@echo "==> SGLang's front end, without the GPU stack"
	@$(PIP) --no-deps -r $(NODEPS)
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: $(VENV)/.env
	@echo "==> tools for tests and lint"
	@$(PIP) $(PROJECT) '.[dev]'
	@echo "==> Triton, in a folder of its own: servers run without it"
	@$(PIP) --no-deps --upgrade --target $(TRITON) 'triton==3.6.0'
	@$(COMPILE)
	@touch $@

serve: env ## Serves the three bundled models.
	@$(BIN)/crosspool demo --port $(PORT) $(ARGS)

# With ARGS one pytest, of what they name. Without, one for each group, two at a time and those
# that take longest first: much of the time in groups that start processes is waiting. Each writes a
# log, which ends with what took longest, and is printed when a test of it has failed; the summaries
# come last.
ALL = $(MAKE) --no-print-directory --keep-going -j2 $(GROUPS:%=test-%); status=$$?; \
  for group in $(GROUPS); do echo "==> $$group"; grep '^=.* in .*=$$' $(VENV)/test-$$group.log | tail -1; \
  done; exit $$status

test: dev ## Runs the tests but those marked `slow`, as .ci/run does.
	@$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),SELECT="-m 'not slow'" $(ALL))

test-all: dev ## Runs every test, those marked `slow` too.
	@$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),$(ALL))

test-e2e: TESTS = test/e2e
test-front: TESTS = $(FRONT_TESTS)
# Where torch comes with Triton, other groups could run its tests, too.
test-kernels: TESTS = test/kernels $(TRITON_TESTS:%=--ignore=%)
test-rest: TESTS = test $(patsubst %,--ignore=%,test/e2e test/kernels $(FRONT_TESTS) $(TRITON_TESTS))
test-triton: TESTS = $(TRITON_TESTS)
test-triton: export PYTHONPATH = $(TRITON)

$(GROUPS:%=test-%): test-%: dev
	@echo "==> tests in $(VENV)/$@.log"
	@$(BIN)/python -m pytest -p no:cacheprovider --durations=60 $(SELECT) $(TESTS) >$(VENV)/$@.log 2>&1 || \
	  { status=$$?; cat $(VENV)/$@.log; exit $$status; }

lint: dev ## Checks style, types and formatting.
	@echo "==> ruff check"; $(BIN)/ruff check .
	@echo "==> ruff format --check"; $(BIN)/ruff format --check .
	@echo "==> mypy"; $(BIN)/mypy
	@$(if $(CXX_FILES),echo "==> clang-format"; $(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: dev ## Formats Python and C++, and mends what ruff can mend.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: dev ## Measures kernels, hand-over, engine and ablation, and writes records and plots.
	@echo "==> kernels"; $(BIN)/python -m benchmark.kernels
	@echo "==> hand-over"; $(BIN)/python -m benchmark.hand_over
	@echo "==> engine"; $(BIN)/python -m benchmark.engine $(ARGS)
	@echo "==> ablation"; $(BIN)/python -m benchmark.ablation $(ARGS)
	@$(BIN)/python -m benchmark.report kernels hand_over engine ablation

bench-peers: dev ## Installs other engines and measures CrossPool beside them.
	@$(BIN)/python -m benchmark.peers.install $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(PEERS)
	@$(BIN)/python -m benchmark.side_by_side $(if $(PEERS),--peers $(PEERS)) $(ARGS)

# schemathesis has an environment of its own: it pins what SGLang's front end needs otherwise.
front-door: dev ## Sends hostile requests, 10^5 fuzzed ones and SIGTERM to a server.
	@echo "==> hostile requests"; $(BIN)/python -m benchmark.front_door hostile; status=$$?; \
	  echo "==> SIGTERM"; $(BIN)/python -m benchmark.front_door ending || status=1; \
	  echo "==> schemathesis in $(VENV)/schemathesis"; $(BIN)/python -m venv $(VENV)/schemathesis && \
	  $(VENV)/schemathesis/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) schemathesis || exit 1; \
	  echo "==> fuzzed requests"; $(BIN)/python -m benchmark.front_door fuzz $(ARGS) \
	  --schemathesis $(abspath $(VENV))/schemathesis/bin/python && exit $$status

chaos: dev ## Kills, stops and slows a server's processes under load: ARGS="--minutes 15".
	@$(BIN)/python -m benchmark.chaos $(ARGS)

# Environments of their own: they want other versions of what CrossPool needs. Evaluation and
# GuideLLM see the project's environment, for torch and transformers.
CLIENTS = $(VENV)/clients
EVALUATION = $(VENV)/lm-eval
GUIDELLM = $(VENV)/guidellm
SUITES = $(abspath $(VENV))/conformance

$(CLIENTS)/.made: requirements/clients.txt | env
	@echo "==> clients in $(CLIENTS)"
	@$(BIN)/python -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $<
	@touch $@

$(EVALUATION)/.made $(GUIDELLM)/.made: $(VENV)/%/.made: requirements/%.txt | env
	@echo "==> $* in $(@D)"
	@$(BIN)/python -m venv $(@D)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  >$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/crosspool.pth
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $<
	@touch $@

$(SUITES)/.made: requirements/conformance-nodeps.txt | dev
	@$(PIP) --no-deps --upgrade --target $(SUITES) -r $<
	@touch $@

clients: $(CLIENTS)/.made ## Tries clients of other projects against a server.
	@$(BIN)/python -m benchmark.clients --python $(CLIENTS)/bin/python $(ARGS)

lm-eval: $(EVALUATION)/.made ## Compares lm-evaluation-harness's figures with transformers'.
	@$(BIN)/python -m benchmark.conformance.lm_eval --python $(EVALUATION)/bin/python $(ARGS)

bench-agrees: $(GUIDELLM)/.made ## Compares crosspool bench with bench_serving and GuideLLM.
	@$(BIN)/python -m benchmark.bench_agrees --guidellm $(abspath $(GUIDELLM))/bin/python $(ARGS)

sglang-tests: $(SUITES)/.made ## Runs SGLang's own tests over servers: ARGS="--checkout FOLDER".
	@PYTHONPATH=$(SUITES) $(BIN)/python -m benchmark.conformance.sglang $(ARGS)

vllm-tests: $(SUITES)/.made ## Runs vLLM's tests over servers: ARGS="--checkout FOLDER".
	@PYTHONPATH=$(SUITES) $(BIN)/python -m benchmark.conformance.vllm $(ARGS)

# CMake comes from the system or from pip's package of that name.
native-gpu: ## Builds the native code, with the GPU libraries, into python/crosspool/kernels.
	@echo "==> native code, in place"
	@cmake -S sgl-kernel-ext -B $(GPU_BUILD) -DCMAKE_BUILD_TYPE=Release -DCROSSPOOL_CUDA=ON \
	  -DCROSSPOOL_CUDA_ARCHITECTURES="$(GPU_ARCHITECTURES)" $(GPU_OPTIONS) \
	  -DCROSSPOOL_NVSHMEM="$$($(GPU_PYTHON) scripts/nvshmem_folder.py)"
	@cmake --build $(GPU_BUILD) --parallel
	@cmake --install $(GPU_BUILD) --prefix python

# With the experiments in C++.
gpu-report: GPU_OPTIONS := -DCROSSPOOL_BUILD_BENCHMARKS=ON
gpu-report: native-gpu ## Tells everything about a GPU, in three parts of under nine minutes: ARGS="--part a".
	@$(GPU_ENV) $(GPU_PYTHON) -m benchmark.gpu_report $(ARGS)

gpu-bundle: dev ## Packs what the report needs on a GPU machine that reaches no package index.
	@PYTHONPATH=$(TRITON) $(BIN)/python scripts/gpu_bundle.py --python $(BUNDLE_PYTHON) $(ARGS)

test-gpu: native-gpu ## Runs the tests that need an NVIDIA GPU; docs/gpu.md says what they need.
	@$(GPU_ENV) $(GPU_PYTHON) -m pytest -m gpu $(GPU_TESTS) $(ARGS)

bench-gpu: native-gpu ## Measures kernels, hand-over and steps on a GPU.
	@$(GPU_ENV) $(GPU_PYTHON) -m benchmark.gpu $(ARGS)

sanitize-gpu: native-gpu ## Runs the resident loop's GPU tests under compute-sanitizer.
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; exit 1; }
	@for tool in memcheck synccheck; do echo "==> $$tool"; \
	  CROSSPOOL_GPU_STEPS=1000 $(GPU_ENV) compute-sanitizer --tool $$tool --error-exitcode 1 \
	  $(GPU_PYTHON) -m pytest -m gpu test/kernels/test_cuda_loop_gpu.py $(ARGS) || exit 1; done

clean: ## Removes the environment and everything that was built.
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
