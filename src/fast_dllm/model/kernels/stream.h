// Memory that will be read soon, fetched into the second-level cache while something else is computed.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kernels {

struct Span {
  const char *next = nullptr, *end = nullptr;

  Span() = default;
  Span(const void* from, int64_t bytes) : next(static_cast<const char*>(from)), end(next + bytes) {}
  bool empty() const { return next >= end; }
};

struct Stream {
  Span soon;            // goes first
  Span after, at_last;  // in turn

  Span& current() { return !soon.empty() ? soon : !after.empty() ? after : at_last; }
};

inline void fetch(const char* line) { _mm_prefetch(line, _MM_HINT_T1); }

}  // namespace kernels
