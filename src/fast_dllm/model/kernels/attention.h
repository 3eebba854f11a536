// RoPE, and attention over a slab of bfloat16 keys and values.
//
// Keys are cut into chunks at multiples of kChunk. Each chunk of a query is done on its own, by whichever thread, and
// `merge` puts a query's chunks together in their order: so long contexts are shared between threads, and the result
// depends on nothing but the query and the keys it sees.
//
// Legend: E width of a head, Q queries that share a K/V head.
#pragma once

#include "stream.h"
#include "vectors.h"

namespace kernels {

constexpr int kChunk = 128;        // keys
constexpr int kTile = 64;          // keys converted to float32 at once
constexpr int kQueries = 24;       // queries that share a tile
constexpr int kMostVectors = 4;    // 6 x 4 sums fill the registers
constexpr int kMostRows = 6;
constexpr int kWidest = 256;       // head

struct Heads {  // mirrors the ctypes structure in cpu_ops.py
  int32_t query, kv, width;
};

struct Slab {  // K or V of a layer: [slots, kv heads, length, E]; mirrors the ctypes structure in cpu_ops.py
  uint16_t* data;
  int64_t slot, head;  // strides, in elements
};

// A chunk's part of a query: the weighted sum of its values [E], the largest score, and the sum of the weights.
inline int partial_width(int width) { return width + kLanes; }

// One head, normed if it has a norm: half the width against the other half.
inline void rotate(float* head, int width, const float* cos, const float* sin, const float* norm, float epsilon) {
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

// out [rows][vectors] += a [rows][depth] * b [depth][vectors], each sum in the order of depth. Every step fetches two
// lines of the stream.
template <int rows, int vectors>
void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int depth, float* out,
                 int64_t out_stride, Stream& stream) {
  Span& span = stream.current();
  const char *next = span.next, *end = span.end;
  __m512 acc[rows][vectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] = _mm512_loadu_ps(out + r * out_stride + v * kLanes);
  for (int d = 0; d < depth; ++d, b += b_stride) {
    fetch(next);
    fetch(next + 64);
    next += next < end ? 128 : 0;
    __m512 wide[vectors];
    UNROLL for (int v = 0; v < vectors; ++v) wide[v] = _mm512_load_ps(b + v * kLanes);
    UNROLL for (int r = 0; r < rows; ++r) {
      const __m512 one = _mm512_set1_ps(a[r * a_stride + d]);
      UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] = _mm512_fmadd_ps(one, wide[v], acc[r][v]);
    }
  }
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(out + r * out_stride + v * kLanes, acc[r][v]);
  span.next = next;
}

template <int vectors>
void add_products(const float* a, int64_t a_stride, int rows, const float* b, int64_t b_stride, int depth, float* out,
                  int64_t out_stride, Stream& stream) {
  for (int r = 0; r < rows; r += kMostRows) {
    const float* from = a + r * a_stride;
    float* to = out + r * out_stride;
#define ROWS(n) \
  case n: add_product<n, vectors>(from, a_stride, b, b_stride, depth, to, out_stride, stream); break;
    switch (std::min(kMostRows, rows - r)) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
#undef ROWS
  }
}

// The same for any number of rows and of columns; `columns` is a multiple of kLanes.
inline void add_matrix_product(const float* a, int64_t a_stride, int rows, const float* b, int64_t b_stride, int depth,
                               float* out, int64_t out_stride, int columns, Stream& stream) {
  for (int c = 0; c < columns; c += kMostVectors * kLanes) {
    const float* from = b + c;
    float* to = out + c;
#define VECTORS(n) \
  case n: add_products<n>(a, a_stride, rows, from, b_stride, depth, to, out_stride, stream); break;
    switch (std::min(kMostVectors, (columns - c) / kLanes)) { VECTORS(1) VECTORS(2) VECTORS(3) VECTORS(4) }
#undef VECTORS
  }
}

