// The CPU compute kernels on tensors, as addresses: pyparallel/native/cpu/ops.py checks shapes and dtypes. They
// run on a team of threads that lives as long as the process.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "core/part.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/team.h"

namespace py = pybind11;

namespace pyparallel {
namespace {

using namespace cpu;

constexpr int64_t kOutputGrain = 32;
constexpr int64_t kQueryRows = 96;
// Keys that a task of a single query reads, for any number of threads: the sums' order is fixed by it.
constexpr int64_t kSplitKeys = 256;

// Below this many multiplications a call is over before a second thread has begun.
constexpr int64_t kWorthSharing = 1 << 17;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The threads of the operations, and 64-byte aligned scratch for each, kept between calls.
class Pool {
 public:
  template <class Body>
  void run(int threads, int64_t scratch_bytes, Body body) {
    py::gil_scoped_release release;
    std::lock_guard lock(mutex_);
    if (team_ == nullptr || team_->size() < threads) {
      team_ = std::make_unique<Team>(threads);
      scratch_.resize(size_t(threads));
    }
    for (int t = 0; t < threads; ++t) scratch_[size_t(t)].reserve(scratch_bytes);
    const auto call = [&](int thread) {
      if (thread < threads) body(thread, threads, scratch_[size_t(thread)].data);
    };
    if (threads == 1) return call(0);
    team_->run(call);
  }

 private:
  struct Scratch {
    Scratch() = default;
    Scratch(Scratch&& other) noexcept
        : data(std::exchange(other.data, nullptr)), bytes(std::exchange(other.bytes, 0)) {}
    ~Scratch() { std::free(data); }
    void reserve(int64_t n) {
      if (n <= bytes) return;
      std::free(data);
      data = std::aligned_alloc(64, size_t(round_up(n, 64)));
      bytes = data == nullptr ? 0 : n;
      if (data == nullptr) throw std::bad_alloc();
    }
    void* data = nullptr;
    int64_t bytes = 0;
  };

