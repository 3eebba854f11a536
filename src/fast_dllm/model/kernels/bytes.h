// Products of bytes, four to a lane: on one side vectors of units, on the other single units, which go to all lanes.
#pragma once

#include <cstring>

#include "vectors.h"

namespace kernels {

// How far some of the single side go, of what a byte holds. Without an instruction for it, two neighbouring products are
// summed in 16 bits, which must not overflow: so two neighbours share the range of one. That is as exact, but steps are
// coarser where two large ones meet.
inline Floats reach(Floats magnitudes) {
  return kByteProducts ? magnitudes : magnitudes + swap_neighbours(magnitudes);
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

// The low bytes of a vector's lanes as single units; `count` of them are to be written.
inline void store_units(int32_t* to, Ints values, int count = kLanes) {
  alignas(kLanes) int8_t bytes[kLanes];
  store_bytes(count < kLanes ? bytes : static_cast<void*>(to), values);
  if (count < kLanes) std::memcpy(to, bytes, count);
}

}  // namespace kernels
