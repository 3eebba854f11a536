// Linear layers over packed int8 or bfloat16 weights.
//
// Legend: T positions, I inputs, O outputs, U units of 4 bytes (4 int8 or 2 bfloat16 inputs).
#pragma once

#include <omp.h>

#include "stream.h"
#include "vectors.h"

namespace kernels {

constexpr int kVectors = 3;                  // vectors in a panel
constexpr int kPanel = kLanes * kVectors;    // outputs in a panel
constexpr int kRows = 8;                     // positions that share a loaded weight: 8 x 3 sums fill the registers

struct Linear {  // mirrors the ctypes structure in cpu_ops.py
  int32_t inputs, outputs;
  const void* weights;  // panels of [U][kVectors][kLanes] units
  const float* scales;  // [O], or null for 1
  const float* bias;    // [O], or null
};

// The inputs of a layer as its products take them: [T][stride].
template <class Kind>
struct Operand {
  typename Kind::Input* values;
  float* scales;  // [T]
  int32_t* undo;  // [T]
  int64_t stride;

  void set(int row, const float* inputs, int count) const {
    auto* to = values + row * stride;
    for (int i = 0; i < Kind::kInputsPerUnit; ++i) to[stride - 1 - i] = 0;  // a unit may be partly filled
    scales[row] = Kind::convert(inputs, count, to, undo + row);
  }
};

#ifdef __AVX512VNNI__
struct Int8 {
  typedef __m512i Sum;
  typedef int32_t Input;  // a unit
  static constexpr int kPerUnit = 4, kInputsPerUnit = 1;
  // Weights are stored plus 128, since the instruction wants one unsigned side; `undo` takes that out again.
  static Sum start(int32_t undo) { return _mm512_set1_epi32(-undo); }
  template <int rows, int vectors>
  static void step(Sum (&acc)[rows][vectors], const __m512i (&weights)[vectors], const Input* inputs, int64_t stride) {
    UNROLL for (int r = 0; r < rows; ++r)
      UNROLL for (int v = 0; v < vectors; ++v)
        acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], weights[v], _mm512_set1_epi32(inputs[r * stride]));
  }
  static __m512 result(Sum acc) { return _mm512_cvtepi32_ps(acc); }
  // Writes the inputs in units, and what `start` has to undo; returns the scale.
  static float convert(const float* values, int count, Input* units, int32_t* undo) {
    __m512 most = _mm512_set1_ps(1e-30f);
    for (int i = 0; i < count; i += kLanes) most = _mm512_max_ps(most, _mm512_abs_ps(load_some(values + i, count - i)));
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 inverse = _mm512_set1_ps(127.0f / largest);
    auto* bytes = reinterpret_cast<int8_t*>(units);
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < count; i += kLanes) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load_some(values + i, count - i), inverse));
      sums = _mm512_add_epi32(sums, rounded);
      _mm_mask_storeu_epi8(bytes + i, some(count - i), _mm512_cvtepi32_epi8(rounded));
    }
    *undo = 128 * _mm512_reduce_add_epi32(sums);
    return largest / 127.0f;
  }
};
#endif

// Inputs stay in float32: the bfloat16 dot product of AVX-512 rounds them, and is slower than two multiply-adds.
struct BFloat16 {
  typedef __m512 Sum;
  typedef float Input;
  static constexpr int kPerUnit = 2, kInputsPerUnit = 2;
  static Sum start(int32_t) { return _mm512_setzero_ps(); }
  template <int rows, int vectors>
  static void step(Sum (&acc)[rows][vectors], const __m512i (&weights)[vectors], const Input* inputs, int64_t stride) {
    UNROLL for (int r = 0; r < rows; ++r)
      UNROLL for (int v = 0; v < vectors; ++v)
        acc[r][v] = _mm512_fmadd_ps(even(weights[v]), _mm512_set1_ps(inputs[r * stride]), acc[r][v]);
    UNROLL for (int r = 0; r < rows; ++r)
      UNROLL for (int v = 0; v < vectors; ++v)
        acc[r][v] = _mm512_fmadd_ps(odd(weights[v]), _mm512_set1_ps(inputs[r * stride + 1]), acc[r][v]);
  }
  static __m512 result(Sum acc) { return acc; }
  static float convert(const float* values, int count, Input* inputs, int32_t* undo) {
    std::memcpy(inputs, values, count * sizeof(float));
    *undo = 0;
    return 1.0f;
  }
};

template <class Kind>
int units_of(int inputs) {
  return (inputs + Kind::kPerUnit - 1) / Kind::kPerUnit;
}

