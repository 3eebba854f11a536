// Products of bytes, four to a lane: on one side vectors of units, on the other single units, which go to all lanes.
#pragma once

#include <algorithm>
#include <cstring>

#include "vectors.h"

namespace kernels {

#ifdef HAS_BYTE_PRODUCTS

constexpr int kUnitInts = 1;  // int32 of a single unit: its bytes

// The bytes of a vector's lanes as single units; `count` of them are to be written.
inline void store_units(int32_t* to, Ints values, int count = kLanes) {
  alignas(kLanes) int8_t bytes[kLanes];
  store_bytes(count < kLanes ? bytes : static_cast<void*>(to), values);
  if (count < kLanes) std::memcpy(to, bytes, count);
}

// Adds to the sums of every row its unit times each vector. The vectors are signed and the units are not, or the other
// way around.
template <bool signed_vectors, int rows, int vectors>
INLINED void add_products(Ints (&sums)[rows][vectors], const Ints (&units)[vectors], const int32_t* row, int64_t stride) {
  UNROLL for (int r = 0; r < rows; ++r) {
    const Ints unit = ints(row[r * stride]);
    UNROLL for (int v = 0; v < vectors; ++v)
      sums[r][v] = signed_vectors ? add_byte_products(sums[r][v], unit, units[v])
                                  : add_byte_products(sums[r][v], units[v], unit);
  }
}

#else  // as pairs of int16: the product of bytes that older CPUs have sums two of them in 16 bits, which overflow

constexpr int kUnitInts = 2;  // its even, and its odd bytes

inline void store_units(int32_t* to, Ints values, int count = kLanes) {
  constexpr int order = 0xd8;  // 0, 2, 1, 3
  const __m256i pairs = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(to_int16(values), order), order);
  alignas(32) int32_t units[kLanes / 4 * kUnitInts];
  _mm256_store_si256(reinterpret_cast<__m256i*>(units), pairs);
  std::memcpy(to, units, count < kLanes ? (count + 3) / 4 * sizeof(int32_t) * kUnitInts : sizeof units);
}

template <bool signed_vectors, int rows, int vectors>
INLINED void add_products(Ints (&sums)[rows][vectors], const Ints (&units)[vectors], const int32_t* row, int64_t stride) {
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) {
      sums[r][v] = add(sums[r][v], multiply_pairs(even_bytes<signed_vectors>(units[v]), ints(row[r * stride])));
      settle(sums[r][v]);
    }
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v)
      sums[r][v] = add(sums[r][v], multiply_pairs(odd_bytes<signed_vectors>(units[v]), ints(row[r * stride + 1])));
}

#endif

}  // namespace kernels
