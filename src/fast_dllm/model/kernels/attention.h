// RoPE, and attention over the cache.
//
// Keys are cut into chunks at multiples of kChunk, and chunks gathered to stretches, at places that depend on nothing.
// Each stretch of a query is done on its own, by whichever thread, and `merge` puts a query's stretches together in
// their order: so long contexts are shared between threads, and the result depends on nothing but the query and the
// keys it sees.
//
// Legend: E width of a head.
#pragma once

#include "cached.h"
#include "linear.h"
#include "stream.h"
#include "vectors.h"

namespace kernels {

constexpr int kQueries = 48;                    // queries that share a stretch
constexpr int kMostRows = std::min(kSums, 12);  // queries that share a loaded key
constexpr int kShort = 1024, kStretch = 512;    // keys before which a stretch is a chunk; keys of a stretch behind them

// Blocks of keys, or vectors of values, that share a loaded query or weight: their sums fill the registers.
constexpr int vectors_for(int rows) { return std::min(kSums, 24) / (rows > kMostRows / 2 ? kMostRows : kMostRows / 2); }

inline int stretch_of(int key) { return key < kShort ? key / kChunk : kShort / kChunk + (key - kShort) / kStretch; }
inline int stretch_start(int stretch) {
  const int behind = stretch - kShort / kChunk;
  return behind < 0 ? stretch * kChunk : kShort + behind * kStretch;
}
inline int stretches_of(int keys) { return stretch_of(keys - 1) + 1; }

// What a query has of some keys: the weighted sum of their values [E], the sums of the weights by lane, and the largest
// score, or -INFINITY for no keys.
inline int partial_width(int width) { return width + 2 * kLanes; }
inline float* largest_in(float* partial, int width) { return partial + width + kLanes; }

// Queries that share a K/V head. Their partials lie `stride` apart.
template <class Cache>
struct Queries {
  Operand<typename Cache::Kind> operand;  // of all queries; products with keys are logarithms to base 2
  int first, count;
  const int32_t* ends;  // [count]; each sees the keys before its own
  float* partials;
  int64_t stride;

  Queries some(int from, int end) const {
    return {operand, first + from, end - from, ends + from, partials + from * stride, stride};
  }
};

// The keys [first, end) of a head; `first` is a multiple of kBlock.
template <class Cache>
struct Keys {
  const char* head;
  int width, first, end;

