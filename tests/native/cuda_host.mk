# The bodies of csrc/cuda on host threads: `make tsan_cuda`, `make asan_cuda`, `make mutants_cuda`, and
# build/libcuda_host.so for tests/native/test_cuda_host_kernels.py. Included by the Makefile beside it.
CUDA_HOST_HEADERS := $(wildcard $(CSRC)/cuda/*/*.h $(CSRC)/core/*.h host_block.h check.h)
CUDA_HOST_FLAGS := -std=c++17 -g -Wall -Wextra -Wno-unknown-pragmas -Werror -pthread
# Each is a header and a sed command on it: what the sanitizer, or the bits, must notice.
CUDA_MUTANTS := no_sync_before_show epoch_of_the_next_slot shared_slot
CUDA_MUTATION_no_sync_before_show := world/all_reduce_norm.h s/^          m.lanes.sync();//
CUDA_MUTATION_epoch_of_the_next_slot := world/all_reduce_norm.h s/region(r, w.rank, e - 1)/region(r, w.rank, e)/
CUDA_MUTATION_shared_slot := world/peer_world.h s/int64_t offset = block/int64_t offset = block % 1/

tsan: tsan_cuda
asan: asan_cuda
mutants: mutants_cuda

.PHONY: tsan_cuda asan_cuda mutants_cuda $(CUDA_MUTANTS:%=cuda_mutant_%)

tsan_cuda asan_cuda: %_cuda: $(BUILD)/cuda_peers_%
	$<

$(BUILD)/cuda_peers_%: test_cuda_peers.cpp $(CUDA_HOST_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(CUDA_HOST_FLAGS) -O1 $(FLAGS_$*) -I. -I$(CSRC) $< -o $@

$(BUILD)/libcuda_host.so: cuda_host.cpp $(CUDA_HOST_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(CUDA_HOST_FLAGS) -O1 -fPIC -shared -I. -I$(CSRC) $< -o $@.tmp
	@mv $@.tmp $@

mutants_cuda: $(CUDA_MUTANTS:%=cuda_mutant_%)

$(CUDA_MUTANTS:%=cuda_mutant_%): cuda_mutant_%:
	@rm -rf $(BUILD)/cuda_$* && mkdir -p $(BUILD)/cuda_$*
	@cp -r $(CSRC)/core $(CSRC)/cuda $(BUILD)/cuda_$*/
	@sed -i '$(wordlist 2,20,$(CUDA_MUTATION_$*))' $(BUILD)/cuda_$*/cuda/$(firstword $(CUDA_MUTATION_$*))
	@if cmp -s $(CSRC)/cuda/$(firstword $(CUDA_MUTATION_$*)) $(BUILD)/cuda_$*/cuda/$(firstword $(CUDA_MUTATION_$*)); then echo "$*: changes nothing"; exit 1; fi
	@$(CXX) $(CUDA_HOST_FLAGS) -O1 $(FLAGS_tsan) -I. -I$(BUILD)/cuda_$* test_cuda_peers.cpp -o $(BUILD)/cuda_$*/test
	@if TSAN_OPTIONS=halt_on_error=1 timeout 120 $(BUILD)/cuda_$*/test >$(BUILD)/cuda_$*/log 2>&1; \
	  then echo "$*: NOT noticed"; exit 1; \
	  else echo "$*: noticed: $$(grep -m1 -E 'WARNING|FAILED|Terminated' $(BUILD)/cuda_$*/log)"; fi
