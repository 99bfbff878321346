#include "cpu/ops/attention.h"

#include <vector>

#include "cpu/ops/pool.h"

namespace pyparallel::cpu {

namespace {

constexpr int64_t kQueryRows = 96;

// The queries from `row` on of sequence b that share KV head `kv`.
AttentionCall call_for(const Attention& a, int64_t b, int64_t row, int64_t kv) {
  const int64_t G = a.N / a.Nk, at = ((b * a.S + row) * a.N + kv * G) * a.D;
  const int64_t bytes = (b * a.batch_stride + kv * a.head_stride) * bytes_of(a.precision);
  AttentionCall call{};
  call.q = a.q + at;
  call.q_row_stride = a.N * a.D;
  call.q_head_stride = a.D;
  call.keys = static_cast<const unsigned char*>(a.keys) + bytes;
  call.values = static_cast<const unsigned char*>(a.values) + bytes;
  call.key_stride = a.key_stride;
  call.precision = a.precision;
  call.G = G;
  call.D = a.D;
  call.out = a.out + at;
  call.out_row_stride = a.N * a.D;
  call.out_head_stride = a.D;
  return call;
}

// One query a sequence: tasks are parts of the keys, merged in order.
void attend_one(const Attention& a, int threads) {
  const Kernels& k = kernels();
  const int64_t G = a.N / a.Nk, D = a.D, heads = a.B * a.Nk;
  const int64_t first = a.window > 0 ? max_of(0, a.start + 1 - a.window) : 0, end = a.start + 1;
  const int64_t splits = max_of(1, ceil_div(end - first, kSplitKeys)), tasks = heads * splits;
  std::vector<float> partial(size_t(tasks * G * D)), state(size_t(tasks * G * 2));
  const auto states_of = [&](int64_t head, int64_t split) {
    float* maximum = state.data() + (head * splits + split) * G;
    return SoftmaxState{maximum, maximum + tasks * G};
  };
  Pool::instance().run(threads, 0, [&](int thread, int count, void*) {
    for (int64_t task = thread; task < tasks; task += count) {
      const int64_t head = task / splits, split = task % splits, begin = first + split * kSplitKeys;
      AttentionCall call = call_for(a, head / a.Nk, 0, head % a.Nk);
      call.out = partial.data() + task * G * D;
      k.decode_attention(call, begin, min_of(begin + kSplitKeys, end), states_of(head, split));
    }
  });
  for (int64_t head = 0; head < heads; ++head) {
    k.merge_attention(partial.data() + head * splits * G * D, G * D, states_of(head, 0), splits, G,
                      D, call_for(a, head / a.Nk, 0, head % a.Nk).out, D);
  }
}

// Tasks are rows of queries; the last see the most keys, and go first.
void attend_many(const Attention& a, int threads) {
  const Kernels& k = kernels();
  const int64_t tasks = a.B * a.Nk * ceil_div(a.S, kQueryRows);
  Pool::instance().run(threads, k.prefill_attention_bytes(a.N / a.Nk, a.D),
                       [&](int thread, int count, void* scratch) {
                         for (int64_t task = tasks - 1 - thread; task >= 0; task -= count) {
                           const int64_t row = task / (a.B * a.Nk) * kQueryRows;
                           AttentionCall call = call_for(a, task / a.Nk % a.B, row, task % a.Nk);
                           call.workspace = scratch;
                           k.prefill_attention(call, min_of(kQueryRows, a.S - row), a.start + row,
                                               a.window);
                         }
                       });
}

}  // namespace

void attention(const Attention& a, int threads) {
  const int sharing = threads_for(a.B * a.S * a.N * a.D * (a.start + a.S), threads);
  return a.S == 1 ? attend_one(a, sharing) : attend_many(a, sharing);
}

}  // namespace pyparallel::cpu