  int64_t block_bytes() const { return Cache::block_bytes(width); }
  int blocks() const { return (end - first + kBlock - 1) / kBlock; }
  const char* block(int number) const { return head + (first / kBlock + number) * block_bytes(); }
  Span span() const { return Span(block(0), blocks() * block_bytes()); }
};

// One head, normed if it has a norm: half the width against the other half.
inline void rotate(float* head, int width, const float* cos, const float* sin, const float* norm, float epsilon) {
  if (norm) {
    float total = 0;
    for (int i = 0; i < width; ++i) total += head[i] * head[i];
    const float scale = 1.0f / std::sqrt(total / width + epsilon);
    for (int i = 0; i < width; ++i) head[i] *= scale * norm[i];
  }
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

// Scores [rows][kChunk], but for the queries' scales, of the keys of `vectors` blocks.
template <class Cache, int rows, int vectors>
void score(const Queries<Cache>& queries, const Keys<Cache>& keys, int first_block, float* scores, Stream& stream) {
  typedef typename Cache::Kind Kind;
  const auto& operand = queries.operand;
  const int64_t bytes = keys.block_bytes();
  const char* block = keys.block(first_block);
  typename Kind::Sum acc[rows][vectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] = Kind::start(operand.undo[queries.first + r]);
  const auto* in = operand.values + queries.first * operand.stride;
  Fetcher fetcher(stream);
  for (int u = 0; u < units_of<Kind>(keys.width); ++u, in += Kind::kInputsPerUnit) {
    fetcher.step();
    Ints units[vectors];
    UNROLL for (int v = 0; v < vectors; ++v) units[v] = load_units(block + v * bytes + u * sizeof(Ints));
    Kind::step(acc, units, in, operand.stride);
  }
  typename Kind::Sum sums[rows][vectors];  // a copy: see linear.h
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) sums[r][v] = acc[r][v];
  for (int v = 0; v < vectors; ++v) {
    const Floats by = Cache::key_scales(block + v * bytes, keys.width);
    for (int r = 0; r < rows; ++r)
      store(scores + r * kChunk + (first_block + v) * kBlock, Kind::result(sums[r][v]) * by);
  }
}

// Scores [rows][kChunk] to weights relative to the largest, times the scales of the values; and what goes with them into
// the partials. Row by row, a loop would wait for the end of the one before it: so each is done for all rows.
template <class Cache, int rows>
void weigh(const float* query_scales, const Keys<Cache>& keys, float* scores, float (&steps)[rows],
           float (&partials)[rows][kWidest + 2 * kLanes], Stream& stream) {
  const int width = keys.width, count = keys.blocks() * kBlock;
  alignas(64) float value_scales[kChunk];
  for (int b = 0; b < keys.blocks(); ++b)
    store(value_scales + b * kBlock, Cache::value_scales(keys.block(b), width));
  float largest[rows];
  for (int r = 0; r < rows; ++r) {
    Floats most = load(scores + r * kChunk);
    for (int k = kLanes; k < count; k += kLanes) most = max(most, load(scores + r * kChunk + k));
    largest[r] = max_of(most) * query_scales[r];
    *largest_in(partials[r], width) = largest[r];
  }
  Fetcher fetcher(stream);
  Floats mosts[rows];
  for (int r = 0; r < rows; ++r) {
    const Floats scale = floats(query_scales[r]), top = floats(largest[r]);
    Floats sum = floats(0), most = floats(0);
    for (int k = 0; k < count; k += kLanes) {
      fetcher.step();
      float* at = scores + r * kChunk + k;
      const Floats weight = power_of_two(fmsub(load(at), scale, top));
      sum = sum + weight;
      const Floats scaled = weight * load(value_scales + k);
      most = max(most, Cache::reach_of(scaled));
      store(at, scaled);
    }
    store(partials[r] + width, sum);
    mosts[r] = most;
  }
  for (int r = 0; r < rows; ++r) steps[r] = Cache::step_of(max_of(mosts[r]));
}

// The sums of some elements of the values, `vectors` vectors from `first` on, by their weights [rows][kChunk floats].
template <class Cache, int rows, int vectors>
void add_values(const typename Cache::Weight* weights, const float* steps, const Keys<Cache>& keys, int first,
                float (&partials)[rows][kWidest + 2 * kLanes], Stream& stream) {
  typedef typename Cache::Kind Kind;
  constexpr int64_t weights_stride = kChunk * sizeof(float) / sizeof *weights;
  typename Kind::Sum acc[rows][vectors];
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] = Kind::start(0);
  Fetcher fetcher(stream);
  for (int b = 0; b < keys.blocks(); ++b) {
    const char* unit = keys.block(b) + Cache::values_at(keys.width) + first * 4;
    for (int u = 0; u < kBlock / Kind::kPerUnit; ++u, unit += keys.width * 4, weights += Kind::kInputsPerUnit) {
      fetcher.step();
      Ints values[vectors];
      UNROLL for (int v = 0; v < vectors; ++v) values[v] = load_units(unit + v * sizeof(Ints));
      Cache::step(acc, values, weights, weights_stride);
    }
  }
  typename Kind::Sum total[rows][vectors];  // a copy: see linear.h
  UNROLL for (int r = 0; r < rows; ++r)
    UNROLL for (int v = 0; v < vectors; ++v) total[r][v] = acc[r][v];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v)
      store(partials[r] + first + v * kLanes, Kind::result(total[r][v]) * floats(steps[r]));
}

// Adds what a query has of further keys to what it has.
inline void fold(float* more, int width, float* partial) {
  const float above = *largest_in(more, width) - *largest_in(partial, width);
  if (above == INFINITY) {
    std::copy_n(more, partial_width(width), partial);
    return;
  }
  const Floats less = power_of_two(floats(-std::abs(above))), one = floats(1.0f);
  const Floats old = above > 0 ? less : one, fresh = above > 0 ? one : less;
  for (int i = 0; i < width + kLanes; i += kLanes)
    store(partial + i, fmadd(fresh, load(more + i), old * load(partial + i)));
  *largest_in(partial, width) = std::max(*largest_in(partial, width), *largest_in(more, width));
}

