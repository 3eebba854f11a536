// Decoding kernels for x86 CPUs with AVX-512; int8 needs VNNI too. Plain C interface: Python calls it with pointers.
//
// Activations are float32. Weights are int8 (a scale per output) or bfloat16; keys and values are bfloat16.
// Every result for a position depends on that position's inputs alone, in an order that the number of positions and
// threads does not change: a row of a batch gives bitwise what it gives alone.
//
// A forward is one parallel region: its threads walk through all steps of all layers as a team, and wait for each
// other after each.
//
// Legend: T positions, N of them read, H hidden width, I and O inputs and outputs of a linear layer, E width of a head.

#include <omp.h>

#include <vector>

#include "attention.h"
#include "linear.h"

namespace kernels {

enum Part { kLinearPart, kAttentionPart, kHeadPart, kRestPart };  // as in cpu_ops.py
double* watched = nullptr;  // seconds by part, or null

struct Layer {  // mirrors the ctypes structure in cpu_ops.py
  Linear qkv, out, gate_up, down;
  const float *attention_norm, *mlp_norm;   // [H]
  const float *query_norm, *key_norm;       // [E], or null
};

struct Model {  // mirrors the ctypes structure in cpu_ops.py
  Heads heads;
  float epsilon;
  int32_t int8, count;
  const Layer* layers;
};

struct Batch {  // mirrors the ctypes structure in cpu_ops.py
  int32_t rows, positions, read_count;
  const int32_t* row_starts;  // [rows + 1], places in [0, T)
  const int32_t* ends;        // [T], of the keys a position sees
  const int64_t *slots, *places;  // [T]
  const int64_t* read;        // [N], places in [0, T)
  const float *cos, *sin;     // [.., E / 2] by position
};

// Memory that is kept between calls: no allocation once the largest batch has been seen.
template <class T>
class Buffer {
 public:
  T* grow(int64_t count) {
    const size_t room = 64 / sizeof(T);
    if (values_.size() < count + room) values_.resize(count + room);
    // Whole cache lines: a vector that straddles two costs two loads.
    return reinterpret_cast<T*>(up(reinterpret_cast<uintptr_t>(values_.data()), uintptr_t(64)));
  }

 private:
  std::vector<T> values_;
};

// Adds the time since the last lap to a part, if anybody watches.
class Stopwatch {
 public:
  Stopwatch() : seconds_(omp_get_thread_num() == 0 ? watched : nullptr) { last_ = seconds_ ? omp_get_wtime() : 0; }
  void lap(Part part) {
    if (!seconds_) return;
    const double now = omp_get_wtime();
    seconds_[part] += now - last_;
    last_ = now;
  }

 private:
  double* seconds_;
  double last_;
};

// The inputs of linear layers, row by row.
template <class Kind>
class Inputs {
 public:
  Inputs(int count, int widest, int threads) {
    thread_local Buffer<typename Kind::Input> values;
    thread_local Buffer<float> scales, rows;
    thread_local Buffer<int32_t> undo;
    values_ = values.grow(int64_t(count) * units_of<Kind>(widest) * Kind::kInputsPerUnit);
    scales_ = scales.grow(count);
    undo_ = undo.grow(count);
    row_stride_ = up(widest, kLanes);
    rows_ = rows.grow(int64_t(threads) * row_stride_);
  }

  // `make(row, to)` writes the inputs of one of the rows. Shared by the threads of a team.
  template <class Make>
  Operand<Kind> prepare(const Linear& layer, int first, int end, Make make) const {
    fetch_first_panel<Kind>(layer);
    const Operand<Kind> operand{values_, scales_, undo_, int64_t(units_of<Kind>(layer.inputs)) * Kind::kInputsPerUnit};
    float* row = rows_ + omp_get_thread_num() * row_stride_;
#pragma omp for schedule(static)
    for (int r = first; r < end; ++r) {
      make(r, row);
      operand.set(r, row, layer.inputs);
    }
    return operand;
  }

