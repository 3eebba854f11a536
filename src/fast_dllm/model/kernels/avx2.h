// Sixteen lanes in two registers of AVX2, by the names of avx512.h, which says what they do.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace kernels {

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Mask {
  __m256i low, high;
};

constexpr int kSums = 6;

inline Floats floats(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Ints ints(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Ints numbers() {
  return {_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)};
}

inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }

inline Mask first_lanes(int count) {
  const Ints lanes = numbers();
  const __m256i end = _mm256_set1_epi32(count);
  return {_mm256_cmpgt_epi32(end, lanes.low), _mm256_cmpgt_epi32(end, lanes.high)};
}
inline __m256 choose(__m256i which, __m256 yes, __m256 no) {
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(which));
}
inline Floats choose(Mask which, Floats yes, Floats no) {
  return {choose(which.low, yes.low, no.low), choose(which.high, yes.high, no.high)};
}
inline Ints choose(Mask which, Ints yes, Ints no) {
  return {_mm256_blendv_epi8(no.low, yes.low, which.low), _mm256_blendv_epi8(no.high, yes.high, which.high)};
}
inline Mask operator&(Mask a, Mask b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Mask greater(Floats a, Floats b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ)),
          _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ))};
}
inline Mask equal(Floats a, Floats b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ)),
          _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ))};
}
inline Mask differ(Ints a, Ints b) {
  const __m256i all = _mm256_set1_epi32(-1);
  return {_mm256_xor_si256(_mm256_cmpeq_epi32(a.low, b.low), all),
          _mm256_xor_si256(_mm256_cmpeq_epi32(a.high, b.high), all)};
}

inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load_some(const float* from, int count, Floats others = floats(0)) {
  if (count >= 16) return load(from);
  const Mask which = first_lanes(count);
  return choose(which, {_mm256_maskload_ps(from, which.low), _mm256_maskload_ps(from + 8, which.high)}, others);
}
inline Ints load_units(const void* from) {
  const auto* halves = static_cast<const __m256i*>(from);
  return {_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
}
inline void store(float* to, Floats values) {
  _mm256_storeu_ps(to, values.low);
  _mm256_storeu_ps(to + 8, values.high);
}
inline void store_some(float* to, Floats values, int count) {
  if (count >= 16) return store(to, values);
  const Mask which = first_lanes(count);
  _mm256_maskstore_ps(to, which.low, values.low);
  _mm256_maskstore_ps(to + 8, which.high, values.high);
}
inline void store_bytes(void* to, Ints values) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  const __m256i low = _mm256_and_si256(values.low, byte), high = _mm256_and_si256(values.high, byte);
  // Packing works on halves of a register.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(static_cast<__m128i*>(to), bytes);
}

inline Floats fmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fmsub(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats magnitude(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats nearest(Floats x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, how), _mm256_round_ps(x.high, how)};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints rounded(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
// By the bits of the exponent: only where x and the result are normal numbers.
inline __m256 times_power_of_two(__m256 x, __m256 exponent) {
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(exponent), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), bits));
}
inline Floats times_power_of_two(Floats x, Floats exponent) {
  return {times_power_of_two(x.low, exponent.low), times_power_of_two(x.high, exponent.high)};
}

// Halves are put together in the order of AVX-512's reductions.
inline float max_of(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return std::max(two[0], two[1]);
}
inline float sum_of(Floats x) {
  const __m256 eight = x.low + x.high;
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}
inline int32_t sum_of(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_extract_epi32(two, 0) + _mm_extract_epi32(two, 1);
}
inline int32_t min_of(Ints x) {
  const __m256i eight = _mm256_min_epi32(x.low, x.high);
  const __m128i four = _mm_min_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_min_epi32(four, _mm_unpackhi_epi64(four, four));
  return std::min(_mm_extract_epi32(two, 0), _mm_extract_epi32(two, 1));
}

inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
}
inline Floats even(Ints pairs) { return {even(pairs.low), even(pairs.high)}; }
inline Floats odd(Ints pairs) { return {odd(pairs.low), odd(pairs.high)}; }
inline Floats from_bfloat16(const uint16_t* from) {
  const auto* eight = reinterpret_cast<const __m128i*>(from);
  return even(Ints{_mm256_cvtepu16_epi32(_mm_loadu_si128(eight)), _mm256_cvtepu16_epi32(_mm_loadu_si128(eight + 1))});
}

inline __m256 swap_neighbours(__m256 x) { return _mm256_permute_ps(x, 0xb1); }
inline Floats swap_neighbours(Floats x) { return {swap_neighbours(x.low), swap_neighbours(x.high)}; }

template <int distance>
__m256 butterfly(__m256 x) {
  const __m256 other = distance == 1   ? swap_neighbours(x)
                       : distance == 2 ? _mm256_permute_ps(x, 0x4e)
                                       : _mm256_permute2f128_ps(x, x, 1);
  constexpr int upper = distance == 1 ? 0xaa : distance == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(other + x, other - x, upper);
}
template <int distance>
Floats butterfly(Floats x) {
  if (distance == 8) return {x.high + x.low, x.low - x.high};
  return {butterfly<distance>(x.low), butterfly<distance>(x.high)};
}

#ifdef __AVXVNNI__
constexpr bool kByteProducts = true;
#else
constexpr bool kByteProducts = false;
#endif
inline __m256i add_byte_products(__m256i sum, __m256i bytes, __m256i signed_bytes) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(sum, bytes, signed_bytes);
#else
  const __m256i pairs = _mm256_maddubs_epi16(bytes, signed_bytes);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
inline Ints add_byte_products(Ints sum, Ints bytes, Ints signed_bytes) {
  return {add_byte_products(sum.low, bytes.low, signed_bytes.low),
          add_byte_products(sum.high, bytes.high, signed_bytes.high)};
}

}  // namespace kernels
