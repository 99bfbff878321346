// The collectives over slots: written once, instantiated for CPU workers and for GPU blocks.
//
// All are cut into slices, one epoch a slice, under one discipline: write(e), signal(e), wait(e),
// read(e), where write fills this rank's slot of epoch e and read takes from the peers' slots of
// epoch e. To overlap, write(e + 1) and signal(e + 1) come between wait(e) and read(e). Why that is
// safe with four slots and no trailing barrier: after wait(e) every peer has signalled e, hence
// done read(e - 2), so nobody reads the slot of e + 1; only those of e - 1, e and e + 1 are live.
//
// Destination passing; every function returns false if the waiter gave up. Where a rank has several
// blocks, each has a World of its own and calls the same function on its share of the elements.
#pragma once

#include "core/barrier.h"
#include "core/lanes.h"
#include "core/part.h"
#include "core/reduce.h"

namespace pyparallel {

// Elements of T in `bytes`, down to whole lines, so that what follows in a slot stays aligned.
template <class T>
PP_HOST_DEVICE int64_t line_elements(int64_t bytes) {
  return bytes / kLine * kLine / int64_t(sizeof(T));
}

// Slice `s` of `part`, `size` elements each; empty past the end.
PP_HOST_DEVICE Part slice_of(Part part, int64_t size, int64_t s) {
  const int64_t begin = min_of(part.begin + s * size, part.end);
  return {begin, min_of(begin + size, part.end)};
}

// The discipline above for `count` slices: write(s, e) and read(s, e).
template <class M, class Write, class Read>
PP_HOST_DEVICE bool for_slices(M& m, int64_t count, Write write, Read read) {
  uint32_t e = m.epoch + 1;
  write(int64_t(0), e);
  m.signal(e);
  for (int64_t s = 0; s < count; ++s, ++e) {
    if (!m.wait(e)) return false;
    if (s + 1 < count) {
      write(s + 1, e + 1);
      m.signal(e + 1);
    }
    read(s, e);
  }
  m.epoch = e - 1;
  return true;
}

template <class M>
PP_HOST_DEVICE bool barrier(M& m) {
  return for_slices(m, 1, [](int64_t, uint32_t) {}, [](int64_t, uint32_t) {});
}

// data [n], in place: each rank shows all of its data and folds everybody's.
// Per rank: 1 step; writes n, reads (R - 1) n.
template <class Op, class T, class M>
PP_HOST_DEVICE bool one_shot_all_reduce(M& m, T* data, int64_t n) {
  const World& w = m.world;
  const int64_t size = line_elements<T>(m.slice_bytes);
  return for_slices(
      m, max_of(1, ceil_div(n, size)),
      [&](int64_t s, uint32_t e) {
        const Part slice = slice_of({0, n}, size, s);
        m.lanes.copy(reinterpret_cast<T*>(w.slot(w.rank, e)), data + slice.begin, slice.size(),
                     Store::cached);
      },
      [&](int64_t s, uint32_t e) {
        const Part slice = slice_of({0, n}, size, s);
        const auto source = [&](int r) -> const T* {
          return r == w.rank ? data + slice.begin : reinterpret_cast<const T*>(w.slot(r, e));
        };
        m.lanes.template fold<Op>(data + slice.begin, source, w.size, slice.size(), Store::cached);
      });
}

// data [n], in place: rank r folds part r of each slice, then shows it to all.
// Per rank: 2 steps, the second of slice s joined to the first of slice s + 1; writes about n,
// reads 2 n (R - 1) / R. A slot is R parts to be folded, then one part folded.
template <class Op, class T, class M>
PP_HOST_DEVICE bool two_shot_all_reduce(M& m, T* data, int64_t n) {
  const World& w = m.world;
  const int64_t part_size = line_elements<T>(m.slice_bytes / (w.size + 1));
  const int64_t grain = kLine / int64_t(sizeof(T));
  const int64_t size = part_size * w.size;
  const int64_t slices = max_of(1, ceil_div(n, size));
  const auto region = [&](int owner, int index, uint32_t e) {
    return reinterpret_cast<T*>(w.slot(owner, e)) + index * part_size;
  };
  const auto piece = [&](int64_t s, int r) {
    const Part slice = slice_of({0, n}, size, s);
    const Part part = part_of(slice.size(), w.size, r, grain);
    return Part{slice.begin + part.begin, slice.begin + part.end};
  };
  return for_slices(
      m, slices + 1,
      [&](int64_t s, uint32_t e) {
        if (s > 0) {
          const Part own = piece(s - 1, w.rank);
          const auto source = [&](int r) -> const T* {
            return r == w.rank ? data + own.begin : region(r, w.rank, e - 1);
          };
          m.lanes.template fold<Op>(data + own.begin, source, w.size, own.size(), Store::cached);
          m.lanes.sync();
          m.lanes.copy(region(w.rank, w.size, e), data + own.begin, own.size(), Store::cached);
        }
        if (s < slices) {
          for (int step = 1; step < w.size; ++step) {
            const int r = (w.rank + step) % w.size;
            const Part part = piece(s, r);
            m.lanes.copy(region(w.rank, r, e), data + part.begin, part.size(), Store::cached);
          }
        }
      },
      [&](int64_t s, uint32_t e) {
        if (s == 0) return;
        for (int step = 1; step < w.size; ++step) {
          const int r = (w.rank + step) % w.size;
          const Part part = piece(s - 1, r);
          m.lanes.copy(data + part.begin, region(r, w.size, e), part.size(), Store::cached);
        }
      });
}

// input [sum of parts] -> output [part of this rank], folded.
// Per rank: 1 step; writes n (R - 1) / R, reads the same.
template <class Op, class T, class M, class Cut>
PP_HOST_DEVICE bool reduce_scatter(M& m, T* output, const T* input, const Cut& split) {
  const World& w = m.world;
  const int64_t size = line_elements<T>(m.slice_bytes / w.size);
  return for_slices(
      m, max_of(1, ceil_div(split.largest(w.size), size)),
      [&](int64_t s, uint32_t e) {
        for (int step = 1; step < w.size; ++step) {
          const int r = (w.rank + step) % w.size;
          const Part slice = slice_of(split[r], size, s);
          m.lanes.copy(reinterpret_cast<T*>(w.slot(w.rank, e)) + r * size, input + slice.begin,
                       slice.size(), Store::cached);
        }
      },
      [&](int64_t s, uint32_t e) {
        const Part slice = slice_of(split[w.rank], size, s);
        const auto source = [&](int r) -> const T* {
          return r == w.rank ? input + slice.begin
                             : reinterpret_cast<const T*>(w.slot(r, e)) + w.rank * size;
        };
        m.lanes.template fold<Op>(output + (slice.begin - split.begin[w.rank]), source, w.size,
                                  slice.size(), m.store);
      });
}

// input [part of this rank] -> output [all parts in rank order]. The input may lie in its place.
// Per rank: 1 step; writes n / R, reads n (R - 1) / R.
template <class T, class M, class Cut>
PP_HOST_DEVICE bool all_gather(M& m, T* output, const T* input, const Cut& split) {
  const World& w = m.world;
  const int64_t size = line_elements<T>(m.slice_bytes);
  return for_slices(
      m, max_of(1, ceil_div(split.largest(w.size), size)),
      [&](int64_t s, uint32_t e) {
        const Part slice = slice_of(split[w.rank], size, s);
        const T* from = input + (slice.begin - split.begin[w.rank]);
        m.lanes.copy(reinterpret_cast<T*>(w.slot(w.rank, e)), from, slice.size(), Store::cached);
        if (output + slice.begin != from) {
          m.lanes.copy(output + slice.begin, from, slice.size(), m.store);
        }
      },
      [&](int64_t s, uint32_t e) {
        for (int step = 1; step < w.size; ++step) {
          const int r = (w.rank + step) % w.size;
          const Part slice = slice_of(split[r], size, s);
          m.lanes.copy(output + slice.begin, reinterpret_cast<const T*>(w.slot(r, e)), slice.size(),
                       m.store);
        }
      });
}

// input [parts, one for each rank] -> output [parts, one from each rank]; the splits are this
// rank's own. How many elements go to whom is known to the sender alone, so it heads every slot:
// readers check it against what they expect, and learn from the first how many slices there are.
// Per rank: 1 step; writes and reads n (R - 1) / R.
template <class T, class M, class Cut>
PP_HOST_DEVICE bool all_to_all(M& m, T* output, const T* input, const Cut& output_split,
                               const Cut& input_split) {
  const World& w = m.world;
  const int64_t head_bytes = round_up(int64_t(sizeof(int64_t)) * w.size, kLine);
  const int64_t size = line_elements<T>((m.slice_bytes - head_bytes) / w.size);
  const auto region = [&](int owner, int reader, uint32_t e) {
    return reinterpret_cast<T*>(w.slot(owner, e) + head_bytes) + reader * size;
  };
  const auto write = [&](int64_t s, uint32_t e) {
    auto* counts = reinterpret_cast<int64_t*>(w.slot(w.rank, e));
    for (int r = m.lanes.index(); r < w.size; r += m.lanes.count()) {
      counts[r] = input_split[r].size();
    }
    for (int step = 0; step < w.size; ++step) {
      const int r = (w.rank + step) % w.size;
      const Part slice = slice_of(input_split[r], size, s);
      T* to = region(w.rank, r, e);
      if (r == w.rank) to = output + output_split.begin[r] + (slice.begin - input_split.begin[r]);
      m.lanes.copy(to, input + slice.begin, slice.size(), r == w.rank ? m.store : Store::cached);
    }
  };
  uint32_t e = m.epoch + 1;
  int64_t slices = 1;
  write(0, e);
  m.signal(e);
  for (int64_t s = 0; s < slices; ++s, ++e) {
    if (!m.wait(e)) return false;
    bool agreed = true;
    int64_t most = input_split.largest(w.size);
    for (int r = 0; r < w.size; ++r) {
      if (r == w.rank) continue;
      const auto* counts = reinterpret_cast<const int64_t*>(w.slot(r, e));
      for (int to = 0; to < w.size; ++to) most = max_of(most, counts[to]);
      if (counts[w.rank] != output_split[r].size()) {
        agreed =
            m.lanes.index() > 0 || m.waiter.miscounted(r, output_split[r].size(), counts[w.rank]);
      }
    }
    if (!m.lanes.all(agreed)) return false;
    slices = max_of(1, ceil_div(most, size));
    if (s + 1 < slices) {
      write(s + 1, e + 1);
      m.signal(e + 1);
    }
    for (int step = 1; step < w.size; ++step) {
      const int r = (w.rank + step) % w.size;
      const Part slice = slice_of(output_split[r], size, s);
      m.lanes.copy(output + slice.begin, static_cast<const T*>(region(r, w.rank, e)), slice.size(),
                   m.store);
    }
  }
  m.epoch = e - 1;
  return true;
}

// data [n] of rank `root` -> data of every rank.
// Per rank: 1 step; the root writes n, each other reads n.
template <class T, class M>
PP_HOST_DEVICE bool broadcast(M& m, T* data, int64_t n, int root) {
  const World& w = m.world;
  const int64_t size = line_elements<T>(m.slice_bytes);
  return for_slices(
      m, max_of(1, ceil_div(n, size)),
      [&](int64_t s, uint32_t e) {
        if (w.rank != root) return;
        const Part slice = slice_of({0, n}, size, s);
        m.lanes.copy(reinterpret_cast<T*>(w.slot(root, e)), data + slice.begin, slice.size(),
                     Store::cached);
      },
      [&](int64_t s, uint32_t e) {
        if (w.rank == root) return;
        const Part slice = slice_of({0, n}, size, s);
        m.lanes.copy(data + slice.begin, reinterpret_cast<const T*>(w.slot(root, e)), slice.size(),
                     m.store);
      });
}

}  // namespace pyparallel