// Some queries over a chunk.
template <class Cache, int rows>
void attend_chunk(const Queries<Cache>& queries, const Keys<Cache>& keys, Stream& stream) {
  constexpr int vectors = vectors_for(rows);
  alignas(64) float scores[rows * kChunk], partials[rows][kWidest + 2 * kLanes];
  float steps[rows];
  const int blocks = keys.blocks(), count = blocks * kBlock;
  int b = 0;
  for (; b + vectors <= blocks; b += vectors) score<Cache, rows, vectors>(queries, keys, b, scores, stream);
  for (; b < blocks; ++b) score<Cache, rows, 1>(queries, keys, b, scores, stream);
  const auto hide = [&](float as) {
    for (int r = 0; r < rows; ++r)
      for (int k = std::max(0, queries.ends[r] - keys.first); k < count; ++k) scores[r * kChunk + k] = as;
  };
  hide(-INFINITY);
  weigh<Cache, rows>(queries.operand.scales + queries.first, keys, scores, steps, partials, stream);
  hide(0);
  const auto* weights = Cache::convert(scores, rows, count, steps);
  int i = 0;
  for (; i + vectors * kLanes <= keys.width; i += vectors * kLanes)
    add_values<Cache, rows, vectors>(weights, steps, keys, i, partials, stream);
  for (; i < keys.width; i += kLanes) add_values<Cache, rows, 1>(weights, steps, keys, i, partials, stream);
  for (int r = 0; r < rows; ++r)
    if (queries.ends[r] > keys.first) fold(partials[r], keys.width, queries.partials + r * queries.stride);
}

// How often attend_chunk asks the stream.
template <class Cache>
int steps_of(const Keys<Cache>& keys, int rows) {
  const int vectors = vectors_for(rows), blocks = keys.blocks();
  const int of_scores = (blocks + vectors - 1) / vectors * units_of<typename Cache::Kind>(keys.width);
  const int of_values = blocks * (kBlock / Cache::Kind::kPerUnit) * ((keys.width / kLanes + vectors - 1) / vectors);
  return of_scores + rows * blocks + of_values;
}

// Some queries over a stretch. `next`: what is attended to after this.
template <class Cache>
void attend(const Queries<Cache>& queries, const Keys<Cache>& keys, Stream& stream, Span next) {
  for (int q = 0; q < queries.count; ++q)
    *largest_in(queries.partials + q * queries.stride, keys.width) = -INFINITY;
  const int passes = (queries.count + kMostRows - 1) / kMostRows;
  for (int first = keys.first; first < keys.end; first += kChunk) {
    const Keys<Cache> chunk{keys.head, keys.width, first, std::min(first + kChunk, keys.end)};
    const Keys<Cache> rest{keys.head, keys.width, chunk.end, std::min(chunk.end + kChunk, keys.end)};
    stream.soon = chunk.end < keys.end ? rest.span() : next;
    stream.pace = stream.soon.lines() * Stream::kWhole / (passes * steps_of(chunk, (queries.count + passes - 1) / passes));
    for (int pass = 0; pass < passes; ++pass) {
      const auto some = queries.some(queries.count * pass / passes, queries.count * (pass + 1) / passes);
#define ROWS(n) \
  case n: \
    if constexpr (n <= kMostRows) attend_chunk<Cache, n>(some, chunk, stream); \
    break;
      switch (some.count) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
      }
#undef ROWS
    }
  }
}

// A query's stretches to its result [width].
inline void merge(float* partials, int stretches, int width, float* out) {
  for (int s = 1; s < stretches; ++s) fold(partials + s * partial_width(width), width, partials);
  const Floats total = floats(sum_of(load(partials + width)));
  for (int i = 0; i < width; i += kLanes) store(out + i, load(partials + i) / total);
}

}  // namespace kernels
