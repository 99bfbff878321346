// How thin_linear shares its outputs over streams, and what a thread that waits can do for its next call.
#pragma once

#include <cstdint>

#include "core/part.h"
#include "cpu/kernels.h"

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
  int64_t output(int stream, int64_t i) const { return min_of(begin + stream / per_run * length + i, end - 1); }

  int per_run;
  int64_t length;
  int64_t begin;
  int64_t end;
};

// Fetches the weights of a thread's next thin_linear into its second-level cache, a little a turn, while
// it waits for others: the memory is idle then, and ranks wait for one another twice a layer.
class Ahead {
 public:
  Ahead() = default;
  explicit Ahead(const LinearCall& call) {
    if (call.begin >= call.end) return;
    const int64_t row = bytes_of(call.weight.precision, call.K);
    if (in_blocks(call.weight.precision)) {
      // One run of groups, and one of the gate's.
      for (const Weight* weight : {&call.weight, &call.up}) {
        if (weight->data == nullptr) continue;
        const int64_t group = (weight->first + call.begin) / kGroupRows * kGroupRows;
        from_[count_++] = static_cast<const char*>(weight->data) + group * row;
      }
      bytes_ = min_of((call.end - call.begin) * row, kMostBytes / count_);
      return;
    }
    const ThinStreams streams(call);
    count_ = kStreams;
    for (int s = 0; s < kStreams; ++s) {
      const Weight& weight = streams.per_run == 2 && s % 2 == 1 ? call.up : call.weight;
      from_[s] = static_cast<const char*>(weight.data) + streams.output(s, 0) * row;
    }
    bytes_ = min_of(streams.length * row, kMostBytes / kStreams);
  }

  // Whether there was something left to fetch.
  bool operator()() {
    if (at_ >= bytes_) return false;
    for (int s = 0; s < count_; ++s) {
      for (int64_t line = 0; line < kTurnBytes; line += 64) __builtin_prefetch(from_[s] + at_ + line, 0, 2);
    }
    at_ += kTurnBytes;
    return true;
  }

 private:
  // 384 KiB was no better; docs/cpu.md has the figures.
  static constexpr int64_t kMostBytes = 128 * 1024;
  static constexpr int64_t kTurnBytes = 256;

  const char* from_[kStreams] = {};
  int count_ = 0;
  int64_t bytes_ = 0;
  int64_t at_ = 0;
};

}  // namespace pyparallel::cpu
