// Attention of training, forward and backward, in float32: a few neighbouring queries at a time, over the keys that
// they see.
//
// The queries of all heads that share a K/V head are the lanes of vectors. So a softmax is one of each lane, and keys
// and values are read number by number, where they lie: nothing is gathered.
//
// Sums are in an order that hangs on the number of threads alone, which makes a resumed run the same to the bit.
//
// Legend: B rows, K keys, M queries of a tile times the heads that share a K/V head, rounded up to whole vectors.
#pragma once

#include <cfloat>
#include <vector>

#include "buffer.h"
#include "products.h"

namespace kernels {

constexpr int kTile = 32;          // queries
constexpr int kTileKeys = 64;      // keys whose scores are in memory together
constexpr float kLowest = -1e30f;  // a score that is less than all others, but from which can be subtracted

// Of [B, heads, places, width]; a head's numbers lie side by side.
struct Strided {  // mirrors the ctypes structure in attention_kernel.py
  float* values;
  int64_t row, head, place;  // strides

  float* at(int b, int h, int64_t p) const { return values + b * row + h * head + p * place; }
};

// Neighbouring queries, and what they see of the keys.
struct Piece {  // mirrors the ctypes structure in attention_kernel.py
  int32_t queries, count;
  const int64_t* columns;  // [count], keys
  const uint8_t* mask;     // [B][queries][count]
};

struct Attention {  // mirrors the ctypes structure in attention_kernel.py
  int32_t rows, heads, kv_heads, keys, width, value_width, count;
  float scale;
  const Piece* pieces;  // [count]
  Strided query, key, value;
  Strided out, sums;                       // sums: of the exponentials of a query's scores, their logarithm
  Strided d_out, d_query, d_key, d_value;  // of the backward

