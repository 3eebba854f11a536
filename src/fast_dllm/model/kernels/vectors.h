// What the kernels compute with vectors of sixteen float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

// Loops over arrays that are to stay in registers.
#define UNROLL _Pragma("GCC unroll 32")
// What works on such arrays: a call would write them to memory.
#define INLINED [[gnu::always_inline]] inline

namespace kernels {

constexpr int kLanes = 16;    // of a vector
constexpr int kWidest = 256;  // head

template <class Count>
inline Count up(Count count, Count multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

constexpr float kLog2e = 1.44269504f;

// 2^x for x <= 0, to 2e-7 relative (8e-31 for all below -100): 2^n times a polynomial on [-1/2, 1/2]. Not less, since
// what is multiplied with it should stay a normal number: each vector with one that is not costs a hundred cycles.
inline Floats power_of_two(Floats x) {
  x = max(x, floats(-100.0f));
  const Floats n = nearest(x), r = x - n;
  Floats p = floats(1.327647198e-3f);
  p = fmadd(p, r, floats(9.675541334e-3f));
  p = fmadd(p, r, floats(5.550713274e-2f));
  p = fmadd(p, r, floats(2.402211972e-1f));
  p = fmadd(p, r, floats(6.931469671e-1f));
  p = fmadd(p, r, floats(1.0f));
  return times_power_of_two(p, n);
}

// The Walsh-Hadamard transform, a rotation, of as many neighbours as the largest power of two in `count` holds, and so on:
// what a few of them have in excess is shared by all. `count` is a multiple of kLanes.
inline void hadamard(float* values, int count) {
  const int size = count & -count;
  const Floats scale = floats(1.0f / std::sqrt(float(size)));
  for (int i = 0; i < count; i += kLanes)
    store(values + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(values + i) * scale)))));
  for (int half = kLanes; half < size; half *= 2)
    for (int i = 0; i < count; i += kLanes) {
      if (i & half) continue;
      const Floats a = load(values + i), b = load(values + i + half);
      store(values + i, a + b);
      store(values + i + half, a - b);
    }
}

// x * sigmoid(x), through a power that is not above 1, so that nothing overflows.
inline Floats silu(Floats x) {
  const Floats one = floats(1.0f), e = power_of_two(magnitude(x) * floats(-kLog2e));
  return x * (choose(greater(x, floats(0)), one, e) / (one + e));
}

}  // namespace kernels
