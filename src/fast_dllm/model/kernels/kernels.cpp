// Decoding kernels for x86 CPUs with AVX-512; int8 needs VNNI too. Plain C interface: Python calls it with pointers.
//
// Activations are float32. Weights are int8 (a scale per output) or bfloat16; keys and values are bfloat16.
// Every result for a position depends on that position's inputs alone, in an order that the number of positions and
// threads does not change: a row of a batch gives bitwise what it gives alone.
//
// Legend: T positions, I inputs, O outputs, E width of a head, U units of 4 bytes (4 int8 or 2 bfloat16 inputs).

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Loops over arrays that are to stay in registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

typedef float Floats __attribute__((vector_size(64)));
constexpr int kLanes = 16;          // outputs in a vector
constexpr int kVectors = 3;         // vectors in a panel
constexpr int kPanel = kLanes * kVectors;
constexpr int kRows = 8;            // positions that share a loaded weight: 8 x 3 accumulators fill the registers
constexpr int kTile = 64;           // keys converted to float32 at once
constexpr int kQueries = 16;        // queries that share a tile

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
// The first `count` lanes, all where there are more.
inline __mmask16 some(int count) { return count >= kLanes ? 0xffff : (1u << count) - 1; }
inline __m512 load_some(const float* from, int count) { return _mm512_maskz_loadu_ps(some(count), from); }
inline float sum(Floats v) { return _mm512_reduce_add_ps((__m512)v); }

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline Floats from_bfloat16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Floats)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// exp for x <= 0, to 2e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2].
inline Floats exponential(Floats x) {
  const __m512 clamped = _mm512_max_ps((__m512)x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return (Floats)_mm512_scalef_ps(p, n);
}

// ---- Linear layers -------------------------------------------------------------------------------------------------

#ifdef __AVX512VNNI__
struct Int8 {
  typedef __m512i Sum;
  typedef int32_t Input;  // a unit
  static constexpr int kPerUnit = 4, kInputsPerUnit = 1;
  static Sum zero() { return _mm512_setzero_si512(); }
  // Weights are stored plus 128, since the instruction wants one unsigned side; `undo` takes that out again.
  template <int rows>
  static void step(Sum (&acc)[rows][kVectors], const __m512i* weights, const Input* inputs, int stride) {
    UNROLL for (int r = 0; r < rows; ++r)
      UNROLL for (int v = 0; v < kVectors; ++v)
        acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], weights[v], _mm512_set1_epi32(inputs[r * stride]));
  }
  static __m512 result(Sum acc, int32_t undo) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, _mm512_set1_epi32(undo)));
  }
  // Writes the inputs in units, and what `result` has to undo; returns the scale.
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
  static Sum zero() { return _mm512_setzero_ps(); }
  template <int rows>
  static void step(Sum (&acc)[rows][kVectors], const __m512i* weights, const Input* inputs, int stride) {
    __m512 even[kVectors], odd[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) {
      even[v] = _mm512_castsi512_ps(_mm512_slli_epi32(weights[v], 16));
      odd[v] = _mm512_castsi512_ps(_mm512_and_si512(weights[v], _mm512_set1_epi32(int(0xffff0000))));
    }
    UNROLL for (int r = 0; r < rows; ++r)
      UNROLL for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = _mm512_fmadd_ps(even[v], _mm512_set1_ps(inputs[r * stride]), acc[r][v]);
        acc[r][v] = _mm512_fmadd_ps(odd[v], _mm512_set1_ps(inputs[r * stride + 1]), acc[r][v]);
      }
  }
  static __m512 result(Sum acc, int32_t) { return acc; }
  static float convert(const float* values, int count, Input* inputs, int32_t* undo) {
    std::memcpy(inputs, values, count * sizeof(float));
    *undo = 0;
    return 1.0f;
  }
};

struct Linear {  // mirrors the ctypes structure in cpu_ops.py
  int32_t inputs, outputs;
  const void* weights;   // panels of [U][kVectors][kLanes] units
  const float* scales;   // [O], or null for 1
  const float* bias;     // [O], or null
};

