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
  const Floats none = floats(-INFINITY);
  const Ints never = ints(banned);
  Floats best = none, most = none;
  Ints tokens = ints(first);
  for (int i = first; i < end; i += kLanes) {
    const Floats x = load_some(logits + i, end - i, none);
    const Ints here = add(numbers(), ints(i));
    const Mask better = greater(x, best) & differ(here, never);
    best = choose(better, x, best);
    tokens = choose(better, here, tokens);
    most = max(x, most);
  }
  Likely likely;
  likely.logit = max_of(best);
  likely.token = min_of(choose(equal(best, floats(likely.logit)), tokens, ints(INT32_MAX)));
  likely.largest = std::max(max_of(most), -FLT_MAX);  // from -inf nothing can be subtracted
  const Floats top = floats(likely.largest), log2e = floats(kLog2e);
  Floats sum = floats(0);
  for (int i = first; i < end; i += kLanes) {
    const Floats power = power_of_two((load_some(logits + i, end - i) - top) * log2e);
    sum = choose(first_lanes(end - i), sum + power, sum);
  }
  likely.sum = sum_of(sum);
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
