// The collective calls of a group: what they are called, how they run (plan.h), and the
// bodies of core/collective.h for the type at hand.
#include "core/collective.h"
#include "cpu/world/call.h"
#include "cpu/world/plan.h"

namespace pyparallel::cpu {
namespace {

Split in_bytes(const Split& split, int size, int64_t element) {
  Split bytes;
  for (int r = 0; r <= size; ++r) bytes.begin[r] = split.begin[r] * element;
  return bytes;
}

uint64_t hash_of(const Split& split, int size) {
  uint64_t hash = 0;
  for (int r = 1; r <= size; ++r) hash = (hash ^ uint64_t(split.begin[r])) * 0x9e3779b97f4a7c15u;
  return hash;
}

}  // namespace

void Group::barrier() {
  call(description(Operation::barrier, DType::uint8, 0), kSlotBytes, false,
       [&](MemberOf& m) { pyparallel::barrier(m); });
}

void Group::all_reduce(void* data, int64_t n, DType dtype, Reduction reduction) {
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::all_reduce, bytes, size());
  visit_reducible(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* typed = static_cast<T*>(data);
    const auto run = [&](auto op) {
      using Op = decltype(op);
      call(description(Operation::all_reduce, dtype, n, reduction), plan.slice_bytes,
           bytes > kLongBytes, [&](MemberOf& m) {
             if (plan.one_shot)
               one_shot_all_reduce<Op>(m, typed, n);
             else
               two_shot_all_reduce<Op>(m, typed, n);
           });
    };
    switch (reduction) {
      case Reduction::max: return run(Max{});
      case Reduction::min: return run(Min{});
      default: return run(Sum{});
    }
  });
}

void Group::reduce_scatter(void* output, const void* input, const Split& split, DType dtype,
                           Reduction reduction) {
  const int64_t n = split.begin[size()];
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::reduce_scatter, bytes, size());
  visit_reducible(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto op) {
      using Op = decltype(op);
      call(description(Operation::reduce_scatter, dtype, n, reduction, 0, hash_of(split, size())),
           plan.slice_bytes, bytes > kLongBytes, [&](MemberOf& m) {
             m.store = plan.store;
             pyparallel::reduce_scatter<Op>(m, static_cast<T*>(output),
                                            static_cast<const T*>(input), split);
           });
    };
    switch (reduction) {
      case Reduction::max: return run(Max{});
      case Reduction::min: return run(Min{});
      default: return run(Sum{});
    }
  });
}

void Group::all_gather(void* output, const void* input, const Split& split, DType dtype) {
  const int64_t n = split.begin[size()];
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::all_gather, bytes, size());
  call(description(Operation::all_gather, dtype, n, Reduction::none, 0, hash_of(split, size())),
       plan.slice_bytes, bytes > kLongBytes, [&](MemberOf& m) {
         m.store = plan.store;
         pyparallel::all_gather(m, static_cast<unsigned char*>(output),
                                static_cast<const unsigned char*>(input),
                                in_bytes(split, size(), size_of(dtype)));
       });
}

void Group::all_to_all(void* output, const void* input, const Split& output_split,
                       const Split& input_split, DType dtype) {
  const int64_t element = size_of(dtype);
  const int64_t bytes = max_of(output_split.begin[size()], input_split.begin[size()]) * element;
  // Sizes differ by rank, so nothing that depends on them may be part of what all agree on.
  const Plan plan = plan_of(Operation::all_to_all, 0, size());
  call(description(Operation::all_to_all, dtype, 0), plan.slice_bytes, bytes > kLongBytes,
       [&](MemberOf& m) {
         m.store = plan_of(Operation::all_to_all, bytes, size()).store;
         pyparallel::all_to_all(
             m, static_cast<unsigned char*>(output), static_cast<const unsigned char*>(input),
             in_bytes(output_split, size(), element), in_bytes(input_split, size(), element));
       });
}

void Group::broadcast(void* data, int64_t n, DType dtype, int root) {
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::broadcast, bytes, size());
  call(description(Operation::broadcast, dtype, n, Reduction::none, root), plan.slice_bytes,
       bytes > kLongBytes, [&](MemberOf& m) {
         m.store = plan.store;
         pyparallel::broadcast(m, static_cast<unsigned char*>(data), bytes, root);
       });
}

}  // namespace pyparallel::cpu
