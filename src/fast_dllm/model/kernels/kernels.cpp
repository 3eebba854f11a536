// Kernels for x86 CPUs with AVX-512 or AVX2. Plain C interface: Python calls it with pointers.
//
// What training needs is in training.h; all else is for decoding. There activations are float32. Weights are int8 (a
// scale per output) or bfloat16; so are keys and values (cached.h).
// There every result for a position depends on that position's inputs alone, in an order that the number of positions and
// threads does not change: a row of a batch gives bitwise what it gives alone. Where a gated adapter does not act, it
// gives bitwise what it gives without the adapter.
//
// A forward is one parallel region: its threads walk through all steps of all layers as a team, and wait for each
// other after each.
//
// Legend: T positions, N of them read, H hidden width, I and O inputs and outputs of a linear layer, E width of a head.

#include <omp.h>

#include <vector>

#include "attention.h"
#include "inputs.h"
#include "items.h"
#include "likeliest.h"
#include "linear.h"
#include "training.h"

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

struct Slabs {  // mirrors the ctypes structure in cpu_ops.py
  int32_t int8;
  int64_t slot, head;   // strides, in bytes
  char* const* layers;  // [slots][K/V heads][blocks], see cached.h
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

// The most inputs that a linear layer has, an adapter's among them.
template <class Kind>
int widest_of(const Model& model) {
  int units = 0;
  for (int i = 0; i < model.count; ++i) {
    const Layer& layer = model.layers[i];
    for (const Linear* linear : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down})
      units = std::max(units, most_units<Kind>(*linear));
  }
  return units * Kind::kPerUnit;
}

constexpr int64_t kFetched = 512 << 10;  // bytes of a layer: what a second-level cache holds beside other things

// The beginning of a thread's weights.
template <class Kind>
Span first_weights(const Linear& layer) {
  const Span all = own_weights<Kind>(layer);
  return Span(all.next, std::min(all.end - all.next, kFetched));
}

template <class Kind, class Cache>
class Forward {
 public:
  Forward(const Model& model, const Batch& batch, const Slabs& slabs, float* hidden, float* out, int threads)
      : model_(model), batch_(batch), slabs_(slabs), hidden_(hidden), out_(out), width_(model.heads.width),
        share_(model.heads.query / model.heads.kv),
        qkv_width_((model.heads.query + 2 * model.heads.kv) * width_), out_width_(model.heads.query * width_),
        hidden_width_(model.layers->out.outputs), blocks_(blocks_of(batch, model.heads)),
        inputs_(batch.positions, widest_of<Kind>(model), threads) {
    thread_local Buffer<float> wide, partials, scales;
    thread_local Buffer<typename Cache::Kind::Input> queries;
    thread_local Buffer<int32_t> undo;
    wide_ = wide.grow(int64_t(batch.positions) * std::max(qkv_width_, model.layers->gate_up.outputs));
    const Block& largest = blocks_.front();
    partials_ = partials.grow(int64_t(largest.end - largest.first) * model.heads.query * largest.stretches *
                              partial_width(width_));
    const int64_t count = int64_t(batch.positions) * model.heads.query;
    const int64_t stride = units_of<typename Cache::Kind>(width_) * Cache::Kind::kInputsPerUnit;
    queries_ = {queries.grow(count * stride), scales.grow(count), undo.grow(count), stride};
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
    auto operand =
        inputs_.prepare(layer.qkv, 0, batch_.positions, masked(false), norm_by(hidden_, layer.attention_norm));
    watch.lap(kRestPart);
    multiply<Kind>(layer.qkv, operand, batch_.positions, wide_, false, down_of(layer.out));
    watch.lap(kLinearPart);
    store(layer, slabs_.layers[number]);
    // Nothing behind the last layer's K/V depends on positions that nobody reads.
    const bool last = number + 1 == model_.count;
    const int count = last ? batch_.read_count : batch_.positions;
    float* hidden = last ? out_ : hidden_;
    if (count) operand = attention(layer, slabs_.layers[number], last);
    watch.lap(kAttentionPart);
    if (!count) return;
    multiply<Kind>(layer.out, operand, count, hidden, true, down_of(layer.gate_up));
    watch.lap(kLinearPart);
    operand = inputs_.prepare(layer.gate_up, 0, count, masked(last), norm_by(hidden, layer.mlp_norm));
    watch.lap(kRestPart);
    multiply<Kind>(layer.gate_up, operand, count, wide_, false, down_of(layer.down));
    watch.lap(kLinearPart);
    const int inner = layer.down.inputs;
    operand = inputs_.prepare(layer.down, 0, count, masked(last),
                              [=](int r, float* to) { gate(wide_ + int64_t(r) * 2 * inner, inner, to); });
    watch.lap(kRestPart);
    multiply<Kind>(layer.down, operand, count, hidden, true, last ? nullptr : down_of(model_.layers[number + 1].qkv));
    watch.lap(kLinearPart);
  }

