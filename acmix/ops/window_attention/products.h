// Products of small matrices that lie in the cache, all of whose sums are kept in registers.

#pragma once

#include "registers.h"

namespace {

constexpr int MOST_ROWS = REGISTERS == 32 ? 7 : 5, MOST_VECTORS = 2;  // of a tile of sums

// out[row] = sum_t left(row, t) * right[t]: rows of right and out are `pitch` and `out_pitch` apart and padded to whole
// vectors.
struct Product {
    int64_t count;  // of t
    int64_t left_row, left_step, pitch, out_pitch;
};

template <int ROWS, int VECTORS>
__attribute__((noinline)) void product_tile(const Product &p, const T *left, const T *right, T *out) {
    Vec sum[ROWS][VECTORS] = {};
    const int64_t row = p.left_row, step = p.left_step, pitch = p.pitch;
    for (int64_t t = p.count; t > 0; t--, left += step, right += pitch) {
        Vec values[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            values[v] = load(right + v * LANES);
            keep(values[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[r][v] += values[v] * left[r * row];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) store(out + r * p.out_pitch + v * LANES, sum[r][v]);
}

template <int ROWS>
void product_rows(int64_t rows, bool two, const Product &p, const T *left, const T *right, T *out) {
    if constexpr (ROWS > 0) {
        if (rows != ROWS) return product_rows<ROWS - 1>(rows, two, p, left, right, out);
        two ? product_tile<ROWS, 2>(p, left, right, out) : product_tile<ROWS, 1>(p, left, right, out);
    }
}

// `rows` rows of `width` numbers, a multiple of LANES.
void multiply(const Product &p, int64_t rows, int64_t width, const T *left, const T *right, T *out) {
    for (int64_t x = 0; x < width; x += MOST_VECTORS * LANES)
        for (int64_t row = 0, blocks = (rows + MOST_ROWS - 1) / MOST_ROWS; row < rows; blocks--) {
            const int64_t size = (rows - row) / blocks;  // blocks as equal as can be
            product_rows<MOST_ROWS>(size, x + LANES < width, p, left + row * p.left_row, right + x,
                                    out + row * p.out_pitch + x);
            row += size;
        }
}

}  // namespace
