#include "cpu/ops/linear.h"

#include "cpu/ops/pool.h"

namespace pyparallel::cpu {

namespace {

constexpr int64_t kOutputGrain = 32;

}  // namespace

void linear(const LinearCall& call, int64_t N, bool thin, int threads) {
  const Kernels& k = kernels();
  Pool::instance().run(threads_for(call.M * N * call.K, threads),
                       k.block_linear_bytes(call.M, call.K),
                       [&](int thread, int count, void* scratch) {
                         LinearCall mine = call;
                         const Part part = share(N, count, thread, kOutputGrain);
                         mine.begin = part.begin;
                         mine.end = part.end;
                         mine.workspace = scratch;
                         if (part.size() > 0) (thin ? k.thin_linear : k.block_linear)(mine);
                       });
}

}  // namespace pyparallel::cpu
