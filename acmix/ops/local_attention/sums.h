// The sums of products of attention, for a tile of queries: over channels in vectors of pixels, over windows in vectors
// of channels.

#pragma once

#include "sizes.h"

namespace {

// logits[n][kx][x] = sum_c queries[n][c][x] * keys[c][key of kx for query x], for N rows of queries, which share every
// vector of keys. `top` (LANES), where it is given, are maxima of all logits so far. Wide heads are summed SPAN channels
// at a time: one sum over all of them would err several times as much, which large logits, whose exponentials follow,
// do not bear; half as many on older machines, where products may be rounded before they are added.
template <int N, bool TOP>
__attribute__((noinline)) void products_of(const Sizes &s, const T *const *queries, const T *keys, T *const *logits,
                                           T *const *top) {
    constexpr int STEP = REGISTERS < 32 ? 3 : K <= 7 ? K : 5, SPAN = REGISTERS < 32 ? 16 : 32;
    for (int first = 0; first < K; first += STEP) {
        const T *at[STEP], *query[N];
        for (int i = 0; i < STEP; i++) at[i] = keys + s.offset[std::min(first + i, K - 1)];
        for (int n = 0; n < N; n++) query[n] = queries[n];
        for (int64_t start = 0; start < s.dim; start += SPAN) {
            const int64_t stop = std::min(start + SPAN, s.dim);
            const bool last = stop == s.dim;
            Vec sum[N][STEP] = {};
            for (int64_t c = start; c < stop; c++) {
                Vec value[N];
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) value[n] = load(query[n] + c * ROWS * LANES);
#pragma GCC unroll 8
                for (int i = 0; i < STEP; i++) {
                    Vec key = load(at[i] + c * s.pitch);
                    keep(key);
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++) sum[n][i] += value[n] * key;
                }
            }
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                Vec best = TOP && last ? load(top[n]) : Vec{};
#pragma GCC unroll 8
                for (int i = 0; i < STEP; i++)
                    if (first + i < K) {
                        T *logit = logits[n] + (first + i) * LANES;
                        Vec total = start > 0 ? load(logit) + sum[n][i] : sum[n][i];
                        store(logit, total);
                        if (TOP) best = total > best ? total : best;
                    }
                if (TOP && last) store(top[n], best);
            }
        }
    }
}

template <bool TOP>
void products(const Sizes &s, int count, const T *const *queries, const T *keys, T *const *logits,
              T *const *top = nullptr) {
    if (count == 1) products_of<1, TOP>(s, queries, keys, logits, top);
    if (count == 2) products_of<2, TOP>(s, queries, keys, logits, top);
    if (count == 3) products_of<3, TOP>(s, queries, keys, logits, top);
    if (count == 4) products_of<4, TOP>(s, queries, keys, logits, top);
}

// out[x] = scale[x] * sum_{ky, kx} weights[ky][kx][x] * rows[ky][key of kx for query x]
// STRIDE is that of a problem without dilation; 0 for any problem.
template <int TILE, int STRIDE>
__attribute__((noinline)) void gather(const Sizes &s, const T *weights, const T *const *rows, const T *scale, T *out) {
    Pixel sum[TILE] = {};
    for (int ky = 0; ky < K; ky++) {
        const T *row = rows[ky], *weight = weights + ky * K * LANES;
        if constexpr (STRIDE > 0) {
#pragma GCC unroll 64
            for (int j = 0; j < (TILE - 1) * STRIDE + K; j++) {
                Pixel value = load_pixel(row + j * CHANNELS);
                keep(value);
#pragma GCC unroll 16
                for (int x = 0; x < TILE; x++) {
                    const int kx = j - x * STRIDE;
                    if (kx >= 0 && kx < K) sum[x] += value * weight[kx * LANES + x];
                }
            }
        } else {
            for (int64_t kx = 0; kx < K; kx++)
#pragma GCC unroll 16
                for (int x = 0; x < TILE; x++)
                    sum[x] += load_pixel(row + (x * s.stride + kx * s.dilation) * CHANNELS) * weight[kx * LANES + x];
        }
    }
#pragma GCC unroll 16
    for (int x = 0; x < TILE; x++) store_pixel(out + x * CHANNELS, sum[x] * scale[x]);
}

// The most queries, of a whole fraction of a tile, whose keys fit into the registers.
constexpr int piece(int tile, int stride) {
    int most = tile;
    while (most > 1 && ((most - 1) * stride + K > REGISTERS - 4 || tile % most)) most--;
    return most;
}

// row[key of kx for query x] += sum_n weights[n][kx][x] * queries[n][x], for `count` rows of queries
template <int TILE, int STRIDE>
__attribute__((noinline)) void scatter(const Sizes &s, int count, const T *const *weights, const T *const *queries,
                                       T *row) {
    if constexpr (STRIDE > 0) {
        constexpr int PIECE = piece(TILE, STRIDE), KEYS = (PIECE - 1) * STRIDE + K;
#pragma GCC unroll 16
        for (int first = 0; first < TILE; first += PIECE) {
            T *keys = row + first * STRIDE * CHANNELS;
            Pixel sum[KEYS];
#pragma GCC unroll 64
            for (int j = 0; j < KEYS; j++) sum[j] = load_pixel(keys + j * CHANNELS);
            for (int n = 0; n < count; n++) {
                const T *weight = weights[n] + first, *query = queries[n] + first * CHANNELS;
#pragma GCC unroll 16
                for (int x = 0; x < PIECE; x++) {
                    Pixel value = load_pixel(query + x * CHANNELS);
                    keep(value);
#pragma GCC unroll 16
                    for (int kx = 0; kx < K; kx++) sum[x * STRIDE + kx] += value * weight[kx * LANES + x];
                }
            }
#pragma GCC unroll 64
            for (int j = 0; j < KEYS; j++) store_pixel(keys + j * CHANNELS, sum[j]);
        }
    } else {
        for (int n = 0; n < count; n++)
            for (int64_t kx = 0; kx < K; kx++)
#pragma GCC unroll 16
                for (int x = 0; x < TILE; x++) {
                    T *at = row + (x * s.stride + kx * s.dilation) * CHANNELS;
                    Pixel value = load_pixel(queries[n] + x * CHANNELS);
                    store_pixel(at, load_pixel(at) + value * weights[n][kx * LANES + x]);
                }
    }
}

// The variants of both that suit a size.
struct Sums {
    void (*gather)(const Sizes &, const T *, const T *const *, const T *, T *);
    void (*scatter)(const Sizes &, int, const T *const *, const T *const *, T *);

    explicit Sums(const Sizes &s) {
        if (s.tile == LANES / 2) choose<LANES / 2>(s);
        else if (s.tile == LANES * 3 / 4) choose<LANES * 3 / 4>(s);
        else if (s.tile == LANES * 7 / 8) choose<LANES * 7 / 8>(s);
        else choose<LANES>(s);
    }
    template <int TILE>
    void choose(const Sizes &s) {
        if (s.dilation == 1 && s.stride == 1) set<TILE, 1>();
        else if (s.dilation == 1 && s.stride == 2) set<TILE, 2>();
        else set<TILE, 0>();
    }
    template <int TILE, int STRIDE>
    void set() {
        gather = ::gather<TILE, STRIDE>;
        scatter = ::scatter<TILE, STRIDE>;
    }
};

}  // namespace
