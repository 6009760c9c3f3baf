// Vectors of pixels (LANES of one channel) and of channels (CHANNELS of one pixel), and how one becomes the other.

#pragma once

#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "registers.h"

namespace {

typedef T Pixel __attribute__((vector_size(CHANNELS * sizeof(T))));
typedef T LoosePixel __attribute__((vector_size(CHANNELS * sizeof(T)), aligned(sizeof(T)), may_alias));

inline Pixel load_pixel(const T *p) { return *reinterpret_cast<const LoosePixel *>(p); }
inline void store_pixel(T *p, Pixel v) { *reinterpret_cast<LoosePixel *>(p) = v; }

// Vectors of the bits of N numbers. The size of a vector cannot depend on a template's argument.
template <int N>
struct Bits;
#define BITS(N)                                                     \
    template <>                                                     \
    struct Bits<N> {                                                \
        typedef uint16_t Half __attribute__((vector_size(N * 2)));  \
        typedef uint32_t Whole __attribute__((vector_size(N * 4))); \
    };
BITS(LANES)
#if CHANNELS != LANES
BITS(CHANNELS)
#endif
#undef BITS

// A vector V of numbers that lie in memory as S.
template <class V>
inline V widen(const S *p) {
    V v;
    if constexpr (std::is_same_v<S, T>) {
        std::memcpy(&v, p, sizeof v);
    } else {
        typedef Bits<sizeof(V) / sizeof(T)> Numbers;
        typename Numbers::Half half;
        std::memcpy(&half, p, sizeof half);
        typename Numbers::Whole bits = __builtin_convertvector(half, typename Numbers::Whole) << 16;
        std::memcpy(&v, &bits, sizeof v);
    }
    return v;
}

template <class V>
inline void narrow(S *p, V v) {
    if constexpr (std::is_same_v<S, T>) {
        std::memcpy(p, &v, sizeof v);
    } else {  // as Bfloat16 rounds a single number
        typedef Bits<sizeof(V) / sizeof(T)> Numbers;
        typename Numbers::Whole bits;
        std::memcpy(&bits, &v, sizeof v);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        bits = v == v ? bits : typename Numbers::Whole{} + 0x7fc0;
        typename Numbers::Half half = __builtin_convertvector(bits, typename Numbers::Half);
        std::memcpy(p, &half, sizeof half);
    }
}

// The first `count` lanes of a vector of pixels. Compilers make a masked load of this loop.
inline Vec widen_some(const S *p, int64_t count) {
    S some[LANES];
#pragma GCC unroll 1
    for (int x = 0; x < LANES; x++) some[x] = x < count ? p[x] : S(0);
    return widen<Vec>(some);
}

inline void narrow_some(S *p, Vec v, int64_t count) {
    S some[LANES];
    narrow<Vec>(some, v);
    copy_some(some, p, count);
}

// Lanes of a and b: FROM, FROM + STEP, ... where STEP is given; else from FROM on of each in turn.
template <int FROM, int STEP, int... I>
inline Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (STEP ? FROM + I * STEP : FROM + I / 2 + I % 2 * LANES)...);
#else
    typedef decltype(a < b) Indices;
    return __builtin_shuffle(a, b, Indices{(STEP ? FROM + I * STEP : FROM + I / 2 + I % 2 * LANES)...});
#endif
}
constexpr std::make_integer_sequence<int, LANES> ALL{};

// LANES pixels, from pixel after pixel to channel after channel.
inline void split_channels(Vec (&v)[CHANNELS]) {
#pragma GCC unroll 8
    for (int n = 1; n < CHANNELS; n *= 2) {
        Vec next[CHANNELS];
#pragma GCC unroll 16
        for (int i = 0; i < CHANNELS / 2; i++) {
            next[i] = pick<0, 2>(v[2 * i], v[2 * i + 1], ALL);
            next[i + CHANNELS / 2] = pick<1, 2>(v[2 * i], v[2 * i + 1], ALL);
        }
#pragma GCC unroll 16
        for (int i = 0; i < CHANNELS; i++) v[i] = next[i];
    }
}

// And back.
inline void join_channels(Vec (&v)[CHANNELS]) {
#pragma GCC unroll 8
    for (int n = 1; n < CHANNELS; n *= 2) {
        Vec next[CHANNELS];
#pragma GCC unroll 16
        for (int i = 0; i < CHANNELS / 2; i++) {
            next[2 * i] = pick<0, 0>(v[i], v[i + CHANNELS / 2], ALL);
            next[2 * i + 1] = pick<LANES / 2, 0>(v[i], v[i + CHANNELS / 2], ALL);
        }
#pragma GCC unroll 16
        for (int i = 0; i < CHANNELS; i++) v[i] = next[i];
    }
}

}  // namespace
