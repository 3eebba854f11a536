// Memory that is kept between calls: no allocation once the largest batch has been seen.
#pragma once

#include <cstdint>
#include <vector>

#include "vectors.h"

namespace kernels {

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

}  // namespace kernels
