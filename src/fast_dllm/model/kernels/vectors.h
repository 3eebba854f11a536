// Vectors of sixteen float32, and what the kernels compute with them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Loops over arrays that are to stay in registers.
#define UNROLL _Pragma("GCC unroll 32")

namespace kernels {

constexpr int kLanes = 16;    // of a vector
constexpr int kWidest = 256;  // head

template <class Count>
inline Count up(Count count, Count multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// The first `count` lanes: none, or all, where that is out of range.
inline __mmask16 some(int count) { return count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
inline __m512 load_some(const float* from, int count) { return _mm512_maskz_loadu_ps(some(count), from); }

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
inline __m512 from_bfloat16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// Of pairs of bfloat16, the ones in the lower and in the upper halves.
inline __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

constexpr float kLog2e = 1.44269504f;

// 2^x for x <= 0, to 2e-7 relative (8e-31 for all below -100): 2^n times a polynomial on [-1/2, 1/2]. Not less, since
// what is multiplied with it should stay a normal number: each vector with one that is not costs a hundred cycles.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-100.0f));
  const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.327647198e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.675541334e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550713274e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402211972e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469671e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// The Walsh-Hadamard transform, a rotation, of as many neighbours as the largest power of two in `count` holds, and so on:
// what a few of them have in excess is shared by all. `count` is a multiple of kLanes.
inline void hadamard(float* values, int count) {
  const int size = count & -count;
  const auto butterfly = [](__m512 x, __m512 other, __mmask16 upper) {
    return _mm512_mask_sub_ps(_mm512_add_ps(other, x), upper, other, x);
  };
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(float(size)));
  for (int i = 0; i < count; i += kLanes) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(values + i), scale);
    x = butterfly(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
    x = butterfly(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
    x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
    x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
    _mm512_storeu_ps(values + i, x);
  }
  for (int half = kLanes; half < size; half *= 2)
    for (int i = 0; i < count; i += kLanes) {
      if (i & half) continue;
      const __m512 a = _mm512_loadu_ps(values + i), b = _mm512_loadu_ps(values + i + half);
      _mm512_storeu_ps(values + i, _mm512_add_ps(a, b));
      _mm512_storeu_ps(values + i + half, _mm512_sub_ps(a, b));
    }
}

// x * sigmoid(x), through a power that is not above 1, so that nothing overflows.
inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = power_of_two(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-kLog2e)));
  const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_div_ps(_mm512_mask_mov_ps(e, positive, one), _mm512_add_ps(one, e)));
}

}  // namespace kernels
