# The compute kernels and the decoder of CPU ranks, on threads: `make asan_cpu`, `make tsan_cpu`.
# Not dropout.cpp: what picks the clones of its loop runs before a sanitizer has begun.
CPU_SOURCES := $(filter-out %/dropout.cpp,$(wildcard $(CSRC)/cpu/*/*.cpp))

.PHONY: asan_cpu tsan_cpu
asan tsan: %: %_cpu

asan_cpu tsan_cpu: %_cpu: $(BUILD)/cpu_%
	$<

$(BUILD)/cpu_%: test_cpu.cpp $(CPU_SOURCES) $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(FLAGS_$*) -I$(CSRC) $< $(CPU_SOURCES) -o $@
