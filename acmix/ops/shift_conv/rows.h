// Rows of maps as the convolution wants them, and back: PADDED channels of a pixel side by side, pixels in order.

#pragma once

#include <type_traits>
#include <utility>

#include "maps.h"

namespace {

typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));

template <class Stored = S>
inline Vec read(const Stored *p) {
    if constexpr (std::is_same_v<Stored, T>) {
        return load(reinterpret_cast<const T *>(p));
    } else {
        Halves halves;
        std::memcpy(&halves, p, sizeof halves);
        Words words = __builtin_convertvector(halves, Words) << 16;
        Vec value;
        std::memcpy(&value, &words, sizeof value);
        return value;
    }
}

template <class Stored = S>
inline void write(Stored *p, Vec value) {
    if constexpr (std::is_same_v<Stored, T>) {
        store(reinterpret_cast<T *>(p), value);
    } else {  // as Bfloat16 rounds a single number
        Words words;
        std::memcpy(&words, &value, sizeof words);
        Words nan = Words((words & 0x7fffffff) > 0x7f800000);
        words = (words + 0x7fff + (words >> 16 & 1)) >> 16;
        words = (words & ~nan) | (0x7fc0 & nan);
        Halves halves = __builtin_convertvector(words, Halves);
        std::memcpy(p, &halves, sizeof halves);
    }
}

// The first `count` lanes, the others zero. Compilers make masked loads of the loop.
inline Vec read(const S *p, int64_t count) {
    S values[LANES];
    for (int i = 0; i < LANES; i++) values[i] = i < count ? p[i] : S(0);
    return read(values);
}

inline void write(S *p, Vec value, int64_t count) {
    S values[LANES];
    write(values, value);
    copy_some(values, p, count);
}

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

// Pixels of COUNT channels each (`pixels`) from `valid` planes that lie `step` apart; the other channels are zero.
template <int COUNT>
void pixels_from_planes(const S *planes, int64_t step, int64_t valid, int64_t width, T *pixels) {
    for (int64_t x = 0; x < width; x += LANES) {
        int64_t rest = std::min<int64_t>(LANES, width - x);
        Vec v[COUNT];
#pragma GCC unroll 16
        for (int c = 0; c < COUNT; c++) {
            const S *from = planes + c * step + x;
            v[c] = c >= valid ? Vec{} : rest == LANES ? read(from) : read(from, rest);
        }
        interleave<COUNT>(v);
#pragma GCC unroll 16
        for (int c = 0; c < COUNT; c++)
            if (c * LANES < rest * COUNT) store(pixels + x * COUNT + c * LANES, v[c]);
    }
}

// The inverse of pixels_from_planes; reads whole blocks of LANES pixels.
template <int COUNT>
void planes_from_pixels(const T *pixels, int64_t step, int64_t valid, int64_t width, S *planes) {
    for (int64_t x = 0; x < width; x += LANES) {
        int64_t rest = std::min<int64_t>(LANES, width - x);
        Vec v[COUNT];
#pragma GCC unroll 16
        for (int c = 0; c < COUNT; c++) v[c] = load(pixels + x * COUNT + c * LANES);
        deinterleave<COUNT>(v);
#pragma GCC unroll 16
        for (int c = 0; c < COUNT; c++) {
            S *to = planes + c * step + x;
            if (c >= valid) break;
            if (rest == LANES) write(to, v[c]);
            else write(to, v[c], rest);
        }
    }
}

// `count` vectors of each of HEADS rows (`step` apart) from places whose numbers take the heads in turn, `pitch` apart.
template <int HEADS>
void rows_from_heads(const S *mixed, int64_t pitch, int64_t count, int64_t step, T *rows) {
    for (int64_t x = 0; x < count; x++) {
        Vec v[HEADS];
#pragma GCC unroll 32
        for (int n = 0; n < HEADS; n++) v[n] = read(mixed + x * pitch + n * LANES);
        deinterleave<HEADS>(v);
#pragma GCC unroll 32
        for (int n = 0; n < HEADS; n++) store(rows + n * step + x * LANES, v[n]);
    }
}

// The inverse of rows_from_heads.
template <int HEADS>
void heads_from_rows(const T *rows, int64_t step, int64_t count, int64_t pitch, S *mixed) {
    for (int64_t x = 0; x < count; x++) {
        Vec v[HEADS];
#pragma GCC unroll 32
        for (int n = 0; n < HEADS; n++) v[n] = load(rows + n * step + x * LANES);
        interleave<HEADS>(v);
#pragma GCC unroll 32
        for (int n = 0; n < HEADS; n++) write(mixed + x * pitch + n * LANES, v[n]);
    }
}

template <int COUNT, class From, class To>
inline void copy_pixel(const From *from, To *to) {
    To values[COUNT];
    for (int c = 0; c < COUNT; c++) values[c] = To(from[c]);
    std::memcpy(to, values, sizeof values);
}

// work(std::integral_constant<int, C>()) for the C of the list that equals `count`; whether there is one.
template <int... C, class Work>
bool choose(int64_t count, Work work) {
    return ((count == C && (work(std::integral_constant<int, C>()), true)) || ...);
}

}  // namespace
