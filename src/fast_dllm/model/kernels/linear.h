// Linear layers over packed int8 or bfloat16 weights, and what a gated adapter adds to them at masked positions.
//
// That is up @ (down @ x). With down @ x behind x, `up` is more weights of the same product. At other positions there
// are zeros behind x, which add nothing; and where no position is masked the product ends before them.
//
// Legend: T positions, I inputs, O outputs, R rank, U units of 4 bytes (4 int8 or 2 bfloat16 inputs).
#pragma once

#include <omp.h>

#include "bytes.h"
#include "stream.h"
#include "vectors.h"

namespace kernels {

constexpr int kVectors = 2;                // vectors in a panel
constexpr int kPanel = kLanes * kVectors;  // outputs in a panel
constexpr int kDots = 4;                   // sums of down @ x that share a loaded x; a multiple of every unit
constexpr int kMasked = kSums < 4 * kDots ? 1 : 4;  // positions whose down @ x are computed together

struct Linear {  // mirrors the ctypes structure in cpu_ops.py
  int32_t inputs, outputs, rank;  // rank: 0, or a multiple of kDots
  const void* weights;  // panels of [U][kVectors][kLanes] units
  const float* scales;  // [O], or null for 1
  const float* bias;    // [O], or null
  const void* up;       // panels as of the weights, with their scales; or null
  const Ints* down;     // [R][I / 2 kLanes] pairs of bfloat16: kLanes inputs, each with the one kLanes on; or null
};

template <class Kind>
int units_of(int inputs) {
  return (inputs + Kind::kPerUnit - 1) / Kind::kPerUnit;
}

// Of a position, what an adapter adds among them.
template <class Kind>
int most_units(const Linear& layer) {
  return units_of<Kind>(layer.inputs) + units_of<Kind>(layer.rank);
}

// The inputs of a layer as its products take them: [T][stride].
template <class Kind>
struct Operand {
  typename Kind::Input* values;
  float* scales;  // [T]
  int32_t* undo;  // [T]
  int64_t stride;