  // Of an adapter, what is read before the weights.
  const void* down_of(const Linear& layer) const { return batch_.masked ? layer.down : nullptr; }

  Masked masked(bool last) const { return {batch_.masked, last ? batch_.read : nullptr}; }

  // RoPE (and QK norm) of queries, keys and values of the wide rows: the queries to `queries_`, the others to the cache.
  void store(const Layer& layer, char* slab) {
    const Heads& heads = model_.heads;
    const float scale = kLog2e / std::sqrt(float(width_));
#pragma omp for collapse(2) schedule(static)
    for (int t = 0; t < batch_.positions; ++t)
      for (int h = 0; h < heads.kv; ++h) {
        const int64_t place = batch_.places[t];
        const auto turn = [&](float* head, const float* norm) {
          const int half = width_ / 2;
          rotate(head, width_, batch_.cos + place * half, batch_.sin + place * half, norm, model_.epsilon);
          Cache::turn(head, width_);
        };
        float* query = wide_ + int64_t(t) * qkv_width_ + h * share_ * width_;
        for (int q = 0; q < share_; ++q, query += width_) {
          turn(query, layer.query_norm);
          for (int i = 0; i < width_; ++i) query[i] *= scale;
          queries_.set(query_row(t, h) + q, query, width_);
        }
        float* key = wide_ + int64_t(t) * qkv_width_ + (heads.query + h) * width_;
        turn(key, layer.key_norm);
        char* block = head_of(slab, batch_.slots[t], h) + place / kBlock * Cache::block_bytes(width_);
        Cache::write(key, key + heads.kv * width_, width_, place % kBlock, block);
      }
  }

  // The first query of a position and K/V head, in `queries_`: those that share a head follow one another.
  int64_t query_row(int position, int kv_head) const {
    return (int64_t(kv_head) * batch_.positions + position) * share_;
  }

  char* head_of(char* slab, int64_t slot, int kv_head) const {
    return slab + slot * slabs_.slot + kv_head * slabs_.head;
  }