struct Prologue {  // what happens to the inputs of a linear layer
  const float* norm;  // RMSNorm weight [I], or null
  float epsilon;
  int32_t gated;      // the inputs are [gate | up], 2 I wide: silu(gate) * up
};

void prepare(const float* from, const Prologue& how, int count, float* to) {
  if (how.gated) {
    for (int i = 0; i < count; i += kLanes) {
      Floats gate = {}, up = {};
      const int n = std::min(kLanes, count - i);
      std::memcpy(&gate, from + i, n * sizeof(float));
      std::memcpy(&up, from + count + i, n * sizeof(float));
      // sigmoid through exp of a number that is not positive, so that nothing overflows
      const Floats e = exponential(gate > 0 ? -gate : gate);
      const Floats v = up * gate * (gate > 0 ? 1.0f / (1.0f + e) : e / (1.0f + e));
      std::memcpy(to + i, &v, n * sizeof(float));
    }
  } else if (how.norm) {
    Floats squares = {};
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) squares += load(from + i) * load(from + i);
    float total = sum(squares);
    for (; i < count; ++i) total += from[i] * from[i];
    const float scale = 1.0f / std::sqrt(total / count + how.epsilon);
    for (i = 0; i < count; ++i) to[i] = from[i] * scale * how.norm[i];
  } else {
    std::memcpy(to, from, count * sizeof(float));
  }
}

template <class Kind, int rows>
void panel(const typename Kind::Input* inputs, int units, const __m512i* weights, const float* scales,
           const int32_t* undo, const Linear& layer, int first, float* out, bool add) {
  typename Kind::Sum acc[rows][kVectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = Kind::zero();
  const int stride = units * Kind::kInputsPerUnit;
  for (int u = 0; u < units; ++u, weights += kVectors, inputs += Kind::kInputsPerUnit) {
    __m512i w[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_si512(weights + v);
    Kind::template step<rows>(acc, w, inputs, stride);
  }
  // What follows indexes the sums, and what is indexed lives in memory: a copy, or the loop above would run there too.
  typename Kind::Sum sums[rows][kVectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = acc[r][v];
  for (int v = 0; v < kVectors; ++v) {
    const int output = first + v * kLanes, left = layer.outputs - output;
    if (left <= 0) break;
    const __mmask16 valid = some(left);
    const __m512 scale = layer.scales ? _mm512_maskz_loadu_ps(valid, layer.scales + output) : _mm512_set1_ps(1.0f);
    const __m512 bias = layer.bias ? _mm512_maskz_loadu_ps(valid, layer.bias + output) : _mm512_setzero_ps();
    for (int r = 0; r < rows; ++r) {
      float* to = out + int64_t(r) * layer.outputs + output;
      const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(scales[r]));
      __m512 value = _mm512_fmadd_ps(Kind::result(sums[r][v], undo[r]), by, bias);
      if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(valid, to));
      _mm512_mask_storeu_ps(to, valid, value);
    }
  }
}

template <class Kind>
void linear(const Linear& layer, const Prologue& prologue, int count, const float* from, float* out, bool add,
            int threads) {
  const int units = (layer.inputs + Kind::kPerUnit - 1) / Kind::kPerUnit;
  const int width = prologue.gated ? 2 * layer.inputs : layer.inputs;
  const int panels = (layer.outputs + kPanel - 1) / kPanel;
  const int64_t stride = int64_t(units) * Kind::kInputsPerUnit;
  // Belong to the calling thread and outlive the call: no allocation once the largest batch has been seen.
  thread_local std::vector<typename Kind::Input> input_buffer;
  thread_local std::vector<int32_t> undo_buffer;
  thread_local std::vector<float> scale_buffer, float_buffer;
  input_buffer.resize(std::max<size_t>(input_buffer.size(), count * stride));
  undo_buffer.resize(std::max<size_t>(undo_buffer.size(), count));
  scale_buffer.resize(std::max<size_t>(scale_buffer.size(), count));
  float_buffer.resize(std::max<size_t>(float_buffer.size(), size_t(count) * layer.inputs));
  auto* inputs = input_buffer.data();
  int32_t* undo = undo_buffer.data();
  float *scales = scale_buffer.data(), *prepared = float_buffer.data();
  const auto* weights = static_cast<const __m512i*>(layer.weights);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int r = 0; r < count; ++r) {
      float* row = prepared + int64_t(r) * layer.inputs;
      prepare(from + int64_t(r) * width, prologue, layer.inputs, row);
      for (int i = 0; i < Kind::kInputsPerUnit; ++i) inputs[(r + 1) * stride - 1 - i] = 0;  // a unit may be partly filled
      scales[r] = Kind::convert(row, layer.inputs, inputs + r * stride, undo + r);
    }
#pragma omp for schedule(static)
    for (int p = 0; p < panels; ++p) {
      const __m512i* w = weights + int64_t(p) * units * kVectors;
      for (int r = 0; r < count; r += kRows) {
        const auto* in = inputs + r * stride;
        float* to = out + int64_t(r) * layer.outputs;
#define ROWS(n) \
  case n: panel<Kind, n>(in, units, w, scales + r, undo + r, layer, p * kPanel, to, add); break;
        switch (std::min(kRows, count - r)) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) }
#undef ROWS
      }
    }
  }
}

