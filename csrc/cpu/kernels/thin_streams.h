// How the matmuls of few rows read their weights: how far ahead, and in streams.
#pragma once

#include <cstdint>

#include "core/part.h"
#include "cpu/kernels/kernels.h"

namespace pyparallel::cpu {

// Read side by side; with a gate every second one is the gate's.
constexpr int kStreams = 4;
// How far ahead of its reading a stream is fetched, into the second-level cache: fetching into the first
// holds up to a third back, since few lines can be on their way there (docs/cpu.md).
constexpr int64_t kPrefetchBytes = 1024;

// The outputs are cut into as many runs as there are streams, or pairs of streams; the last may be
// shorter, or there may be fewer outputs than runs: then a stream repeats the last row.
struct ThinStreams {
  explicit ThinStreams(const LinearCall& call)
      : per_run(call.up.data != nullptr ? 2 : 1),
        length(ceil_div(call.end - call.begin, kStreams / per_run)),
        begin(call.begin),
        end(call.end) {}
  // The output that is the i-th of a stream's run.
  int64_t output(int stream, int64_t i) const {
    return min_of(begin + stream / per_run * length + i, end - 1);
  }

  int per_run;
  int64_t length;
  int64_t begin;
  int64_t end;
};

}  // namespace pyparallel::cpu
