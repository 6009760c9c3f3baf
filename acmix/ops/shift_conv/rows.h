// Rows of maps as the convolution wants them, and back: PADDED channels of a pixel side by side, pixels in order.

#pragma once

#include <type_traits>

#include "zip.h"

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