  // Every row over its slot; what is read of it as inputs of the output projection.
  Operand<Kind> attention(const Layer& layer, char* slab, bool last) {
    Operand<Kind> operand;
    Stream stream{{}, first_weights<Kind>(layer.out), first_weights<Kind>(layer.gate_up)};
    const int threads = omp_get_num_threads();
    for (const Block& block : blocks_) {
      const int items = static_cast<int>(block.items.size());
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < items; ++i) {
        // In all likelihood this thread's next one.
        Span next;
        if (i + threads < items) {
          Keys<Cache> keys = keys_of(block.items[i + threads], slab);
          keys.end = std::min(keys.end, keys.first + kChunk);
          next = keys.span();
        }
        attend_item(block, block.items[i], slab, stream, next);
      }
      operand = merge_block(block, layer.out, last);
    }
    return operand;
  }

  void attend_item(const Block& block, const Item& item, char* slab, Stream& stream, Span next) {
    int32_t ends[kQueries];
    for (int q = 0; q < item.count; ++q) ends[q] = batch_.ends[block.first + (item.first + q) / share_];
    const int first = query_row(block.first, item.head) + item.first;
    const int64_t stride = int64_t(block.stretches) * partial_width(width_);
    float* partials = partial(block, item.head, item.first) + item.stretch * partial_width(width_);
    attend<Cache>({queries_, first, item.count, ends, partials, stride}, keys_of(item, slab), stream, next);
  }

  Keys<Cache> keys_of(const Item& item, char* slab) const {
    return {head_of(slab, item.slot, item.head), width_, stretch_start(item.stretch), item.end};
  }

  // Query number `query` of a block, of those that share a K/V head.
  float* partial(const Block& block, int kv_head, int query) const {
    const int64_t number = int64_t(kv_head) * (block.end - block.first) * share_ + query;
    return partials_ + number * block.stretches * partial_width(width_);
  }

  Operand<Kind> merge_block(const Block& block, const Linear& layer, bool last) {
    const int64_t* read = last ? batch_.read : nullptr;
    const int64_t* read_end = read + batch_.read_count;
    const int first = last ? std::lower_bound(read, read_end, block.first) - read : block.first;
    const int end = last ? std::lower_bound(read, read_end, block.end) - read : block.end;
    return inputs_.prepare(layer, first, end, masked(last), [=, &block](int r, float* to) {
      const int position = last ? read[r] : r;
      const int stretches = stretches_of(batch_.ends[position]);
      for (int h = 0; h < model_.heads.query; ++h) {
        const int query = (position - block.first) * share_ + h % share_;
        merge(partial(block, h / share_, query), stretches, width_, to + h * width_);
      }
      const float* residual = hidden_ + int64_t(position) * hidden_width_;
      if (last) std::copy_n(residual, hidden_width_, out_ + int64_t(r) * hidden_width_);
    });
  }

  const Model& model_;
  const Batch& batch_;
  const Slabs& slabs_;
  float *hidden_, *out_;
  const int width_, share_, qkv_width_, out_width_, hidden_width_;
  const std::vector<Block> blocks_;
  const Inputs<Kind> inputs_;
  Operand<typename Cache::Kind> queries_;
  float *wide_, *partials_;
};

template <class Kind, class Cache>
void run_layers(const Model& model, const Batch& batch, const Slabs& slabs, float* hidden, float* out, int threads) {
  Forward<Kind, Cache> forward(model, batch, slabs, hidden, out, threads);
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
    const auto operand = inputs.prepare(layer, 0, count, Masked{}, [=, &layer](int r, float* to) {
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

// Whether this machine sums products of bytes in 32 bits, so that each input has a range of its own: see bytes.h.
int fast_dllm_byte_products() { return kByteProducts; }

// From now on every call adds its seconds by part to these four; null ends it.
void fast_dllm_watch(double* seconds) { watched = seconds; }

// All layers over the embedded positions `hidden` [T, H], which are overwritten; out [N, H] is what comes out where it
// is read.
void fast_dllm_layers(const Model* model, const Batch* batch, const Slabs* slabs, float* hidden, float* out,
                      int threads) {
  auto* run = slabs->int8 ? run_layers<BFloat16, Int8Cache> : run_layers<BFloat16, BFloat16Cache>;
  if (model->int8) run = slabs->int8 ? run_layers<Int8, Int8Cache> : run_layers<Int8, BFloat16Cache>;
  run(*model, *batch, *slabs, hidden, out, threads);
}

// out [T, O] = layer(RMSNorm(from [T, I])); no norm where that is null.
void fast_dllm_linear(const Linear* layer, int int8, const float* norm, float epsilon, int count, const float* from,
                      float* out, int threads) {
  auto* run = int8 ? run_linear<Int8> : run_linear<BFloat16>;
  run(*layer, norm, epsilon, count, from, out, threads);
}

// Of each row of logits [T, V], the likeliest token other than `banned` (-1 for none), the first of several, and its
// probability, that of `banned` in the denominator.
void fast_dllm_likeliest(const float* logits, int count, int vocabulary, int banned, int64_t* tokens,
                         float* probabilities, int threads) {
  find_likeliest(logits, count, vocabulary, banned, tokens, probabilities, threads);
}

// Attention of a training sequence: `out` and `sums`.
void fast_dllm_attend(const Attention* task, int threads) { attend_training(*task, threads); }

// Of `d_out`: `d_query`, `d_key` and `d_value`.
void fast_dllm_attend_backward(const Attention* task, int threads) { attend_training_backward(*task, threads); }
}