  std::mutex mutex_;
  std::unique_ptr<Team> team_;
  std::vector<Scratch> scratch_;
};

Pool& pool() {
  // Never destroyed: at exit its threads may already be gone.
  static Pool* const instance = new Pool;
  return *instance;
}

int threads_for(int64_t work, int threads) { return work < kWorthSharing ? 1 : threads; }

// (data, precision, bias, scale, rows)
Weight weight_of(const py::tuple& w) {
  return {pointer<const void>(w[0].cast<uintptr_t>()), pointer<const float>(w[3].cast<uintptr_t>()),
          pointer<const float>(w[2].cast<uintptr_t>()), Precision(w[1].cast<int>()),
          w[4].cast<int64_t>()};
}

void linear(uintptr_t x, int64_t x_stride, int64_t M, int64_t K, int64_t N, py::tuple weight, py::tuple up,
            int activation, uintptr_t residual, uintptr_t y, bool bf16_compute, bool thin, int threads) {
  LinearCall call{};
  call.x = pointer<const float>(x);
  call.x_stride = x_stride;
  call.M = M;
  call.K = K;
  call.weight = weight_of(weight);
  if (!up.empty()) call.up = weight_of(up);
  call.act = Activation(activation);
  call.residual = pointer<const float>(residual);
  call.residual_stride = N;
  call.y = pointer<float>(y);
  call.y_stride = N;
  call.bf16_compute = bf16_compute;
  const Kernels& k = kernels();
  pool().run(threads_for(M * N * K, threads), k.block_linear_bytes(M, K),
             [&](int thread, int count, void* scratch) {
               LinearCall mine = call;
               const Part part = share(N, count, thread, kOutputGrain);
               mine.begin = part.begin;
               mine.end = part.end;
               mine.workspace = scratch;
               if (part.size() > 0) (thin ? k.thin_linear : k.block_linear)(mine);
             });
}

// q [B, S, N, D] fp32, scaled, dense; keys and values [B, Nk, T, D] with strides in elements.
void attention(uintptr_t q, int64_t B, int64_t S, int64_t N, int64_t D, uintptr_t keys, uintptr_t values,
               int64_t batch_stride, int64_t head_stride, int64_t key_stride, int precision, int64_t Nk,
               int64_t start, int64_t window, uintptr_t out, int threads) {
  const Kernels& k = kernels();
  const int64_t G = N / Nk;
  const auto call_for = [&](int64_t b, int64_t row, int64_t kv) {
    const int64_t at = (b * batch_stride + kv * head_stride) * bytes_of(Precision(precision));
    AttentionCall call{};
    call.q = pointer<const float>(q) + ((b * S + row) * N + kv * G) * D;
    call.q_row_stride = N * D;
    call.q_head_stride = D;
    call.keys = pointer<const unsigned char>(keys) + at;
    call.values = pointer<const unsigned char>(values) + at;
    call.key_stride = key_stride;
    call.precision = Precision(precision);
    call.G = G;
    call.D = D;
    call.out = pointer<float>(out) + ((b * S + row) * N + kv * G) * D;
    call.out_row_stride = N * D;
    call.out_head_stride = D;
    return call;
  };
  const int sharing = threads_for(B * S * N * D * (start + S), threads);
  if (S == 1) {
    const int64_t first = window > 0 ? max_of(0, start + 1 - window) : 0, end = start + 1;
    const int64_t splits = max_of(1, ceil_div(end - first, kSplitKeys)), heads = B * Nk;
    std::vector<float> partial(size_t(heads * splits * G * D)), state(size_t(heads * splits * G * 2));
    const auto states_of = [&](int64_t head, int64_t split) {
      float* maximum = state.data() + (head * splits + split) * G;
      return SoftmaxState{maximum, maximum + heads * splits * G};
    };
    const int64_t tasks = heads * splits;
    pool().run(sharing, 0, [&](int thread, int count, void*) {
      for (int64_t task = thread; task < tasks; task += count) {
        const int64_t head = task / splits, split = task % splits, begin = first + split * kSplitKeys;
        AttentionCall call = call_for(head / Nk, 0, head % Nk);
        call.out = partial.data() + task * G * D;
        k.decode_attention(call, begin, min_of(begin + kSplitKeys, end), states_of(head, split));
      }
    });
    for (int64_t head = 0; head < heads; ++head) {
      k.merge_attention(partial.data() + head * splits * G * D, G * D, states_of(head, 0), splits, G, D,
                        call_for(head / Nk, 0, head % Nk).out, D);
    }
    return;
  }
  const int64_t tasks = B * Nk * ceil_div(S, kQueryRows);
  pool().run(sharing, k.prefill_attention_bytes(G, D), [&](int thread, int count, void* scratch) {
    for (int64_t task = tasks - 1 - thread; task >= 0; task -= count) {
      const int64_t row = task / (B * Nk) * kQueryRows;
      AttentionCall call = call_for(task / Nk % B, row, task % Nk);
      call.workspace = scratch;
      k.prefill_attention(call, min_of(kQueryRows, S - row), start + row, window);
    }
  });
}

template <class Body>
void each_row(int64_t rows, int64_t n, int threads, Body body) {
  pool().run(threads_for(rows * n * 8, threads), 0, [&](int thread, int count, void*) {
    const Part part = share(rows, count, thread, 1);
    for (int64_t m = part.begin; m < part.end; ++m) body(m);
  });
}

}  // namespace

void bind_cpu_ops(py::module_& m) {
  m.def(
      "use_isa", [](const std::string& name) { isa_in_use().store(isa_from_name(name)); }, py::arg("name"),
      "Let the kernels use this instruction set: 'plain', 'avx2', 'avx512' or 'avx512_bf16'.");
  m.def(
      "isa_in_use", [] { return std::string(isa_name(isa_in_use().load())); },
      "The instruction set the kernels use: the widest there is, unless PYPARALLEL_ISA or use_isa says another.");
  m.def("cpu_linear", &linear, py::arg("x"), py::arg("x_stride"), py::arg("M"), py::arg("K"), py::arg("N"),
        py::arg("weight"), py::arg("up"), py::arg("activation"), py::arg("residual"), py::arg("y"),
        py::arg("bf16_compute"), py::arg("thin"), py::arg("threads"));
  m.def("cpu_attention", &attention, py::arg("q"), py::arg("B"), py::arg("S"), py::arg("N"), py::arg("D"),
        py::arg("keys"), py::arg("values"), py::arg("batch_stride"), py::arg("head_stride"),
        py::arg("key_stride"), py::arg("precision"), py::arg("Nk"), py::arg("start"), py::arg("window"),
        py::arg("out"), py::arg("threads"));
  m.def(
      "cpu_rms_norm",
      [](uintptr_t x, uintptr_t weight, float eps, int64_t rows, int64_t n, uintptr_t y, int threads) {
        const Kernels& k = kernels();
        each_row(rows, n, threads, [&](int64_t m) {
          k.rms_norm(pointer<const float>(x) + m * n, pointer<const float>(weight), eps, n,
                     pointer<float>(y) + m * n);
        });
      },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("rows"), py::arg("n"), py::arg("y"),
      py::arg("threads"));
  m.def(
      "cpu_layer_norm",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, float eps, int64_t rows, int64_t n, uintptr_t y,
         int threads) {
        const Kernels& k = kernels();
        each_row(rows, n, threads, [&](int64_t m) {
          k.layer_norm(pointer<const float>(x) + m * n, pointer<const float>(weight),
                       pointer<const float>(bias), eps, n, pointer<float>(y) + m * n);
        });
      },
      py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("rows"), py::arg("n"),
      py::arg("y"), py::arg("threads"));
  m.def(
      "cpu_rope",
      [](uintptr_t x, uintptr_t cos, uintptr_t sin, int64_t rows, int64_t heads, int64_t D, int64_t rotary,
         int threads) {
        const Kernels& k = kernels();
        each_row(rows, heads * D, threads, [&](int64_t m) {
          for (int64_t h = 0; h < heads; ++h) {
            k.rope(pointer<float>(x) + (m * heads + h) * D, pointer<const float>(cos) + m * (rotary / 2),
                   pointer<const float>(sin) + m * (rotary / 2), rotary);
          }
        });
      },
      py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("rows"), py::arg("heads"), py::arg("D"),
      py::arg("rotary"), py::arg("threads"));
  m.def(
      "cpu_argmax",
      [](uintptr_t x, int64_t n) { return kernels().argmax(pointer<const float>(x), n); }, py::arg("x"),
      py::arg("n"));
  m.def(
      "cpu_convert",
      [](uintptr_t from, int from_precision, uintptr_t to, int to_precision, int64_t n) {
        const Kernels& k = kernels();
        if (Precision(to_precision) == Precision::f32) {
          k.to_float(pointer<const void>(from), Precision(from_precision), n, pointer<float>(to));
        } else {
          k.from_float(pointer<const float>(from), Precision(to_precision), n, pointer<void>(to));
        }
      },
      py::arg("from"), py::arg("from_precision"), py::arg("to"), py::arg("to_precision"), py::arg("n"));
}

}  // namespace pyparallel
