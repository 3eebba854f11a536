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
  int lines() const { return (end - next + 63) / 64; }
};

struct Stream {
  Span soon;            // goes first
  Span after, at_last;  // in turn
  // Lines to fetch with every step of a loop, and those that are due, in parts of kWhole. Faster than they arrive,
  // fetches would keep other loads waiting.
  int pace = 0, due = 0;
  static constexpr int kWhole = 64;

  Span& current() { return !soon.empty() ? soon : !after.empty() ? after : at_last; }
};

inline void fetch(const char* line) { _mm_prefetch(line, _MM_HINT_T1); }

// Keeps the pace of a stream in a loop.
class Fetcher {
 public:
  explicit Fetcher(Stream& stream)
      : stream_(stream), span_(stream.current()), next_(span_.next), end_(span_.end), due_(stream.due) {}
  ~Fetcher() {
    span_.next = next_;
    stream_.due = due_;
  }
  void step() {
    for (due_ += stream_.pace; due_ >= Stream::kWhole; due_ -= Stream::kWhole) {
      fetch(next_);
      next_ += next_ < end_ ? 64 : 0;
    }
  }

 private:
  Stream& stream_;
  Span& span_;
  const char *next_, *end_;
  int due_;
};

}  // namespace kernels