  void set(int row, const float* inputs, int count) const {
    auto* to = values + row * stride;
    // The last unit may be partly filled, and behind it is what an adapter adds.
    std::fill(to + (units_of<Kind>(count) - 1) * Kind::kInputsPerUnit, to + stride, 0);
    scales[row] = Kind::convert(inputs, count, to, undo + row);
  }
};

// Positions that share a loaded weight: `most`, or what leaves a sum for each of them in a register.
constexpr int sharing(int most) { return std::min(most, kSums); }

// Vectors of a panel whose sums, for some positions, are in registers together.
constexpr int vectors_beside(int rows) { return rows * kVectors > kSums ? 1 : kVectors; }

struct Int8 {
  typedef Ints Sum;
  typedef int32_t Input;  // a unit
  static constexpr int kPerUnit = 4, kInputsPerUnit = 1;
  static constexpr int kRows = sharing(14);  // 14 x 2 sums fill the registers
  // Weights are stored plus 128, since the instruction wants one unsigned side; `undo` takes that out again.
  static Sum start(int32_t undo) { return ints(-undo); }
  template <int rows, int vectors>
  INLINED static void step(Sum (&acc)[rows][vectors], const Ints (&weights)[vectors], const Input* inputs, int64_t stride) {
    add_products<false>(acc, weights, inputs, stride);
  }
  static Floats result(Sum acc) { return to_floats(acc); }
  // Writes the inputs in units, and what `start` has to undo; returns the scale.
  static float convert(const float* values, int count, Input* units, int32_t* undo) {
    Floats most = floats(1e-30f);
    for (int i = 0; i < count; i += kLanes) most = max(most, reach(magnitude(load_some(values + i, count - i))));
    const float largest = max_of(most);
    const Floats inverse = floats(127.0f / largest);
    Ints sums = ints(0);
    for (int i = 0; i < count; i += kLanes) {
      const Ints steps = rounded(load_some(values + i, count - i) * inverse);
      sums = add(sums, steps);
      store_units(units + i / kPerUnit, steps, count - i);
    }
    *undo = 128 * sum_of(sums);
    return largest / 127.0f;
  }
};

// Inputs stay in float32: the bfloat16 dot product of AVX-512 rounds them, and is slower than two multiply-adds.
struct BFloat16 {
  typedef Floats Sum;
  typedef float Input;
  static constexpr int kPerUnit = 2, kInputsPerUnit = 2;
  static constexpr int kRows = sharing(16);  // a few sums in memory cost less than to unpack the weights in two passes
  static Sum start(int32_t) { return floats(0); }
  template <int rows, int vectors>
  INLINED static void step(Sum (&acc)[rows][vectors], const Ints (&weights)[vectors], const Input* inputs, int64_t stride) {
    UNROLL for (int r = 0; r < rows; ++r)
      UNROLL for (int v = 0; v < vectors; ++v)
        acc[r][v] = fmadd(even(weights[v]), floats(inputs[r * stride]), acc[r][v]);
    UNROLL for (int r = 0; r < rows; ++r)
      UNROLL for (int v = 0; v < vectors; ++v)
        acc[r][v] = fmadd(odd(weights[v]), floats(inputs[r * stride + 1]), acc[r][v]);
  }
  static Floats result(Sum acc) { return acc; }
  static float convert(const float* values, int count, Input* inputs, int32_t* undo) {
    std::memcpy(inputs, values, count * sizeof(float));
    *undo = 0;
    return 1.0f;
  }
};

// Results of the last step of a panel: out [.., O] = or += scaled sums and bias.
template <class Kind, int rows, int vectors>
void finish(const typename Kind::Sum (&sums)[rows][vectors], const Operand<Kind>& inputs, int first_row,
            const Linear& layer, int first_output, float* out, bool add) {
  for (int v = 0; v < vectors; ++v) {
    const int output = first_output + v * kLanes, left = layer.outputs - output;
    if (left <= 0) break;
    const Floats scale = layer.scales ? load_some(layer.scales + output, left) : floats(1.0f);
    const Floats bias = layer.bias ? load_some(layer.bias + output, left) : floats(0);
    for (int r = 0; r < rows; ++r) {
      float* to = out + int64_t(first_row + r) * layer.outputs + output;
      Floats value = fmadd(Kind::result(sums[r][v]), scale * floats(inputs.scales[first_row + r]), bias);
      if (add) value = value + load_some(to, left);
      store_some(to, value, left);
    }
  }
}

// A panel of weights, and how far behind lies what is to be fetched meanwhile.
struct Panel {
  const Ints* weights;
  int units;
  int64_t ahead;
};

template <class Kind>
int64_t panel_bytes(int inputs) {
  return units_of<Kind>(inputs) * int64_t(kVectors * sizeof(Ints));
}

// Number `number` of the panels for some inputs, of which a thread does those before `end`, and then reads `next`.
template <class Kind>
Panel panel_of(const void* weights, int inputs, int number, int end, const void* next) {
  const int64_t bytes = panel_bytes<Kind>(inputs);
  const char* first = static_cast<const char*>(weights) + number * bytes;
  const char* after = number + 1 < end ? first + bytes : next ? static_cast<const char*>(next) : first;
  return {reinterpret_cast<const Ints*>(first), units_of<Kind>(inputs), after - first};
}

// `vectors` of a panel, for some positions: one part, or two, where an adapter's is the second. Every `passes` steps from
// step `pass` on, it fetches what lies ahead: the hardware's prefetchers stop at the end of a page.
// A loop over the parts, and not the inner one twice, since then GCC would keep the sums in memory.
template <class Kind, int rows, int vectors>
void part_of_panel(const Operand<Kind>& inputs, int first_row, const Panel* part, int parts, int first_vector, int pass,
                   int passes, const Linear& layer, int first_output, float* out, bool add) {
  typename Kind::Sum acc[rows][vectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] = Kind::start(inputs.undo[first_row + r]);
  const auto* in = inputs.values + first_row * inputs.stride;
  for (const Panel* end = part + parts; part < end; ++part) {
    const Ints* weights = part->weights + first_vector;
    const int64_t ahead = part->ahead;
    for (int u = part->units; u > 0; --u, weights += kVectors, in += Kind::kInputsPerUnit) {
      if (--pass < 0) {
        pass = passes - 1;
        UNROLL for (int v = 0; v < vectors; ++v) fetch(reinterpret_cast<const char*>(weights + v) + ahead);
      }
      Ints w[vectors];
      UNROLL for (int v = 0; v < vectors; ++v) w[v] = load_units(weights + v);
      Kind::step(acc, w, in, inputs.stride);
    }
  }
  // What follows indexes the sums, and what is indexed lives in memory: a copy, or the loop above would run there too.
  typename Kind::Sum sums[rows][vectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) sums[r][v] = acc[r][v];
  finish<Kind, rows, vectors>(sums, inputs, first_row, layer, first_output + first_vector * kLanes, out, add);
}

// One panel for some positions.
template <class Kind, int rows>
void panel(const Operand<Kind>& inputs, int first_row, const Panel* part, int parts, int pass, int passes,
           const Linear& layer, int first_output, float* out, bool add) {
  constexpr int vectors = vectors_beside(rows);
  for (int first = 0; first < kVectors; first += vectors)
    part_of_panel<Kind, rows, vectors>(inputs, first_row, part, parts, first, pass, passes, layer, first_output, out, add);
}

inline int panels_of(const Linear& layer) { return (layer.outputs + kPanel - 1) / kPanel; }

// Of `count` panels, those of a thread of the team.
inline void own_share(int count, int* first, int* end) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  *first = count * thread / threads;
  *end = count * (thread + 1) / threads;
}

// The weights that a thread of the team will read.
template <class Kind>
Span own_weights(const Linear& layer) {
  int first, end;
  own_share(panels_of(layer), &first, &end);
  const int64_t bytes = panel_bytes<Kind>(layer.inputs);
  return Span(static_cast<const char*>(layer.weights) + first * bytes, (end - first) * bytes);
}