// Rows to columns, of sixteen times sixteen.
inline void transpose(__m512i (&rows)[kLanes]) {
  __m512i a[kLanes], b[kLanes];
  UNROLL for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; ++i)
    UNROLL for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  // b[4 i + j] holds, in its quarters, column j, 4 + j, 8 + j, 12 + j of rows 4 i to 4 i + 3.
  UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    rows[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

// Keys [count, E] to float32 [E, kTile], zeros behind the last key of a vector.
template <int E>
void keys_to_columns(const uint16_t* keys, int count, float* tile) {
  constexpr int units = E / 2;  // pairs of bfloat16
  for (int k = 0; k < count; k += kLanes)
    for (int u = 0; u < units; u += kLanes) {
      __m512i pairs[kLanes];
      UNROLL for (int i = 0; i < kLanes; ++i)
        pairs[i] = _mm512_maskz_loadu_epi32(k + i < count ? some(units - u) : 0, keys + (k + i) * E + 2 * u);
      transpose(pairs);
      UNROLL for (int i = 0; i < kLanes; ++i)
        if (u + i < units) {
          _mm512_store_ps(tile + 2 * (u + i) * kTile + k, even(pairs[i]));
          _mm512_store_ps(tile + (2 * (u + i) + 1) * kTile + k, odd(pairs[i]));
        }
    }
}

// Scores, as logarithms to base 2, to weights relative to the largest; zeros from `seen` to `count`.
inline void weigh(float* row, int seen, int count, float* largest, float* total) {
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int k = 0; k < seen; k += kLanes) most = _mm512_mask_max_ps(most, some(seen - k), most, _mm512_load_ps(row + k));
  *largest = _mm512_reduce_max_ps(most);
  for (int k = 0; k < count; k += kLanes) {
    const __m512 below = _mm512_sub_ps(_mm512_load_ps(row + k), _mm512_set1_ps(*largest));
    const __m512 weight = _mm512_maskz_mov_ps(some(seen - k), power_of_two(below));
    _mm512_store_ps(row + k, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  *total = _mm512_reduce_add_ps(sum);
}

// One chunk, from key `first` on, of some queries [count, E], scaled to logarithms to base 2, that share a K/V head.
// `ends`: each sees the keys before its own. Their partials lie `stride` apart. `next_keys`: of the chunk after this.
template <int E>
void attend(const float* queries, int count, const int32_t* ends, const uint16_t* keys, const uint16_t* values,
            int first, float* partials, int64_t stride, Stream& stream, Span next_keys) {
  alignas(64) float tile[kTile * E];
  alignas(64) float scores[kQueries * kChunk] = {};
  const int here = std::min(kChunk, *std::max_element(ends, ends + count) - first);
  keys += int64_t(first) * E;
  values += int64_t(first) * E;
  stream.soon = Span(values, here * E * sizeof *values);
  for (int k = 0; k < here; k += kTile) {
    const int some_keys = std::min(kTile, here - k);
    keys_to_columns<E>(keys + k * E, some_keys, tile);
    add_matrix_product(queries, E, count, tile, kTile, E, scores + k, kChunk, up(some_keys, kLanes), stream);
  }
  stream.soon = next_keys;
  for (int q = 0; q < count; ++q) {
    float* partial = partials + q * stride;
    std::fill(partial, partial + E, 0.0f);
    weigh(scores + q * kChunk, std::min(kChunk, ends[q] - first), here, partial + E, partial + E + 1);
  }
  for (int k = 0; k < here; k += kTile) {
    const int some_keys = std::min(kTile, here - k);
    for (int i = 0; i < some_keys * E; i += kLanes) _mm512_store_ps(tile + i, from_bfloat16(values + k * E + i));
    add_matrix_product(scores + k, kChunk, count, tile, E, some_keys, partials, stride, E, stream);
  }
}

typedef void (*Attend)(const float*, int, const int32_t*, const uint16_t*, const uint16_t*, int, float*, int64_t,
                       Stream&, Span);

// Null for a width that has no kernel.
inline Attend attend_for(int width) {
#define WIDTH(e) \
  case e: return attend<e>;
  switch (width) { WIDTH(16) WIDTH(32) WIDTH(64) WIDTH(80) WIDTH(96) WIDTH(128) WIDTH(256) }
#undef WIDTH
  return nullptr;
}

// A query's chunks to its result [width].
inline void merge(const float* partials, int chunks, int width, float* out) {
  const int stride = partial_width(width);
  float most = -INFINITY;
  for (int c = 0; c < chunks; ++c) most = std::max(most, partials[c * stride + width]);
  std::fill(out, out + width, 0.0f);
  __m512 total = _mm512_setzero_ps();
  for (int c = 0; c < chunks; ++c, partials += stride) {
    const __m512 weight = power_of_two(_mm512_set1_ps(partials[width] - most));
    total = _mm512_fmadd_ps(weight, _mm512_set1_ps(partials[width + 1]), total);
    for (int i = 0; i < width; i += kLanes)
      _mm512_storeu_ps(out + i, _mm512_fmadd_ps(weight, _mm512_loadu_ps(partials + i), _mm512_loadu_ps(out + i)));
  }
  for (int i = 0; i < width; i += kLanes) _mm512_storeu_ps(out + i, _mm512_div_ps(_mm512_loadu_ps(out + i), total));
}

}  // namespace kernels
