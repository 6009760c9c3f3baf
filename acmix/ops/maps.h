// What the C++ sources of this folder share: vectors of LANES numbers of type T, maps in memory, scratch memory.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef T Vec __attribute__((vector_size(LANES * sizeof(T))));
typedef T Loose __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));

inline Vec load(const T *p) { return *reinterpret_cast<const Loose *>(p); }
inline void store(T *p, Vec v) { *reinterpret_cast<Loose *>(p) = v; }

// A map (images, channels, rows, columns) as it lies in memory; strides in elements.
struct Map {
    T *data;
    int64_t image, channel, row, column;
};

// Memory that stays with the thread: fresh pages would cost as much as the arithmetic.
T *scratch(int64_t size) {
    static thread_local std::vector<T> memory;
    if (memory.size() < size_t(size)) memory.resize(size);
    return memory.data();
}

}  // namespace
