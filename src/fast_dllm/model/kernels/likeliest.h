// The likeliest token of a position's logits, and its probability.
#pragma once

#include <cfloat>

#include "buffer.h"
#include "vectors.h"

namespace kernels {

constexpr int kTogether = 2048;  // logits whose exponentials are summed together, whichever thread does it

// What some logits of a position come to.
struct Likely {
  float logit;     // of the likeliest token that may be chosen
  int32_t token;
  float largest;   // logit of all
  float sum;       // of exp(logit - largest), over all

  // Takes in what follows.
  void add(const Likely& next) {
    if (next.logit > logit) logit = next.logit, token = next.token;
    const float most = std::max(largest, next.largest);
    sum = sum * std::exp(largest - most) + next.sum * std::exp(next.largest - most);
    largest = most;
  }
  float probability() const { return std::exp(logit - largest) / sum; }
};

// Logits [first, end) of a position; the token `banned` is never chosen, but keeps its share of the probability.
inline Likely likely_among(const float* logits, int first, int end, int banned) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i never = _mm512_set1_epi32(banned);
  __m512 best = none, largest = none;
  __m512i tokens = _mm512_set1_epi32(first);
  for (int i = first; i < end; i += kLanes) {
    const __m512 x = _mm512_mask_loadu_ps(none, some(end - i), logits + i);
    const __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
    const __mmask16 better = _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ) & _mm512_cmpneq_epi32_mask(numbers, never);
    best = _mm512_mask_mov_ps(best, better, x);
    tokens = _mm512_mask_mov_epi32(tokens, better, numbers);
    largest = _mm512_max_ps(x, largest);
  }
  Likely likely;
  likely.logit = _mm512_reduce_max_ps(best);
  const __mmask16 ties = _mm512_cmp_ps_mask(best, _mm512_set1_ps(likely.logit), _CMP_EQ_OQ);
  likely.token = _mm512_mask_reduce_min_epi32(ties, tokens);
  likely.largest = std::max(_mm512_reduce_max_ps(largest), -FLT_MAX);  // from -inf nothing can be subtracted
  const __m512 top = _mm512_set1_ps(likely.largest);
  __m512 sum = _mm512_setzero_ps();
  for (int i = first; i < end; i += kLanes) {
    const __mmask16 valid = some(end - i);
    const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, logits + i), top);
    sum = _mm512_mask_add_ps(sum, valid, sum, power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e))));
  }
  likely.sum = _mm512_reduce_add_ps(sum);
  return likely;
}

// See `fast_dllm_likeliest`.
inline void find_likeliest(const float* logits, int count, int vocabulary, int banned, int64_t* tokens,
                           float* probabilities, int threads) {
  thread_local Buffer<Likely> buffer;
  const int parts = (vocabulary + kTogether - 1) / kTogether;
  Likely* found = buffer.grow(int64_t(count) * parts);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int i = 0; i < count * parts; ++i) {
    const int row = i / parts, first = i % parts * kTogether;
    found[i] = likely_among(logits + int64_t(row) * vocabulary, first, std::min(first + kTogether, vocabulary), banned);
  }
  for (int r = 0; r < count; ++r) {
    Likely all = found[r * parts];
    for (int p = 1; p < parts; ++p) all.add(found[r * parts + p]);
    tokens[r] = all.token;
    probabilities[r] = all.probability();
  }
}

}  // namespace kernels
