// All-reduce + residual + RMS norm in one pass: what ends each half of a transformer block.
//
//   h = round(sum over ranks of x, in rank order) + residual     (rounded to T)
//   y = h * rstd * weight                                        rstd = 1 / sqrt(mean(h^2) + eps)
//
// x, residual, h, y [M, H] on every rank. The bits are those of the plain path: all-reduce to T, add, norm.
//
// one_shot: every rank shows its rows and does all the work R times over: 1 step, reads M H.
// two_shot: rank r sums and norms its 1/R of the rows and shows h and y: 2 steps, reads
//           3 M H (R-1) / R. For many rows.
#pragma once

#include "core/collective.h"
#include "cuda/kernels/rms_norm.h"

namespace pyparallel::cuda {

template <class T>
struct AllReduceNorm {
  const T* x;
  const T* residual;
  const T* weight;
  T* h;
  T* y;
  int64_t rows;
  int64_t hidden;
  float eps;
};

// One row: sums source(r)[0 .. H) over r, adds the residual, norms. Returns nothing; h and y of `row`.
template <int W, class T, class Lanes, class Source>
PP_HOST_DEVICE void sum_norm_row(const Lanes& lanes, const AllReduceNorm<T>& a, int ranks,
                                 Source source, int64_t row) {
  const int64_t start = row * a.hidden;
  float squares = 0.0f, rstd = 0.0f;
  two_passes<W>(
      lanes, a.hidden / W,
      [&](float (&value)[W], int64_t v, bool count) {
        const int64_t at = start + v * W;
        if (!count) {
          load_vec(value, a.h + at);
          return;
        }
        load_vec(value, source(0) + v * W);
        for (int r = 1; r < ranks; ++r) {
          float next[W];
          load_vec(next, source(r) + v * W);
#pragma unroll
          for (int i = 0; i < W; ++i) value[i] += next[i];
        }
        float residual[W];
        load_vec(residual, a.residual + at);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          value[i] = widen(narrow<T>(widen(narrow<T>(value[i])) + residual[i]));
          squares += value[i] * value[i];
        }
        store_vec(a.h + at, value);
      },
      [&] { rstd = 1.0f / sqrtf(lanes.sum(squares) / float(a.hidden) + a.eps); },
      [&](float (&value)[W], int64_t v) {
        float weight[W];
        load_vec(weight, a.weight + v * W);
#pragma unroll
        for (int i = 0; i < W; ++i) value[i] = value[i] * rstd * weight[i];
        store_vec(a.y + start + v * W, value);
      });
}

// Rows `mine` of this block, every rank all of them.
template <int W, class T, class M>
PP_HOST_DEVICE bool one_shot_all_reduce_norm(M& m, const AllReduceNorm<T>& a, Part mine) {
  const World& w = m.world;
  const int64_t size = max_of(1, line_elements<T>(m.slice_bytes) / a.hidden);
  return for_slices(
      m, max_of(1, ceil_div(mine.size(), size)),
      [&](int64_t s, uint32_t e) {
        const Part rows = slice_of(mine, size, s);
        m.lanes.copy(reinterpret_cast<T*>(w.slot(w.rank, e)), a.x + rows.begin * a.hidden,
                     rows.size() * a.hidden, Store::cached);
      },
      [&](int64_t s, uint32_t e) {
        const Part rows = slice_of(mine, size, s);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
          const auto source = [&](int r) -> const T* {
            return r == w.rank
                       ? a.x + row * a.hidden
                       : reinterpret_cast<const T*>(w.slot(r, e)) + (row - rows.begin) * a.hidden;
          };
          sum_norm_row<W>(m.lanes, a, w.size, source, row);
        }
      });
}

// Rows `mine` of this block, each rank its part of every slice. A slot is R parts of rows to be summed,
// then one part of h and one of y.
template <int W, class T, class M>
PP_HOST_DEVICE bool two_shot_all_reduce_norm(M& m, const AllReduceNorm<T>& a, Part mine) {
  const World& w = m.world;
  const int64_t part_rows = max_of(1, line_elements<T>(m.slice_bytes / (w.size + 2)) / a.hidden);
  const int64_t size = part_rows * w.size;
  const int64_t slices = max_of(1, ceil_div(mine.size(), size));
  const auto region = [&](int owner, int index, uint32_t e) {
    return reinterpret_cast<T*>(w.slot(owner, e)) + index * part_rows * a.hidden;
  };
  const auto piece = [&](int64_t s, int r) {
    const Part slice = slice_of(mine, size, s);
    const Part part = part_of(slice.size(), w.size, r);
    return Part{slice.begin + part.begin, slice.begin + part.end};
  };
  const auto move = [&](T* to, const T* from, Part rows) {
    m.lanes.copy(to, from, rows.size() * a.hidden, Store::cached);
  };
  return for_slices(
      m, slices + 1,
      [&](int64_t s, uint32_t e) {
        if (s > 0) {
          const Part own = piece(s - 1, w.rank);
          for (int64_t row = own.begin; row < own.end; ++row) {
            const auto source = [&](int r) -> const T* {
              return r == w.rank ? a.x + row * a.hidden
                                 : region(r, w.rank, e - 1) + (row - own.begin) * a.hidden;
            };
            sum_norm_row<W>(m.lanes, a, w.size, source, row);
          }
          m.lanes.sync();
          move(region(w.rank, w.size, e), a.h + own.begin * a.hidden, own);
          move(region(w.rank, w.size + 1, e), a.y + own.begin * a.hidden, own);
        }
        if (s < slices) {
          for (int step = 1; step < w.size; ++step) {
            const int r = (w.rank + step) % w.size;
            const Part part = piece(s, r);
            move(region(w.rank, r, e), a.x + part.begin * a.hidden, part);
          }
        }
      },
      [&](int64_t s, uint32_t e) {
        if (s == 0) return;
        for (int step = 1; step < w.size; ++step) {
          const int r = (w.rank + step) % w.size;
          const Part part = piece(s - 1, r);
          move(a.h + part.begin * a.hidden, region(r, w.size, e), part);
          move(a.y + part.begin * a.hidden, region(r, w.size + 1, e), part);
        }
      });
}

}  // namespace pyparallel::cuda
