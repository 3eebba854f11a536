// What comes before the product of a linear layer: its inputs, made row by row and put as the product takes them.
#pragma once

#include <omp.h>

#include "buffer.h"
#include "linear.h"

namespace kernels {

// Of the rows of a linear layer, those at which a gated adapter acts.
struct Masked {
  const uint8_t* positions;  // [T], or null for nowhere
  const int64_t* read;       // [N], positions of the rows; null where every position is a row

  bool any() const { return positions; }
  bool operator()(int row) const { return positions && positions[read ? read[row] : row]; }
};

// The inputs of linear layers, row by row.
template <class Kind>
class Inputs {
 public:
  Inputs(int count, int widest, int threads) {
    thread_local Buffer<typename Kind::Input> values;
    thread_local Buffer<float> scales, rows;
    thread_local Buffer<int32_t> undo;
    values_ = values.grow(int64_t(count) * units_of<Kind>(widest) * Kind::kInputsPerUnit);
    scales_ = scales.grow(count);
    undo_ = undo.grow(count);
    row_stride_ = up(widest, kLanes);
    rows_ = rows.grow(int64_t(threads) * kMasked * row_stride_);
  }

  // `make(row, to)` writes the inputs of one of the rows. Shared by the threads of a team.
  template <class Make>
  Operand<Kind> prepare(const Linear& layer, int first, int end, Masked masked, Make make) const {
    fetch_first_panel<Kind>(layer);
    const int units = masked.any() ? most_units<Kind>(layer) : units_of<Kind>(layer.inputs);
    const Operand<Kind> operand{values_, scales_, undo_, int64_t(units) * Kind::kInputsPerUnit};
    float* rows = rows_ + int64_t(omp_get_thread_num()) * kMasked * row_stride_;
    int waiting[kMasked], count = 0;
    const auto extend_waiting = [&] {
      extend<Kind>(layer, rows, row_stride_, count);
      for (int i = 0; i < count; ++i) operand.set(waiting[i], rows + i * row_stride_, extended<Kind>(layer));
      count = 0;
    };
    // In turns, since masked positions, which take longer, follow one another.
#pragma omp for schedule(static, 1) nowait
    for (int r = first; r < end; ++r) {
      float* row = rows + count * row_stride_;
      make(r, row);
      if (masked(r)) waiting[count++] = r;
      else operand.set(r, row, layer.inputs);
      if (count == kMasked) extend_waiting();
    }
    extend_waiting();
#pragma omp barrier
    return operand;
  }

 private:
  typename Kind::Input* values_;
  float *scales_, *rows_;
  int32_t* undo_;
  int64_t row_stride_;
};

}  // namespace kernels
