// Keys and values as the cache holds them: bfloat16, or int8 with a scale per position and head.
//
// The positions of a head lie in blocks, in the order in which attention reads them. A block holds, one after another,
//   keys    [E / per unit][kBlock] units of 4 bytes: neighbours in a key,
//   values  [kBlock / per unit][E] units: the same element of neighbouring positions,
//   scales  of the keys [kBlock] and of the values [kBlock], bfloat16 (int8 only).
// So both products of attention are those of a linear layer: keys are its weights for the queries, and have a
// position for each output; values are its weights for what the softmax gives, and have a position for each input.
//
// Legend: E width of a head.
#pragma once

#include "linear.h"
#include "vectors.h"

namespace kernels {

constexpr int kBlock = kLanes;  // positions; as in cpu_cache.py
constexpr int kChunk = 128;     // keys whose scores are held at once

// A position's key and value [E] to its place in a block.
template <class Element>
void scatter(const Element* key, const Element* value, int width, int place, char* block) {
  constexpr int per_unit = 4 / sizeof(Element);
  auto* keys = reinterpret_cast<Element*>(block);
  Element* values = keys + kBlock * width;
  for (int i = 0; i < width; i += per_unit) std::memcpy(keys + i * kBlock + place * per_unit, key + i, 4);
  for (int i = 0; i < width; ++i) values[(place / per_unit * width + i) * per_unit + place % per_unit] = value[i];
}

struct BFloat16Cache {
  typedef BFloat16 Kind;  // of the product of queries and keys
  typedef float Weight;   // of a value
  static int64_t values_at(int width) { return kBlock * width * sizeof(uint16_t); }
  static int64_t block_bytes(int width) { return 2 * values_at(width); }

  static void turn(float*, int) {}

  static void write(const float* key, const float* value, int width, int place, char* block) {
    uint16_t rounded[2][kWidest];
    for (int i = 0; i < width; ++i) rounded[0][i] = to_bfloat16(key[i]);
    for (int i = 0; i < width; ++i) rounded[1][i] = to_bfloat16(value[i]);
    scatter(rounded[0], rounded[1], width, place, block);
  }

  static Floats key_scales(const char*, int) { return floats(1.0f); }

  static Floats value_scales(const char*, int) { return floats(1.0f); }

  static const Weight* convert(const float* weights, int, int, const float*) { return weights; }
  static Floats reach_of(Floats weights) { return weights; }
  static float step_of(float) { return 1.0f; }

  template <int rows, int vectors>
  INLINED static void step(Floats (&acc)[rows][vectors], const Ints (&values)[vectors], const Weight* weights, int64_t stride) {
    BFloat16::step(acc, values, weights, stride);
  }
};

struct Int8Cache {
  typedef Int8 Kind;
  typedef int32_t Weight;
  static int64_t values_at(int width) { return kBlock * width; }
  static int64_t scales_at(int width) { return 2 * kBlock * width; }
  static int64_t block_bytes(int width) { return scales_at(width) + 2 * kBlock * sizeof(uint16_t); }
  static const uint16_t* scales_of(const char* block, int width) {
    return reinterpret_cast<const uint16_t*>(block + scales_at(width));
  }

  // Turns queries and keys alike, so that their products stay.
  static void turn(float* head, int width) { hadamard(head, width); }

  static void write(const float* key, const float* value, int width, int place, char* block) {
    int8_t rounded[2][kWidest];
    auto* scales = reinterpret_cast<uint16_t*>(block + scales_at(width));
    scales[place] = round(key, width, 128, rounded[0]);  // plus 128: see Int8
    scales[kBlock + place] = round(value, width, 0, rounded[1]);
    scatter(rounded[0], rounded[1], width, place, block);
  }

  // To steps of the scale that is returned, in bfloat16: rounded itself, it makes nothing larger than 127.3 steps.
  static uint16_t round(const float* values, int width, int plus, int8_t* to) {
    Floats most = floats(1e-30f);
    for (int i = 0; i < width; i += kLanes) most = max(most, magnitude(load(values + i)));
    const uint16_t scale = to_bfloat16(max_of(most) / 127.0f);
    const Floats inverse = floats(1.0f / from_bfloat16(scale));
    for (int i = 0; i < width; i += kLanes) store_bytes(to + i, add(rounded(load(values + i) * inverse), ints(plus)));
    return scale;
  }

  static Floats key_scales(const char* block, int width) { return from_bfloat16(scales_of(block, width)); }

  static Floats value_scales(const char* block, int width) { return from_bfloat16(scales_of(block, width) + kBlock); }

  // Weights [rows][kChunk] of float32 to steps, from 0 to 255, in place: units, which take less room.
  static const Weight* convert(float* weights, int rows, int count, const float* steps) {
    auto* units = reinterpret_cast<Weight*>(weights);
    for (int r = 0; r < rows; ++r) {
      const Floats inverse = floats(1.0f / steps[r]);
      for (int k = 0; k < count; k += kLanes)
        store_units(units + r * kChunk + k / Kind::kPerUnit, rounded(load(weights + r * kChunk + k) * inverse));
    }
    return units;
  }
  static Floats reach_of(Floats weights) { return reach(weights); }
  // Of weights that reach as far as `largest`.
  static float step_of(float largest) { return std::max(largest, 1e-30f) / 255.0f; }

  template <int rows, int vectors>
  INLINED static void step(Ints (&acc)[rows][vectors], const Ints (&values)[vectors], const Weight* weights, int64_t stride) {
    add_products<true>(acc, values, weights, stride);
  }
};

}  // namespace kernels