  int share() const { return heads / kv_heads; }
};

// Some queries of a row, and the keys that one of them sees.
struct Tile {
  int row, first, queries;
  std::vector<int32_t> keys;   // first those that all queries see
  int whole;                   // how many of those there are
  std::vector<float> visible;  // [keys - whole][M lanes], 1 or 0
};

inline int lanes_of(const Attention& task, const Tile& tile) { return up(tile.queries * task.share(), kLanes); }

inline void see(const Attention& task, const Piece& piece, int from, Tile& tile) {
  const uint8_t* mask = piece.mask + (int64_t(tile.row) * piece.queries + from) * piece.count;
  std::vector<uint8_t> any(piece.count, 0), all(piece.count, 1);
  for (int q = 0; q < tile.queries; ++q)
    for (int c = 0; c < piece.count; ++c) {
      any[c] |= mask[int64_t(q) * piece.count + c];
      all[c] &= mask[int64_t(q) * piece.count + c];
    }
  for (int c = 0; c < piece.count; ++c)
    if (all[c]) tile.keys.push_back(piece.columns[c]);
  tile.whole = tile.keys.size();
  const int lanes = lanes_of(task, tile);
  for (int c = 0; c < piece.count; ++c) {
    if (!any[c] || all[c]) continue;
    tile.keys.push_back(piece.columns[c]);
    for (int m = 0; m < lanes; ++m)  // the queries once for each head, and then once more for lanes that have none
      tile.visible.push_back(mask[int64_t(m % tile.queries) * piece.count + c]);
  }
}

// What the masks come to; their order is that of work: by row, and by place.
inline std::vector<Tile> tiles_of(const Attention& task, int threads) {
  std::vector<Tile> tiles;
  std::vector<std::pair<const Piece*, int>> sources;
  for (int b = 0; b < task.rows; ++b) {
    int first = 0;
    for (const Piece* piece = task.pieces; piece < task.pieces + task.count; first += piece++->queries)
      for (int from = 0; from < piece->queries; from += kTile) {
        tiles.push_back({b, first + from, std::min(kTile, piece->queries - from), {}, 0, {}});
        sources.push_back({piece, from});
      }
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (size_t i = 0; i < tiles.size(); ++i) see(task, *sources[i].first, sources[i].second, tiles[i]);
  return tiles;
}

// A tile's queries, or something of their shape, as lanes: to[i][m] is number i of lane m; those without a query are 0.
inline void to_lanes(const Attention& task, const Tile& tile, int kv_head, const Strided& from, int width, float by,
                     float* to) {
  const int lanes = lanes_of(task, tile);
  std::fill_n(to, int64_t(width) * lanes, 0.0f);
  for (int h = 0; h < task.share(); ++h)
    for (int q = 0; q < tile.queries; ++q) {
      const float* values = from.at(tile.row, kv_head * task.share() + h, tile.first + q);
      float* lane = to + h * tile.queries + q;
      for (int i = 0; i < width; ++i) lane[i * lanes] = values[i] * by;
    }
}

// And as rows: to[m][i], `stride` apart.
inline void to_rows(const Attention& task, const Tile& tile, int kv_head, const Strided& from, int width, float by,
                    float* to, int stride) {
  for (int h = 0; h < task.share(); ++h)
    for (int q = 0; q < tile.queries; ++q, to += stride) {
      const float* values = from.at(tile.row, kv_head * task.share() + h, tile.first + q);
      for (int i = 0; i < width; ++i) to[i] = values[i] * by;
      std::fill(to + width, to + stride, 0.0f);
    }
}

// Back from lanes.
inline void from_lanes(const Attention& task, const Tile& tile, int kv_head, const float* from, int width, float by,
                       const Strided& to) {
  const int lanes = lanes_of(task, tile);
  for (int h = 0; h < task.share(); ++h)
    for (int q = 0; q < tile.queries; ++q) {
      float* values = to.at(tile.row, kv_head * task.share() + h, tile.first + q);
      const float* lane = from + h * tile.queries + q;
      for (int i = 0; i < width; ++i) values[i] = lane[i * lanes] * by;
    }
}

// Pointers to rows that are `stride` apart.
inline std::vector<float*> rows_at(float* first, int count, int64_t stride) {
  std::vector<float*> rows(count);
  for (int i = 0; i < count; ++i) rows[i] = first + i * stride;
  return rows;
}

// Pointers to the keys [from, end) of a tile.
inline void find_keys(const Tile& tile, int from, int end, const Strided& of, int kv_head, const float** to) {
  for (int k = from; k < end; ++k) *to++ = of.at(tile.row, kv_head, tile.keys[k]);
}

inline void attend_tile(const Attention& task, const Tile& tile, int kv_head) {
  thread_local Buffer<float> memory;
  const int lanes = lanes_of(task, tile), width = task.width, out_width = task.value_width;
  const int count = tile.keys.size();
  float* query = memory.grow(int64_t(lanes) * (width + out_width + kTileKeys + 2));
  float *out = query + int64_t(width) * lanes, *scores = out + int64_t(out_width) * lanes;
  float *top = scores + kTileKeys * lanes, *sum = top + lanes;
  to_lanes(task, tile, kv_head, task.query, width, task.scale * kLog2e, query);
  std::fill_n(out, int64_t(out_width) * lanes, 0.0f);
  std::fill_n(top, lanes, kLowest);
  std::fill_n(sum, lanes, 0.0f);
  const auto out_rows = rows_at(out, out_width, lanes), score_rows = rows_at(scores, kTileKeys, lanes);
  const float *keys[kTileKeys], *values[kTileKeys];
  for (int from = 0; from < count; from += kTileKeys) {
    const int end = std::min(from + kTileKeys, count), some = end - from;
    find_keys(tile, from, end, task.key, kv_head, keys);
    find_keys(tile, from, end, task.value, kv_head, values);
    product<false, false>(keys, some, width, query, lanes, score_rows.data(), lanes);
    const int whole = std::clamp(tile.whole - from, 0, some);  // of these
    const float* visible = tile.visible.data() + int64_t(std::max(0, from - tile.whole)) * lanes;
    for (int m = 0; m < lanes; m += kLanes) {
      const Floats none = floats(kLowest), before = load(top + m);
      Floats most = before;
      for (int k = 0; k < whole; ++k) most = max(most, load(scores + k * lanes + m));
      for (int k = whole; k < some; ++k) {
        float* score = scores + k * lanes + m;
        const Floats shown = choose(greater(load(visible + (k - whole) * lanes + m), floats(0)), load(score), none);
        store(score, shown);
        most = max(most, shown);
      }
      const Floats less = power_of_two(before - most);
      Floats total = load(sum + m) * less;
      for (int k = 0; k < some; ++k) {
        float* score = scores + k * lanes + m;
        Floats weight = power_of_two(load(score) - most);
        if (k >= whole) weight = weight * load(visible + (k - whole) * lanes + m);
        store(score, weight);
        total = total + weight;
      }
      store(sum + m, total);
      store(top + m, most);
      if (from)
        for (int i = 0; i < out_width; ++i) store(out + i * lanes + m, load(out + i * lanes + m) * less);
    }
    product<true, true>(values, out_width, some, scores, lanes, out_rows.data(), lanes);
  }
  for (int m = 0; m < lanes; m += kLanes) {
    const Floats total = max(load(sum + m), floats(FLT_MIN));  // a query that sees nothing gets zeros
    store(sum + m, total);
    for (int i = 0; i < out_width; ++i) store(out + i * lanes + m, load(out + i * lanes + m) / total);
  }
  for (int m = 0; m < lanes; ++m) top[m] = (top[m] + std::log2(sum[m])) / kLog2e;
  from_lanes(task, tile, kv_head, out, out_width, 1.0f, task.out);
  from_lanes(task, tile, kv_head, top, 1, 1.0f, task.sums);
}

inline void attend_training(const Attention& task, int threads) {
  const std::vector<Tile> tiles = tiles_of(task, threads);
  const int items = tiles.size() * task.kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int i = items - 1; i >= 0; --i)  // clean tokens see most, and come last: no thread is to wait for them
    attend_tile(task, tiles[i / task.kv_heads], i % task.kv_heads);
}

// Adds what a tile gives to the gradients of a K/V head: [K][stride], a key's and behind it its value's.
inline void attend_tile_backward(const Attention& task, const Tile& tile, int kv_head, float* gradients, int stride) {
  thread_local Buffer<float> memory;
  const int lanes = lanes_of(task, tile), width = task.width, out_width = task.value_width;
  const int count = tile.keys.size(), queries = tile.queries * task.share();
  const int row = up(width, kLanes), out_row = up(out_width, kLanes);
  float* query = memory.grow(int64_t(lanes) * (2 * width + out_width + row + out_row + 2 * kTileKeys + 2));
  float *d_query = query + int64_t(width) * lanes, *d_out = d_query + int64_t(width) * lanes;
  float *query_rows = d_out + int64_t(out_width) * lanes, *d_out_rows = query_rows + int64_t(row) * lanes;
  float *weights = d_out_rows + int64_t(out_row) * lanes, *d_scores = weights + kTileKeys * lanes;
  float *sums = d_scores + kTileKeys * lanes, *mean = sums + lanes;
  to_lanes(task, tile, kv_head, task.query, width, task.scale * kLog2e, query);
  to_lanes(task, tile, kv_head, task.d_out, out_width, 1.0f, d_out);
  to_lanes(task, tile, kv_head, task.sums, 1, kLog2e, sums);
  to_rows(task, tile, kv_head, task.query, width, task.scale, query_rows, row);
  to_rows(task, tile, kv_head, task.d_out, out_width, 1.0f, d_out_rows, out_row);
  // Of the weights' gradients, by the weights: what comes out times its gradient.
  std::fill_n(mean, lanes, 0.0f);
  for (int m = 0; m < queries; ++m) {
    const float* out = task.out.at(tile.row, kv_head * task.share() + m / tile.queries, tile.first + m % tile.queries);
    for (int i = 0; i < out_width; ++i) mean[m] += out[i] * d_out_rows[int64_t(m) * out_row + i];
  }
  std::fill_n(d_query, int64_t(width) * lanes, 0.0f);
  const auto d_query_rows = rows_at(d_query, width, lanes);
  const auto weight_rows = rows_at(weights, kTileKeys, lanes), d_score_rows = rows_at(d_scores, kTileKeys, lanes);
  const float *keys[kTileKeys], *values[kTileKeys];
  float *d_keys[kTileKeys], *d_values[kTileKeys];
  for (int from = 0; from < count; from += kTileKeys) {
    const int end = std::min(from + kTileKeys, count), some = end - from;
    find_keys(tile, from, end, task.key, kv_head, keys);
    find_keys(tile, from, end, task.value, kv_head, values);
    for (int k = 0; k < some; ++k) {
      d_keys[k] = gradients + int64_t(tile.keys[from + k]) * stride;
      d_values[k] = d_keys[k] + row;
    }
    product<false, false>(keys, some, width, query, lanes, weight_rows.data(), lanes);
    product<false, false>(values, some, out_width, d_out, lanes, d_score_rows.data(), lanes);
    for (int k = 0; k < some; ++k)
      for (int m = 0; m < lanes; m += kLanes) {
        const int64_t at = int64_t(k) * lanes + m;
        Floats power = load(weights + at) - load(sums + m);
        if (from + k < tile.whole) {
          power = power_of_two(power);
        } else {  // a hidden score may be too large for a power
          const Floats shown = load(tile.visible.data() + int64_t(from + k - tile.whole) * lanes + m);
          power = power_of_two(choose(greater(shown, floats(0)), power, floats(-INFINITY))) * shown;
        }
        store(weights + at, power);
        store(d_scores + at, power * (load(d_scores + at) - load(mean + m)));
      }
    product<false, true>(weight_rows.data(), some, queries, d_out_rows, out_row, d_values, out_row);
    product<false, true>(d_score_rows.data(), some, queries, query_rows, row, d_keys, row);
    product<true, true>(keys, width, some, d_scores, lanes, d_query_rows.data(), lanes);
  }
  from_lanes(task, tile, kv_head, d_query, width, task.scale, task.d_query);
}

// Neighbouring tiles of a K/V head that a thread does, one after another, and where it adds up their gradients.
struct Stint {
  int row, kv_head, first, end;  // tiles
  float* gradients;
};

// Stints of like cost, in the order of (row, K/V head, tile); none goes on into another head.
inline std::vector<std::vector<Stint>> stints_of(const Attention& task, const std::vector<Tile>& tiles, int threads) {
  const int per_row = tiles.size() / task.rows;
  int64_t all = 0, before = 0;
  for (const Tile& tile : tiles) all += int64_t(tile.queries) * tile.keys.size() * task.kv_heads;
  std::vector<std::vector<Stint>> stints(threads);
  for (int b = 0; b < task.rows; ++b)
    for (int h = 0; h < task.kv_heads; ++h)
      for (int t = b * per_row; t < (b + 1) * per_row; ++t) {
        auto& own = stints[std::min<int64_t>(threads - 1, before * threads / std::max<int64_t>(1, all))];
        if (own.empty() || own.back().row != b || own.back().kv_head != h) own.push_back({b, h, t, t, nullptr});
        own.back().end = t + 1;
        before += int64_t(tiles[t].queries) * tiles[t].keys.size();
      }
  return stints;
}

inline void attend_training_backward(const Attention& task, int threads) {
  thread_local Buffer<float> buffer;
  const std::vector<Tile> tiles = tiles_of(task, threads);
  auto stints = stints_of(task, tiles, threads);
  const int row = up(task.width, kLanes), stride = row + up(task.value_width, kLanes);
  const int64_t size = int64_t(task.keys) * stride;
  std::vector<std::vector<Stint*>> of_head(task.rows * task.kv_heads);  // in their order
  int count = 0;
  for (auto& own : stints)
    for (Stint& stint : own) of_head[stint.row * task.kv_heads + stint.kv_head].push_back(&stint), ++count;
  float* gradients = buffer.grow(size * count);
  for (auto& own : stints)
    for (Stint& stint : own) stint.gradients = gradients, gradients += size;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static, 1)
    for (int n = 0; n < threads; ++n)
      for (const Stint& stint : stints[n]) {
        std::fill_n(stint.gradients, size, 0.0f);
        for (int t = stint.first; t < stint.end; ++t)
          attend_tile_backward(task, tiles[t], stint.kv_head, stint.gradients, stride);
      }
#pragma omp for collapse(2) schedule(static)
    for (int i = 0; i < task.rows * task.kv_heads; ++i)
      for (int k = 0; k < task.keys; ++k) {
        const int b = i / task.kv_heads, h = i % task.kv_heads;
        const int64_t at = int64_t(k) * stride;
        float* first = of_head[i].front()->gradients + at;
        for (size_t s = 1; s < of_head[i].size(); ++s)
          for (int j = 0; j < stride; ++j) first[j] += of_head[i][s]->gradients[at + j];
        std::copy_n(first, task.width, task.d_key.at(b, h, k));
        std::copy_n(first + row, task.value_width, task.d_value.at(b, h, k));
      }
  }
}

}  // namespace kernels