// Results of the last step of a panel: out [.., O] = or += scaled sums and bias.
template <class Kind, int rows>
void finish(const typename Kind::Sum (&sums)[rows][kVectors], const Operand<Kind>& inputs, int first_row,
            const Linear& layer, int first_output, float* out, bool add) {
  for (int v = 0; v < kVectors; ++v) {
    const int output = first_output + v * kLanes;
    const __mmask16 valid = some(layer.outputs - output);
    if (!valid) break;
    const __m512 scale = layer.scales ? _mm512_maskz_loadu_ps(valid, layer.scales + output) : _mm512_set1_ps(1.0f);
    const __m512 bias = layer.bias ? _mm512_maskz_loadu_ps(valid, layer.bias + output) : _mm512_setzero_ps();
    for (int r = 0; r < rows; ++r) {
      float* to = out + int64_t(first_row + r) * layer.outputs + output;
      const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(inputs.scales[first_row + r]));
      __m512 value = _mm512_fmadd_ps(Kind::result(sums[r][v]), by, bias);
      if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(valid, to));
      _mm512_mask_storeu_ps(to, valid, value);
    }
  }
}

// One panel for some positions. Every `passes` steps from step `pass` on, it fetches what lies `ahead` bytes further:
// the hardware's prefetchers stop at the end of a page.
template <class Kind, int rows>
void panel(const Operand<Kind>& inputs, int first_row, int units, const __m512i* weights, int64_t ahead, int pass,
           int passes, const Linear& layer, int first_output, float* out, bool add) {
  typename Kind::Sum acc[rows][kVectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = Kind::start(inputs.undo[first_row + r]);
  const auto* in = inputs.values + first_row * inputs.stride;
  for (int u = 0; u < units; ++u, weights += kVectors, in += Kind::kInputsPerUnit) {
    if (--pass < 0) {
      pass = passes - 1;
      UNROLL for (int v = 0; v < kVectors; ++v) fetch(reinterpret_cast<const char*>(weights + v) + ahead);
    }
    __m512i w[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_si512(weights + v);
    Kind::step(acc, w, in, inputs.stride);
  }
  // What follows indexes the sums, and what is indexed lives in memory: a copy, or the loop above would run there too.
  typename Kind::Sum sums[rows][kVectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = acc[r][v];
  finish<Kind, rows>(sums, inputs, first_row, layer, first_output, out, add);
}

inline int panels_of(const Linear& layer) { return (layer.outputs + kPanel - 1) / kPanel; }

// Of `count` panels, those of a thread of the team.
inline void own_share(int count, int* first, int* end) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  *first = count * thread / threads;
  *end = count * (thread + 1) / threads;
}

template <class Kind>
int64_t panel_bytes(const Linear& layer) {
  return units_of<Kind>(layer.inputs) * int64_t(kVectors * sizeof(__m512i));
}

// The weights that a thread of the team will read.
template <class Kind>
Span own_weights(const Linear& layer) {
  int first, end;
  own_share(panels_of(layer), &first, &end);
  const int64_t bytes = panel_bytes<Kind>(layer);
  return Span(static_cast<const char*>(layer.weights) + first * bytes, (end - first) * bytes);
}

// Asks for the first of a thread's panels, ahead of a product.
template <class Kind>
void fetch_first_panel(const Linear& layer) {
  const char* weights = own_weights<Kind>(layer).next;
  for (int64_t i = 0; i < panel_bytes<Kind>(layer); i += 64) fetch(weights + i);
}

// out [T, O] = layer(inputs), or += where `add`. Shared by the threads of a team, which wait for each other at the end.
template <class Kind>
void multiply(const Linear& layer, const Operand<Kind>& inputs, int count, float* out, bool add) {
  const int units = units_of<Kind>(layer.inputs), passes = (count + kRows - 1) / kRows;
  const auto* weights = static_cast<const __m512i*>(layer.weights);
  int first_panel, end_panel;
  own_share(panels_of(layer), &first_panel, &end_panel);
  for (int p = first_panel; p < end_panel; ++p) {
    const __m512i* w = weights + int64_t(p) * units * kVectors;
    const int64_t ahead = p + 1 < end_panel ? panel_bytes<Kind>(layer) : 0;
    for (int pass = 0; pass < passes; ++pass) {
      const int first = count * pass / passes, rows = count * (pass + 1) / passes - first;
#define ROWS(n) \
  case n: panel<Kind, n>(inputs, first, units, w, ahead, pass, passes, layer, p * kPanel, out, add); break;
      switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) }
#undef ROWS
    }
  }
#pragma omp barrier
}

// to = from, times norm over the root mean square of all: RMSNorm.
inline void normalise(const float* from, int count, const float* norm, float epsilon, float* to) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < count; i += kLanes) {
    const __m512 x = load_some(from + i, count - i);
    squares = _mm512_fmadd_ps(x, x, squares);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / count + epsilon));
  for (int i = 0; i < count; i += kLanes) {
    const __m512 x = _mm512_mul_ps(load_some(from + i, count - i), scale);
    _mm512_mask_storeu_ps(to + i, some(count - i), _mm512_mul_ps(x, load_some(norm + i, count - i)));
  }
}

// to [I] = silu(gate) * up, from [gate | up].
inline void gate(const float* from, int count, float* to) {
  for (int i = 0; i < count; i += kLanes) {
    const __m512 gated = silu(load_some(from + i, count - i));
    _mm512_mask_storeu_ps(to + i, some(count - i), _mm512_mul_ps(gated, load_some(from + count + i, count - i)));
  }
}

}  // namespace kernels
