// A forward's attention, cut into items for the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace kernels {

struct Heads {  // mirrors the ctypes structure in cpu_ops.py
  int32_t query, kv, width;
};

struct Batch {  // mirrors the ctypes structure in cpu_ops.py
  int32_t rows, positions, read_count;
  const int32_t* row_starts;  // [rows + 1], places in [0, T)
  const int32_t* ends;        // [T], of the keys a position sees
  const int64_t *slots, *places;  // [T]
  const int64_t* read;        // [N], places in [0, T)
  const float *cos, *sin;     // [.., E / 2] by position
  const uint8_t* masked;      // [T], where a gated adapter acts; null for nowhere
};

// A stretch of keys for some queries of a row.
struct Item {
  int64_t slot;
  int head, first, count;  // K/V head; queries from the first of the block on
  int stretch, end;        // its number, and the end of its keys
};

// Positions whose partials are in memory together.
struct Block {
  int first, end, stretches;  // positions; most stretches of one of them
  std::vector<Item> items;
};

constexpr int kFewItems = 16;
constexpr int64_t kPartials = 1 << 21;  // floats of a block

inline std::vector<Block> blocks_of(const Batch& batch, const Heads& heads) {
  const int share = heads.query / heads.kv;
  const int stretches = stretches_of(*std::max_element(batch.ends, batch.ends + batch.positions));
  const int size = std::max<int64_t>(1, kPartials / (int64_t(heads.query) * stretches * partial_width(heads.width)));
  std::vector<Block> blocks;
  for (int start = 0; start < batch.positions; start += size) {
    Block block{start, std::min(start + size, batch.positions), stretches, {}};
    for (int r = 0; r < batch.rows; ++r) {
      const int from = std::max(batch.row_starts[r], block.first), to = std::min(batch.row_starts[r + 1], block.end);
      if (from >= to) continue;
      const int first = (from - block.first) * share, queries = (to - from) * share;
      const int longest = *std::max_element(batch.ends + from, batch.ends + to);
      // Queries that share keys save loads; but a few long items keep threads waiting for each other.
      const bool few = batch.rows * heads.kv * stretches_of(longest) < kFewItems;
      const int together = few ? kQueries / 2 : kQueries, shares = (queries + together - 1) / together;
      const int most = up((queries + shares - 1) / shares, kMostRows / 2);
      for (int h = 0; h < heads.kv; ++h)
        for (int q = 0; q < queries; q += most)
          for (int s = 0; s < stretches_of(longest); ++s)
            block.items.push_back({batch.slots[from], h, first + q, std::min(most, queries - q), s,
                                   std::min(stretch_start(s + 1), longest)});
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

}  // namespace kernels
