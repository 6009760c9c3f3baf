// How the numbers of several vectors are brought into turn, and back.

#pragma once

#include <utility>

#include "maps.h"

namespace {

template <int... I>
inline Vec zip_low(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / 2 + I % 2 * LANES)...);
}

template <int... I>
inline Vec zip_high(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (LANES / 2 + I / 2 + I % 2 * LANES)...);
}

template <int FIRST, int... I>
inline Vec every_second(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
}

using Lanes = std::make_integer_sequence<int, LANES>;

// Vector PART of a, b, c zipped by threes.
template <int PART, int... I>
inline Vec zip3(Vec a, Vec b, Vec c, std::integer_sequence<int, I...>) {
    Vec two = __builtin_shufflevector(a, b, ((PART * LANES + I) % 3 % 2 * LANES + (PART * LANES + I) / 3)...);
    return __builtin_shufflevector(two, c, ((PART * LANES + I) % 3 == 2 ? LANES + (PART * LANES + I) / 3 : I)...);
}

// Every third of the lanes of a, b, c, from FIRST.
template <int FIRST, int... I>
inline Vec every_third(Vec a, Vec b, Vec c, std::integer_sequence<int, I...>) {
    Vec two = __builtin_shufflevector(a, b, ((3 * I + FIRST) % (2 * LANES))...);
    return __builtin_shufflevector(two, c, (3 * I + FIRST < 2 * LANES ? I : 3 * I + FIRST - LANES)...);
}

// COUNT vectors become one sequence that takes a number of each in turn; COUNT is a power of two, or three times one.
template <int COUNT>
inline void interleave(Vec (&v)[COUNT]) {
    Vec next[COUNT];
#pragma GCC unroll 8
    for (int rest = COUNT; rest % 2 == 0; rest /= 2) {
#pragma GCC unroll 32
        for (int i = 0; i < COUNT / 2; i++) {
            next[2 * i] = zip_low(v[i], v[i + COUNT / 2], Lanes());
            next[2 * i + 1] = zip_high(v[i], v[i + COUNT / 2], Lanes());
        }
#pragma GCC unroll 32
        for (int i = 0; i < COUNT; i++) v[i] = next[i];
    }
    if constexpr (COUNT % 3 == 0) {
        constexpr int THIRD = COUNT / 3;
#pragma GCC unroll 32
        for (int i = 0; i < THIRD; i++) {
            next[3 * i] = zip3<0>(v[i], v[i + THIRD], v[i + 2 * THIRD], Lanes());
            next[3 * i + 1] = zip3<1>(v[i], v[i + THIRD], v[i + 2 * THIRD], Lanes());
            next[3 * i + 2] = zip3<2>(v[i], v[i + THIRD], v[i + 2 * THIRD], Lanes());
        }
#pragma GCC unroll 32
        for (int i = 0; i < COUNT; i++) v[i] = next[i];
    }
}

// The inverse of interleave.
template <int COUNT>
inline void deinterleave(Vec (&v)[COUNT]) {
    Vec next[COUNT];
    if constexpr (COUNT % 3 == 0) {
        constexpr int THIRD = COUNT / 3;
#pragma GCC unroll 32
        for (int i = 0; i < THIRD; i++) {
            next[i] = every_third<0>(v[3 * i], v[3 * i + 1], v[3 * i + 2], Lanes());
            next[i + THIRD] = every_third<1>(v[3 * i], v[3 * i + 1], v[3 * i + 2], Lanes());
            next[i + 2 * THIRD] = every_third<2>(v[3 * i], v[3 * i + 1], v[3 * i + 2], Lanes());
        }
#pragma GCC unroll 32
        for (int i = 0; i < COUNT; i++) v[i] = next[i];
    }
#pragma GCC unroll 8
    for (int rest = COUNT; rest % 2 == 0; rest /= 2) {
#pragma GCC unroll 32
        for (int i = 0; i < COUNT / 2; i++) {
            next[i] = every_second<0>(v[2 * i], v[2 * i + 1], Lanes());
            next[i + COUNT / 2] = every_second<1>(v[2 * i], v[2 * i + 1], Lanes());
        }
#pragma GCC unroll 32
        for (int i = 0; i < COUNT; i++) v[i] = next[i];
    }
}

}  // namespace
