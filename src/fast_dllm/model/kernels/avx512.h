// Sixteen lanes in one register of AVX-512. avx2.h has the same names for older CPUs.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace kernels {

typedef __m512 Floats;  // sixteen float32
typedef __m512i Ints;   // sixteen int32, or units of 4 bytes
typedef __mmask16 Mask;

constexpr int kSums = 32;  // vectors that are best summed in registers together, though a few may be in memory

inline Floats floats(float value) { return _mm512_set1_ps(value); }
inline Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

// The first `count` lanes: none, or all, where that is out of range.
inline Mask first_lanes(int count) { return _bzhi_u32(0xffff, std::clamp(count, 0, 16)); }

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_some(const float* from, int count, Floats others = floats(0)) {
  return _mm512_mask_loadu_ps(others, first_lanes(count), from);
}
inline Ints load_units(const void* from) { return _mm512_load_si512(from); }
inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline void store_some(float* to, Floats values, int count) { _mm512_mask_storeu_ps(to, first_lanes(count), values); }
// The low byte of each lane.
inline void store_bytes(void* to, Ints values) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(values));
}

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fmsub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
inline Floats times_power_of_two(Floats x, Floats exponent) { return _mm512_scalef_ps(x, exponent); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints rounded(Floats x) { return _mm512_cvtps_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

inline Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask differ(Ints a, Ints b) { return _mm512_cmpneq_epi32_mask(a, b); }
inline Floats choose(Mask which, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, which, yes); }
inline Ints choose(Mask which, Ints yes, Ints no) { return _mm512_mask_mov_epi32(no, which, yes); }

inline float max_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline int32_t min_of(Ints x) { return _mm512_reduce_min_epi32(x); }
inline int32_t sum_of(Ints x) { return _mm512_reduce_add_epi32(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }

// Of pairs of bfloat16, the ones in the lower and in the upper halves.
inline Floats even(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Floats odd(Ints pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, ints(int32_t(0xffff0000)))); }
inline Floats from_bfloat16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline Floats swap_neighbours(Floats x) { return _mm512_permute_ps(x, 0xb1); }

// Lanes `distance` apart, the lower to their sum, and the upper to their difference.
template <int distance>
Floats butterfly(Floats x) {
  const Floats other = distance == 1   ? swap_neighbours(x)
                       : distance == 2 ? _mm512_permute_ps(x, 0x4e)
                       : distance == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1)
                                       : _mm512_shuffle_f32x4(x, x, 0x4e);
  constexpr Mask upper = distance == 1 ? 0xaaaa : distance == 2 ? 0xcccc : distance == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_sub_ps(_mm512_add_ps(other, x), upper, other, x);
}

// Each lane's sum, and four products of an unsigned and a signed byte. Without an instruction for it, no two neighbouring
// products may come to more than 16 bits.
#ifdef __AVX512VNNI__
constexpr bool kByteProducts = true;
#else
constexpr bool kByteProducts = false;
#endif
inline Ints add_byte_products(Ints sum, Ints bytes, Ints signed_bytes) {
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(sum, bytes, signed_bytes);
#else
  return add(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, signed_bytes), _mm512_set1_epi16(1)));
#endif
}

}  // namespace kernels
