# The CUDA extension: `make cuda` compiles csrc/cuda for every architecture and links pyparallel/_cuda*.so.
# It needs nvcc, NCCL (the wheel nvidia-nccl-cu13, or NCCL_HOME) and any torch >= 2.10, the CPU build too:
# the ops go through torch's stable ABI. Warnings and register spills are errors.
CUDA_PYTHON ?= .venv/bin/python
NVCC ?= nvcc
CUDA_ARCHITECTURES ?= 80 90a 100a
CUDA_BUILD ?= build/cuda

CUDA_SOURCES := $(sort $(shell find csrc/cuda -name "*.cu" -o -name "*.cpp"))
CUDA_OBJECTS := $(patsubst csrc/cuda/%,$(CUDA_BUILD)/%.o,$(CUDA_SOURCES))

# Asked of Python only when something is built: make expands these in the recipes.
# nvcc itself says where its toolkit lies, also when it is called through a wrapper.
CUDA_HOME ?= $(shell $(NVCC) --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^.\$$ TOP=\(.*\)$$/\1/p')
CUDA_TORCH = $(shell $(CUDA_PYTHON) -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
CUDA_SUFFIX := $(shell $(CUDA_PYTHON) -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))" 2>/dev/null)
CUDA_PYTHON_INCLUDES = $(shell $(CUDA_PYTHON) -c "import pybind11, sysconfig; \
  print('-isystem', pybind11.get_include(), '-isystem', sysconfig.get_path('include'))")
NCCL_HOME ?= $(shell $(CUDA_PYTHON) -c "import importlib.util as u; s = u.find_spec('nvidia.nccl'); \
  print(list(s.submodule_search_locations)[0] if s else '/usr')" 2>/dev/null)

CUDA_LIBRARY := pyparallel/_cuda$(CUDA_SUFFIX)
# NCCL's initializers leave the last fields of its structs to the language.
CUDA_WARNINGS := -Wall,-Wextra,-Wno-unknown-pragmas,-Wno-missing-field-initializers,-Werror
CUDA_NVCC_FLAGS = -std=c++17 -O3 --Werror all-warnings --expt-relaxed-constexpr -Icsrc \
  -isystem $(NCCL_HOME)/include -Xcompiler -fPIC,-fvisibility=hidden,$(CUDA_WARNINGS) \
  -Xptxas -v,-warn-spills,-Werror \
  $(foreach a,$(CUDA_ARCHITECTURES),-gencode=arch=compute_$(a),code=sm_$(a))
empty :=
space := $(empty) $(empty)
CUDA_CXX_FLAGS = -std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas \
  -Icsrc -isystem $(NCCL_HOME)/include -isystem $(CUDA_HOME)/include \
  $(CUDA_PYTHON_INCLUDES) -isystem $(CUDA_TORCH)/include \
  -DTORCH_TARGET_VERSION=0x020a000000000000 \
  -DPYPARALLEL_CUDA_ARCHITECTURES='"$(subst $(space),$(empty) ,$(addprefix sm_,$(CUDA_ARCHITECTURES)))"'

.PHONY: cuda cuda-report cuda-clean

$(CUDA_OBJECTS): | $(CUDA_BUILD)/.nccl

# NCCL's header and library: the system's, or the wheel's, which is fetched if neither is there.
$(CUDA_BUILD)/.nccl:
	@mkdir -p $(@D)
	@test -f $(NCCL_HOME)/include/nccl.h || \
	  $(CUDA_PYTHON) -m pip install -q --disable-pip-version-check --no-deps nvidia-nccl-cu13
	@touch $@

# On a fresh clone there is no Python to ask for names yet.
ifeq ($(CUDA_SUFFIX),)
ifdef CUDA_AGAIN
$(error CUDA_PYTHON: $(CUDA_PYTHON) does not run)
endif
cuda: install
	$(MAKE) cuda CUDA_AGAIN=1
else
cuda: $(CUDA_LIBRARY) cuda-report
endif

# nvcc's notes (registers, spills of every kernel) are kept beside the object; shown if it fails.
$(CUDA_BUILD)/%.cu.o: csrc/cuda/%.cu
	@mkdir -p $(@D)
	@echo "nvcc $<"
	@$(NVCC) $(CUDA_NVCC_FLAGS) -MMD -MP -MF $(basename $@).d -c $< -o $@ > $@.log 2>&1 || { grep -E "error|warning|fatal" $@.log; rm -f $@; exit 1; }

$(CUDA_BUILD)/%.cpp.o: csrc/cuda/%.cpp
	@mkdir -p $(@D)
	@echo "$(CXX) $<"
	@$(CXX) $(CUDA_CXX_FLAGS) -MMD -MP -c $< -o $@

$(CUDA_LIBRARY): $(CUDA_OBJECTS)
	@echo "link $@"
	@$(CXX) -shared -o $@ $(CUDA_OBJECTS) -L$(CUDA_TORCH)/lib -ltorch -ltorch_cpu -lc10 \
	  -L$(NCCL_HOME)/lib -l:libnccl.so.2 -L$(CUDA_HOME)/lib64 -lcudart_static -lrt -lpthread -ldl \
	  -Wl,--exclude-libs,ALL

# Which headers each object was made from.
-include $(CUDA_OBJECTS:.o=.d)

# Every kernel of every architecture must report, and report no spills.
cuda-report: $(CUDA_OBJECTS)
	@cat $(patsubst %,%.log,$(filter %.cu.o,$(CUDA_OBJECTS))) | awk '/spill stores/ { n++; if ($$5 != 0 || $$9 != 0) bad++ } \
	  END { printf "%d kernels (all architectures), %d with spills\n", n, bad; exit n == 0 || bad > 0 }'

# The NCCL communicator against a scripted NCCL and CUDA runtime: no GPU, no library, only the headers.
CUDA_FAKED := $(addprefix csrc/cuda/nccl/,communicator.cpp collectives.cpp watch.cpp window.cpp)
$(CUDA_BUILD)/test_nccl_communicator: tests/native/test_nccl_communicator.cpp \
  tests/native/fake_nccl.h tests/native/check.h $(CUDA_FAKED) $(wildcard csrc/cuda/*/*.h) | $(CUDA_BUILD)/.nccl
	@$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -Wall -Wextra -Werror -Wno-unused-parameter \
	  -Wno-missing-field-initializers -Icsrc -Itests/native -isystem $(NCCL_HOME)/include \
	  -isystem $(CUDA_HOME)/include $(filter %.cpp,$^) -o $@

cuda-clean:
	rm -rf $(CUDA_BUILD) pyparallel/_cuda*.so