 private:
  typename Kind::Input* values_;
  float *scales_, *rows_;
  int32_t* undo_;
  int64_t row_stride_;
};

constexpr int64_t kFetched = 512 << 10;  // bytes of a layer: what a second-level cache holds beside other things

// The beginning of a thread's weights.
template <class Kind>
Span first_weights(const Linear& layer) {
  const Span all = own_weights<Kind>(layer);
  return Span(all.next, std::min(all.end - all.next, kFetched));
}

// A chunk of keys for some queries of a row.
struct Item {
  int64_t slot;
  int head, first, count, key;  // K/V head; queries from the first of the block on; first key
};

// Positions whose partials are in memory together.
struct Block {
  int first, end, chunks;  // positions; most chunks of one of them
  std::vector<Item> items;
};

constexpr int64_t kPartials = 1 << 21;  // floats of a block

std::vector<Block> blocks_of(const Batch& batch, const Heads& heads) {
  const int share = heads.query / heads.kv;
  const int chunks = (*std::max_element(batch.ends, batch.ends + batch.positions) + kChunk - 1) / kChunk;
  const int size = std::max<int64_t>(1, kPartials / (int64_t(heads.query) * chunks * partial_width(heads.width)));
  std::vector<Block> blocks;
  for (int start = 0; start < batch.positions; start += size) {
    Block block{start, std::min(start + size, batch.positions), chunks, {}};
    for (int r = 0; r < batch.rows; ++r) {
      const int from = std::max(batch.row_starts[r], block.first), to = std::min(batch.row_starts[r + 1], block.end);
      if (from >= to) continue;
      const int first = (from - block.first) * share, queries = (to - from) * share;
      const int longest = *std::max_element(batch.ends + from, batch.ends + to);
      // Shares of equal size, as whole products like them.
      const int shares = (queries + kQueries - 1) / kQueries, most = up((queries + shares - 1) / shares, kMostRows);
      for (int h = 0; h < heads.kv; ++h)
        for (int q = 0; q < queries; q += most)
          for (int key = 0; key < longest; key += kChunk)
            block.items.push_back({batch.slots[from], h, first + q, std::min(most, queries - q), key});
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

template <class Kind>
class Forward {
 public:
  Forward(const Model& model, const Batch& batch, const Slab* slabs, float* hidden, float* out, int threads)
      : model_(model), batch_(batch), slabs_(slabs), hidden_(hidden), out_(out), width_(model.heads.width),
        qkv_width_((model.heads.query + 2 * model.heads.kv) * width_), out_width_(model.heads.query * width_),
        hidden_width_(model.layers->out.outputs), attend_(attend_for(width_)), blocks_(blocks_of(batch, model.heads)),
        inputs_(batch.positions, std::max({hidden_width_, out_width_, model.layers->down.inputs}), threads) {
    thread_local Buffer<float> wide, partials;
    wide_ = wide.grow(int64_t(batch.positions) * std::max(qkv_width_, model.layers->gate_up.outputs));
    const Block& largest = blocks_.front();
    partials_ = partials.grow(int64_t(largest.end - largest.first) * model.heads.query * largest.chunks *
                              partial_width(width_));
  }

  void run() {
    Stopwatch watch;
    for (int number = 0; number < model_.count; ++number) layer(number, watch);
  }

 private:
  void layer(int number, Stopwatch& watch) {
    const Layer& layer = model_.layers[number];
    const auto norm_by = [this](const float* hidden, const float* norm) {
      return [=](int r, float* to) {
        normalise(hidden + int64_t(r) * hidden_width_, hidden_width_, norm, model_.epsilon, to);
      };
    };
    auto operand = inputs_.prepare(layer.qkv, 0, batch_.positions, norm_by(hidden_, layer.attention_norm));
    watch.lap(kRestPart);
    multiply<Kind>(layer.qkv, operand, batch_.positions, wide_, false);
    watch.lap(kLinearPart);
    store(layer, slabs_[2 * number], slabs_[2 * number + 1]);
    // Nothing behind the last layer's K/V depends on positions that nobody reads.
    const bool last = number + 1 == model_.count;
    const int count = last ? batch_.read_count : batch_.positions;
    float* hidden = last ? out_ : hidden_;
    if (count) operand = attention(layer, slabs_[2 * number], slabs_[2 * number + 1], last);
    watch.lap(kAttentionPart);
    if (!count) return;
    multiply<Kind>(layer.out, operand, count, hidden, true);
    watch.lap(kLinearPart);
    operand = inputs_.prepare(layer.gate_up, 0, count, norm_by(hidden, layer.mlp_norm));
    watch.lap(kRestPart);
    multiply<Kind>(layer.gate_up, operand, count, wide_, false);
    watch.lap(kLinearPart);
    const int inner = layer.down.inputs;
    operand = inputs_.prepare(layer.down, 0, count,
                              [=](int r, float* to) { gate(wide_ + int64_t(r) * 2 * inner, inner, to); });
    watch.lap(kRestPart);
    multiply<Kind>(layer.down, operand, count, hidden, true);
    watch.lap(kLinearPart);
  }

  // RoPE (and QK norm) of the queries in place; keys and values to the slab.
  void store(const Layer& layer, const Slab& keys, const Slab& values) {
    const Heads& heads = model_.heads;
#pragma omp for schedule(static)
    for (int t = 0; t < batch_.positions; ++t) {
      float* head = wide_ + int64_t(t) * qkv_width_;
      const int64_t slot = batch_.slots[t], place = batch_.places[t];
      const float *cos = batch_.cos + place * (width_ / 2), *sin = batch_.sin + place * (width_ / 2);
      for (int h = 0; h < heads.query; ++h, head += width_)
        rotate(head, width_, cos, sin, layer.query_norm, model_.epsilon);
      for (int h = 0; h < heads.kv; ++h, head += width_) {
        rotate(head, width_, cos, sin, layer.key_norm, model_.epsilon);
        const float* value = head + heads.kv * width_;
        uint16_t* to_key = keys.data + slot * keys.slot + h * keys.head + place * width_;
        uint16_t* to_value = values.data + slot * values.slot + h * values.head + place * width_;
        for (int i = 0; i < width_; ++i) to_key[i] = to_bfloat16(head[i]);
        for (int i = 0; i < width_; ++i) to_value[i] = to_bfloat16(value[i]);
      }
    }
  }

  // Every row over its slot; what is read of it as inputs of the output projection.
  Operand<Kind> attention(const Layer& layer, const Slab& keys, const Slab& values, bool last) {
    Operand<Kind> operand;
    Stream stream{{}, first_weights<Kind>(layer.out), first_weights<Kind>(layer.gate_up)};
    const int threads = omp_get_num_threads();
    for (const Block& block : blocks_) {
      const int items = static_cast<int>(block.items.size());
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < items; ++i) {
        // In all likelihood this thread's next one.
        const Span next_keys = i + threads < items ? keys_of(block.items[i + threads], keys) : Span();
        attend_item(block, block.items[i], keys, values, stream, next_keys);
      }
      operand = merge_block(block, layer.out, last);
    }
    return operand;
  }

  void attend_item(const Block& block, const Item& item, const Slab& keys, const Slab& values, Stream& stream,
                   Span next_keys) {
    const int share = model_.heads.query / model_.heads.kv;
    const float scale = kLog2e / std::sqrt(float(width_));
    alignas(64) float queries[kQueries * kWidest];
    int32_t ends[kQueries];
    for (int q = 0; q < item.count; ++q) {
      const int position = block.first + (item.first + q) / share;
      const int head = item.head * share + (item.first + q) % share;
      const float* from = wide_ + int64_t(position) * qkv_width_ + head * width_;
      for (int i = 0; i < width_; ++i) queries[q * width_ + i] = from[i] * scale;
      ends[q] = batch_.ends[position];
    }
    const int64_t stride = int64_t(block.chunks) * partial_width(width_);
    float* partials = partial(block, item.head, item.first) + item.key / kChunk * partial_width(width_);
    attend_(queries, item.count, ends, keys.data + item.slot * keys.slot + item.head * keys.head,
            values.data + item.slot * values.slot + item.head * values.head, item.key, partials, stride, stream,
            next_keys);
  }

  Span keys_of(const Item& item, const Slab& keys) const {
    const uint16_t* first = keys.data + item.slot * keys.slot + item.head * keys.head + int64_t(item.key) * width_;
    return Span(first, int64_t(kChunk) * width_ * sizeof *first);
  }

  // Query number `query` of a block, of those that share a K/V head.
  float* partial(const Block& block, int kv_head, int query) const {
    const int share = model_.heads.query / model_.heads.kv;
    const int64_t number = int64_t(kv_head) * (block.end - block.first) * share + query;
    return partials_ + number * block.chunks * partial_width(width_);
  }

  Operand<Kind> merge_block(const Block& block, const Linear& layer, bool last) {
    const int share = model_.heads.query / model_.heads.kv;
    const int64_t* read = last ? batch_.read : nullptr;
    const int64_t* read_end = read + batch_.read_count;
    const int first = last ? std::lower_bound(read, read_end, block.first) - read : block.first;
    const int end = last ? std::lower_bound(read, read_end, block.end) - read : block.end;
    return inputs_.prepare(layer, first, end, [=, &block](int r, float* to) {
      const int position = last ? read[r] : r;
      const int chunks = (batch_.ends[position] + kChunk - 1) / kChunk;
      for (int h = 0; h < model_.heads.query; ++h) {
        const int query = (position - block.first) * share + h % share;
        merge(partial(block, h / share, query), chunks, width_, to + h * width_);
      }
      const float* residual = hidden_ + int64_t(position) * hidden_width_;
      if (last) std::copy_n(residual, hidden_width_, out_ + int64_t(r) * hidden_width_);
    });
  }

  const Model& model_;
  const Batch& batch_;
  const Slab* slabs_;
  float *hidden_, *out_;
  const int width_, qkv_width_, out_width_, hidden_width_;
  const Attend attend_;
  const std::vector<Block> blocks_;
  const Inputs<Kind> inputs_;
  float *wide_, *partials_;
};

template <class Kind>
void run_layers(const Model& model, const Batch& batch, const Slab* slabs, float* hidden, float* out, int threads) {
  Forward<Kind> forward(model, batch, slabs, hidden, out, threads);
#pragma omp parallel num_threads(threads)
  forward.run();
}

template <class Kind>
void run_linear(const Linear& layer, const float* norm, float epsilon, int count, const float* from, float* out,
                int threads) {
  const Inputs<Kind> inputs(count, layer.inputs, threads);
#pragma omp parallel num_threads(threads)
  {
    Stopwatch watch;
    const auto operand = inputs.prepare(layer, 0, count, [=, &layer](int r, float* to) {
      const float* row = from + int64_t(r) * layer.inputs;
      if (norm)
        normalise(row, layer.inputs, norm, epsilon, to);
      else
        std::copy_n(row, layer.inputs, to);
    });
    multiply<Kind>(layer, operand, count, out, false);
    watch.lap(kHeadPart);
  }
}

}  // namespace kernels

extern "C" {

using namespace kernels;

// Which instruction sets this file was built with: 1 int8, 2 bfloat16.
int fast_dllm_kinds() {
  int kinds = 2;
#ifdef __AVX512VNNI__
  kinds |= 1;
#endif
  return kinds;
}

// From now on every call adds its seconds by part to these four; null ends it.
void fast_dllm_watch(double* seconds) { watched = seconds; }

// All layers over the embedded positions `hidden` [T, H], which are overwritten; out [N, H] is what comes out where it
// is read. `slabs`: K and V of each layer.
void fast_dllm_layers(const Model* model, const Batch* batch, const Slab* slabs, float* hidden, float* out,
                      int threads) {
#ifdef __AVX512VNNI__
  if (model->int8) run_layers<Int8>(*model, *batch, slabs, hidden, out, threads);
#endif
  if (!model->int8) run_layers<BFloat16>(*model, *batch, slabs, hidden, out, threads);
}

// out [T, O] = layer(RMSNorm(from [T, I])); no norm where that is null.
void fast_dllm_linear(const Linear* layer, int int8, const float* norm, float epsilon, int count, const float* from,
                      float* out, int threads) {
#ifdef __AVX512VNNI__
  if (int8) run_linear<Int8>(*layer, norm, epsilon, count, from, out, threads);
#endif
  if (!int8) run_linear<BFloat16>(*layer, norm, epsilon, count, from, out, threads);
}
}