// ---- Attention -----------------------------------------------------------------------------------------------------

struct Heads {  // mirrors the ctypes structure in cpu_ops.py
  int32_t query, kv, width;
};

struct Slab {  // K or V of a layer: [slots, kv heads, length, E]
  uint16_t* data;
  int64_t slot, head;  // strides, in elements
};

// One head: in place, half the width against the other half.
void rotate(float* head, int width, const float* cos, const float* sin, const float* norm, float epsilon) {
  if (norm) {
    float total = 0;
    for (int i = 0; i < width; ++i) total += head[i] * head[i];
    const float scale = 1.0f / std::sqrt(total / width + epsilon);
    for (int i = 0; i < width; ++i) head[i] *= scale * norm[i];
  }
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

template <int E>
void convert(const uint16_t* from, int keys, float* to) {
  for (int i = 0; i < keys * E; i += kLanes) store(to + i, from_bfloat16(from + i));
}

// Sixteen sums at once: lane i of the result is the sum of v[i].
inline __m512 sums(const __m512* v) {
  __m512 pairs[8], fours[4], halves[2];
  UNROLL for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  UNROLL for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  UNROLL for (int i = 0; i < 2; ++i)
    halves[i] = _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88) +
                _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd);
  return _mm512_shuffle_f32x4(halves[0], halves[1], 0x88) + _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd);
}

// Scores of one query against a tile of keys.
template <int E>
void score(const float* from, const float* tile, int keys, float* scores) {
  constexpr int V = E / kLanes;
  const float scale = 1.0f / std::sqrt(float(E));
  Floats query[V];
  for (int v = 0; v < V; ++v) query[v] = load(from + v * kLanes) * scale;
  for (int k = 0; k < keys; k += kLanes) {  // what lies behind the last key is overwritten by the softmax
    __m512 products[kLanes];
    UNROLL for (int i = 0; i < kLanes; ++i) {
      Floats product = query[0] * load(tile + (k + i) * E);
      for (int v = 1; v < V; ++v) product += query[v] * load(tile + (k + i) * E + v * kLanes);
      products[i] = (__m512)product;
    }
    store(scores + k, (Floats)sums(products));
  }
}

