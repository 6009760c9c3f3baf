// What the C++ sources of this folder share: vectors of LANES numbers of type T, maps of type S in memory, threads,
// scratch memory.

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

// The upper half of a float.
struct Bfloat16 {
    uint16_t bits;
    Bfloat16() = default;
    Bfloat16(float value) {  // to the nearest, ties to even
        uint32_t b;
        std::memcpy(&b, &value, sizeof b);
        bits = value == value ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fc0;
    }
    operator float() const {
        uint32_t b = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &b, sizeof value);
        return value;
    }
};

// A map (images, channels, rows, columns) as it lies in memory; strides in elements.
struct Map {
    S *data;
    int64_t image, channel, row, column;
};

// Memory that stays with the thread: fresh pages would cost as much as the arithmetic.
T *scratch(int64_t size) {
    static thread_local std::vector<T> memory;
    if (memory.size() < size_t(size)) memory.resize(size);
    return memory.data();
}

// `count` numbers, fewer than LANES, in powers of two, whose sizes the compiler knows. It would make a masked store of a
// plain loop, for which GCC 12 takes an instruction (vextractf64x4) that also touches what the mask leaves out: a fault
// where a map ends with its page.
inline void copy_some(const S *from, S *to, int64_t count) {
#pragma GCC unroll 8
    for (int n = LANES / 2; n > 0; n /= 2)
        if (count & n) {
            std::memcpy(to, from, n * sizeof(S));
            to += n, from += n;
        }
}

// work(i) for i in begin..end-1, in any order, each on one thread.
template <class Work>
void parallel(int64_t begin, int64_t end, [[maybe_unused]] int64_t threads, Work work) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t i = begin; i < end; i++) work(i);
        return;
    }
#endif
    for (int64_t i = begin; i < end; i++) work(i);
}

}  // namespace
