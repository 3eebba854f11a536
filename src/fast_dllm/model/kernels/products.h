// Products of small float32 matrices whose sums stay in registers.
#pragma once

#include "vectors.h"

namespace kernels {

// Vectors of a row, and rows, whose sums are in registers together. Few vectors need more rows: a sum has to wait for
// the one before it, so there are to be others meanwhile.
constexpr int kMostVectors = kSums < 24 ? 1 : 6;
constexpr int rows_beside(int vectors) { return kSums < 24 || vectors > 3 ? 4 : 8; }

// to[r] (+)= sum over k < depth of left(r, k) * right[k], `vectors` vectors of each, for `rows` rows from `first` on.
// left(r, k) is left[k][r] if `across`, else left[r][k].
template <bool across, bool add, int rows, int vectors>
void product_tile(const float* const* left, int first, int depth, const float* right, int64_t stride, float* const* to,
                   int at) {
  Floats acc[rows][vectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v)
      acc[r][v] = add ? load(to[first + r] + at + v * kLanes) : floats(0);
  const float* row[rows];
  UNROLL for (int r = 0; r < rows; ++r) row[r] = across ? nullptr : left[first + r];
  for (int k = 0; k < depth; ++k, right += stride) {
    Floats values[vectors];
    UNROLL for (int v = 0; v < vectors; ++v) values[v] = load(right + at + v * kLanes);
    UNROLL for (int r = 0; r < rows; ++r) {
      const Floats by = floats(across ? left[k][first + r] : row[r][k]);
      UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] = fmadd(by, values[v], acc[r][v]);
    }
  }
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) store(to[first + r] + at + v * kLanes, acc[r][v]);
}

template <bool across, bool add, int vectors>
void product_strip(const float* const* left, int rows, int depth, const float* right, int64_t stride,
                    float* const* to, int at) {
  constexpr int together = rows_beside(vectors);
  int r = 0;
  for (; r + together <= rows; r += together)
    product_tile<across, add, together, vectors>(left, r, depth, right, stride, to, at);
  for (; r < rows; ++r) product_tile<across, add, 1, vectors>(left, r, depth, right, stride, to, at);
}

// to [rows][width] (+)= left [rows][depth] * right [depth][width]; `width` is a multiple of kLanes, and rows of `right`
// are `stride` apart. Pointers are to the rows of `left`, or to its columns if `across`, and to the rows of `to`.
template <bool across, bool add>
void product(const float* const* left, int rows, int depth, const float* right, int64_t stride, float* const* to,
              int width) {
  for (int at = 0; at < width;) {
    const int vectors = std::min((width - at) / kLanes, kMostVectors);
#define STRIP(n) \
  case n: \
    if constexpr (n <= kMostVectors) product_strip<across, add, n>(left, rows, depth, right, stride, to, at); \
    break;
    switch (vectors) { STRIP(1) STRIP(2) STRIP(3) STRIP(4) STRIP(5) STRIP(6) }
#undef STRIP
    at += vectors * kLanes;
  }
}

}  // namespace kernels