// Scores to probabilities: the first `end` of a row, zeros up to a whole vector behind `length`.
void softmax(float* row, int end, int length) {
  const int padded = (length + kLanes - 1) / kLanes * kLanes;
  std::fill(row + end, row + padded, -INFINITY);
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int k = 0; k < padded; k += kLanes) most = _mm512_max_ps(most, (__m512)load(row + k));
  const float largest = _mm512_reduce_max_ps(most);
  Floats total = {};
  for (int k = 0; k < padded; k += kLanes) {
    // Beyond the end this is about 1e-38, which rounds away in the total.
    const Floats e = exponential(load(row + k) - largest);
    store(row + k, e);
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  for (int k = 0; k < padded; k += kLanes) store(row + k, load(row + k) * inverse);
  std::fill(row + end, row + padded, 0.0f);
}

// Add a tile's values to the outputs of a few queries: more than one, or each addition would wait for the last.
template <int E, int count>
void weigh(const float* scores, int stride, const float* tile, int keys, float* const* outputs) {
  constexpr int V = E / kLanes;
  Floats acc[count][V];
  UNROLL for (int q = 0; q < count; ++q)
    UNROLL for (int v = 0; v < V; ++v) acc[q][v] = load(outputs[q] + v * kLanes);
  for (int k = 0; k < keys; ++k)
    UNROLL for (int v = 0; v < V; ++v) {
      const Floats value = load(tile + k * E + v * kLanes);
      UNROLL for (int q = 0; q < count; ++q) acc[q][v] += scores[q * stride + k] * value;
    }
  UNROLL for (int q = 0; q < count; ++q)
    UNROLL for (int v = 0; v < V; ++v) store(outputs[q] + v * kLanes, acc[q][v]);
}

// Some queries of one row that share a K/V head. `ends`: each sees the keys before its own end.
template <int E>
void attend(const float* const* queries, float* const* outputs, const int32_t* ends, int count, const uint16_t* keys,
            const uint16_t* values, float* scores, int stride, float* tile) {
  constexpr int together = E <= 64 ? 4 : E <= 128 ? 2 : 1;  // accumulators that fit into the registers
  const int length = *std::max_element(ends, ends + count);
  for (int k0 = 0; k0 < length; k0 += kTile) {
    const int here = std::min(kTile, length - k0);
    convert<E>(keys + int64_t(k0) * E, here, tile);
    for (int q = 0; q < count; ++q) score<E>(queries[q], tile, here, scores + q * stride + k0);
  }
  for (int q = 0; q < count; ++q) {
    softmax(scores + q * stride, ends[q], length);
    std::fill(outputs[q], outputs[q] + E, 0.0f);
  }
  for (int k0 = 0; k0 < length; k0 += kTile) {
    const int here = std::min(kTile, length - k0);
    convert<E>(values + int64_t(k0) * E, here, tile);
    int q = 0;
    for (; q + together <= count; q += together)
      weigh<E, together>(scores + q * stride + k0, stride, tile, here, outputs + q);
    for (; q < count; ++q) weigh<E, 1>(scores + q * stride + k0, stride, tile, here, outputs + q);
  }
}

template <int E>
void attention(const Heads& heads, int rows, const int32_t* row_starts, const int64_t* slots, const int32_t* ends,
               const float* qkv, const Slab& keys, const Slab& values, float* out, int threads) {
  const int share = heads.query / heads.kv;
  const int qkv_width = (heads.query + 2 * heads.kv) * E, out_width = heads.query * E;
  struct Item { int row, head, first, count; };
  thread_local std::vector<Item> items;
  items.clear();
  int longest = 0;
  for (int r = 0; r < rows; ++r) {
    const int queries = (row_starts[r + 1] - row_starts[r]) * share;
    // Shares of equal size, in fours as `weigh` likes them.
    const int shares = (queries + kQueries - 1) / kQueries;
    const int size = std::min(kQueries, ((queries + shares - 1) / shares + 3) / 4 * 4);
    for (int h = 0; h < heads.kv; ++h)
      for (int first = 0; first < queries; first += size) items.push_back({r, h, first, std::min(size, queries - first)});
    longest = std::max(longest, *std::max_element(ends + row_starts[r], ends + row_starts[r + 1]));
  }
  const int stride = (longest + kTile) / kLanes * kLanes;
  const Item* all = items.data();
  const int total = static_cast<int>(items.size());
#pragma omp parallel num_threads(threads)
  {
    thread_local std::vector<float> buffer;
    buffer.resize(std::max<size_t>(buffer.size(), size_t(kQueries) * stride + kTile * E + kLanes));
    // Whole cache lines: a vector that straddles two costs two loads.
    auto* tile = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
    float* scores = tile + kTile * E;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < total; ++i) {
      const Item item = all[i];
      const int start = row_starts[item.row];
      const float* queries[kQueries];
      float* outputs[kQueries];
      int32_t own_ends[kQueries];
      for (int q = 0; q < item.count; ++q) {
        const int position = start + (item.first + q) / share;
        const int head = item.head * share + (item.first + q) % share;
        queries[q] = qkv + int64_t(position) * qkv_width + head * E;
        outputs[q] = out + int64_t(position) * out_width + head * E;
        own_ends[q] = ends[position];
      }
      const int64_t slot = slots[start];
      attend<E>(queries, outputs, own_ends, item.count, keys.data + slot * keys.slot + item.head * keys.head,
                values.data + slot * values.slot + item.head * values.head, scores, stride, tile);
    }
  }
}

}  // namespace

