#include "cuda/kernels/kernels.h"
#include "cuda/world/peer_launch.h"

namespace pyparallel::cuda {
namespace {

// One 16-byte pack: summed by the switch over all GPUs, then stored to all of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PP_MULTIMEM(T, LOAD, STORE)                                                         \
  __device__ __forceinline__ void multimem_pack(Pack<T>* at) {                              \
    uint32_t a, b, c, d;                                                                    \
    asm volatile(LOAD " {%0, %1, %2, %3}, [%4];"                                            \
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)                                       \
                 : "l"(at)                                                                  \
                 : "memory");                                                               \
    asm volatile(STORE " [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(a), "r"(b), "r"(c), "r"(d) \
                 : "memory");                                                               \
  }
PP_MULTIMEM(float, "multimem.ld_reduce.relaxed.sys.global.add.v4.f32",
            "multimem.st.relaxed.sys.global.v4.f32")
PP_MULTIMEM(Half, "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2",
            "multimem.st.relaxed.sys.global.v4.f16x2")
PP_MULTIMEM(BFloat16, "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2",
            "multimem.st.relaxed.sys.global.v4.bf16x2")
#else
// The host function refuses devices that lack the instruction.
template <class T>
__device__ __forceinline__ void multimem_pack(Pack<T>*) {
  __trap();
}
#endif

template <class T>
__global__ void __launch_bounds__(kPeerThreads, 1)
    multimem_all_reduce_kernel(const __grid_constant__ PeerCall call, T* multicast, int64_t n) {
  __shared__ World world;
  run_block(call, world, BlockLanes(), [&](DeviceMember& m) {
    // Epoch 1: every rank's data is there. Epoch 2: every rank has stored its part to all.
    if (!barrier(m)) return;
    const Part part = part_of(n / Pack<T>::kSize, m.world.size, m.world.rank);
    const Part share = part_of(part.size(), int(gridDim.x), int(blockIdx.x));
    auto* packs = reinterpret_cast<Pack<T>*>(multicast) + part.begin;
    for (int64_t i = share.begin + m.lanes.index(); i < share.end; i += m.lanes.count()) {
      multimem_pack(packs + i);
    }
    // Multimem accesses are relaxed, and of the multicast address: the peers read the plain one.
    asm volatile("fence.proxy.alias;" ::: "memory");
    __threadfence_system();
    barrier(m);
    asm volatile("fence.proxy.alias;" ::: "memory");
  });
}

}  // namespace

template <class T>
void multimem_all_reduce(const PeerCall& call, T* multicast, int64_t n, cudaStream_t stream) {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  if (major < 9) {
    throw std::invalid_argument("multimem: expected a device of compute capability 9.0 or later, got " +
                                std::to_string(major) + ".x; use all_reduce");
  }
  if (n % Pack<T>::kSize != 0 || !is_pack_aligned(multicast)) {
    throw std::invalid_argument("multimem: expected a whole number of aligned 16-byte packs, got " +
                                std::to_string(n) + " elements; use all_reduce");
  }
  const int blocks = peer_blocks(n * int64_t(sizeof(T)) / call.peers.size);
  multimem_all_reduce_kernel<<<blocks, kPeerThreads, 0, stream>>>(call, multicast, n);
  check_launch("multimem_all_reduce");
}

#define INSTANTIATE(T) \
  template void multimem_all_reduce<T>(const PeerCall&, T*, int64_t, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