// Asks for the first of a thread's panels, ahead of a product.
template <class Kind>
void fetch_first_panel(const Linear& layer) {
  const char* weights = own_weights<Kind>(layer).next;
  for (int64_t i = 0; i < panel_bytes<Kind>(layer.inputs); i += 64) fetch(weights + i);
}

// out [T, O] = layer(inputs), or += where `add`; the inputs' stride says whether an adapter takes part. What is read next
// is fetched at the end. Shared by the threads of a team, which wait for each other then.
template <class Kind>
void multiply(const Linear& layer, const Operand<Kind>& inputs, int count, float* out, bool add,
              const void* next = nullptr) {
  const int passes = (count + Kind::kRows - 1) / Kind::kRows;
  const bool adapted = inputs.stride > int64_t(units_of<Kind>(layer.inputs)) * Kind::kInputsPerUnit;
  int first_panel, end_panel;
  own_share(panels_of(layer), &first_panel, &end_panel);
  for (int p = first_panel; p < end_panel; ++p) {
    const Panel parts[] = {panel_of<Kind>(layer.weights, layer.inputs, p, end_panel, next),
                           panel_of<Kind>(layer.up, layer.rank, p, end_panel, nullptr)};
    for (int pass = 0; pass < passes; ++pass) {
      const int first = count * pass / passes, rows = count * (pass + 1) / passes - first;
#define ROWS(n) \
  case n: \
    if constexpr (n <= Kind::kRows) \
      panel<Kind, n>(inputs, first, parts, adapted ? 2 : 1, pass, passes, layer, p * kPanel, out, add); \
    break;
      switch (rows) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7)
        ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14) ROWS(15) ROWS(16)
      }
#undef ROWS
    }
  }
#pragma omp barrier
}

// How many inputs a masked position has, down @ inputs among them.
template <class Kind>
int extended(const Linear& layer) {
  return units_of<Kind>(layer.inputs) * Kind::kPerUnit + layer.rank;
}

// Puts down @ inputs behind the inputs [rows][stride] of masked positions.
template <class Kind, int rows>
void extend(const Linear& layer, float* inputs, int64_t stride) {
  const int start = extended<Kind>(layer) - layer.rank;
  for (int i = 0; i < rows; ++i) std::fill(inputs + i * stride + layer.inputs, inputs + i * stride + start, 0.0f);
  const int vectors = (layer.inputs + 2 * kLanes - 1) / (2 * kLanes);
  const Ints* down = layer.down;
  for (int r = 0; r < layer.rank; r += kDots, down += kDots * vectors) {
    Floats sums[rows][kDots];
    UNROLL for (int i = 0; i < rows; ++i)
      UNROLL for (int d = 0; d < kDots; ++d) sums[i][d] = floats(0);
    for (int v = 0; v < vectors; ++v) {
      const int first = 2 * v * kLanes, second = first + kLanes;
      Floats x[rows], y[rows];
      UNROLL for (int i = 0; i < rows; ++i) {
        x[i] = load_some(inputs + i * stride + first, layer.inputs - first);
        y[i] = load_some(inputs + i * stride + second, layer.inputs - second);
      }
      UNROLL for (int d = 0; d < kDots; ++d) {
        const Ints pairs = load_units(down + d * vectors + v);
        UNROLL for (int i = 0; i < rows; ++i)
          sums[i][d] = fmadd(odd(pairs), y[i], fmadd(even(pairs), x[i], sums[i][d]));
      }
    }
    UNROLL for (int i = 0; i < rows; ++i)
      UNROLL for (int d = 0; d < kDots; ++d) inputs[i * stride + start + r + d] = sum_of(sums[i][d]);
  }
}

template <class Kind>
void extend(const Linear& layer, float* inputs, int64_t stride, int rows) {
#define ROWS(n) \
  case n: \
    if constexpr (n <= kMasked) extend<Kind, n>(layer, inputs, stride); \
    break;
  switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) }
#undef ROWS
}

// to = from, times norm over the root mean square of all: RMSNorm.
inline void normalise(const float* from, int count, const float* norm, float epsilon, float* to) {
  Floats squares = floats(0);
  for (int i = 0; i < count; i += kLanes) {
    const Floats x = load_some(from + i, count - i);
    squares = fmadd(x, x, squares);
  }
  const Floats scale = floats(1.0f / std::sqrt(sum_of(squares) / count + epsilon));
  for (int i = 0; i < count; i += kLanes) {
    const Floats x = load_some(from + i, count - i) * scale;
    store_some(to + i, x * load_some(norm + i, count - i), count - i);
  }
}

// to [I] = silu(gate) * up, from [gate | up].
inline void gate(const float* from, int count, float* to) {
  for (int i = 0; i < count; i += kLanes) {
    const Floats gated = silu(load_some(from + i, count - i));
    store_some(to + i, gated * load_some(from + count + i, count - i), count - i);
  }
}

}  // namespace kernels