extern "C" {

// Which instruction sets this file was built with: 1 int8, 2 bfloat16.
int fast_dllm_kinds() {
  int kinds = 2;
#ifdef __AVX512VNNI__
  kinds |= 1;
#endif
  return kinds;
}

// out [T, O] = layer(prologue(from)), or += where `add`.
void fast_dllm_linear(const Linear* layer, const Prologue* prologue, int int8, int count, const float* from, float* out,
                      int add, int threads) {
#ifdef __AVX512VNNI__
  if (int8) linear<Int8>(*layer, *prologue, count, from, out, add, threads);
#endif
  if (!int8) linear<BFloat16>(*layer, *prologue, count, from, out, add, threads);
}

// RoPE (and QK norm) of the queries in place; keys and values into the slab. cos, sin: [.., E / 2] by position.
void fast_dllm_store(const Heads* heads, int count, float* qkv, const float* cos, const float* sin, const float* query_norm,
                     const float* key_norm, float epsilon, const int64_t* slots, const int64_t* positions,
                     const Slab* keys, const Slab* values, int threads) {
  const int width = heads->width, all = heads->query + 2 * heads->kv;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < count; ++t) {
    float* row = qkv + int64_t(t) * all * width;
    const float *c = cos + positions[t] * (width / 2), *s = sin + positions[t] * (width / 2);
    for (int h = 0; h < heads->query; ++h) rotate(row + h * width, width, c, s, query_norm, epsilon);
    for (int h = 0; h < heads->kv; ++h) {
      float* key = row + (heads->query + h) * width;
      const float* value = key + heads->kv * width;
      rotate(key, width, c, s, key_norm, epsilon);
      uint16_t* to_key = keys->data + slots[t] * keys->slot + h * keys->head + positions[t] * width;
      uint16_t* to_value = values->data + slots[t] * values->slot + h * values->head + positions[t] * width;
      for (int i = 0; i < width; ++i) {
        to_key[i] = to_bfloat16(key[i]);
        to_value[i] = to_bfloat16(value[i]);
      }
    }
  }
}

// out [T, query heads * E]: every row over its slot, each position over the keys before its end. Returns 0, or 1 for a
// head width that has no kernel.
int fast_dllm_attention(const Heads* heads, int rows, const int32_t* row_starts, const int64_t* slots,
                        const int32_t* ends, const float* qkv, const Slab* keys, const Slab* values, float* out,
                        int threads) {
#define WIDTH(e) \
  case e: attention<e>(*heads, rows, row_starts, slots, ends, qkv, *keys, *values, out, threads); return 0;
  switch (heads->width) { WIDTH(16) WIDTH(32) WIDTH(64) WIDTH(80) WIDTH(96) WIDTH(128) WIDTH(256) }
#undef WIDTH
  return 1;
}
}
