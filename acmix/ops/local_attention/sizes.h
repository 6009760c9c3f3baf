// The sizes of a problem and of what is kept in memory for it.

#pragma once

#include "vectors.h"

namespace {

constexpr int ROWS = 4;  // of queries that are done together

struct Problem {
    int64_t heads, dim, height, width, stride, dilation;
    int64_t group;  // heads of an image that are done together
};

// Which rows of queries of a block see a row of keys: row[n] does as row ky[n] of its window.
struct Seen {
    int count = 0;
    int row[ROWS], ky[ROWS];
};

struct Sizes {
    int64_t dim, height, width, stride, dilation, group, reach, out_height, out_width;
    int64_t parts;          // of a head, in a wide row
    int64_t tile, tiles;    // queries of a row that are done together, and how many such tiles a row has
    int64_t phase;          // columns of one remainder modulo the stride in a tall row of keys
    int64_t pitch;          // from channel to channel in a tall row of keys
    int64_t columns;        // in a wide row of keys: reflected columns on both sides, zeros at the end
    int64_t query_columns;  // in a wide row of queries: zeros at the end
    int64_t capacity;       // of a ring of rows of keys
    int64_t offset[K];      // where the keys of a window column begin for query 0, in a tall row of keys
    std::vector<Seen> seen[ROWS + 1];  // for a block of so many rows: for each row of keys from the first that it sees
    std::vector<T> x, y;               // positions of columns and rows

    explicit Sizes(const Problem &p)
        : dim(p.dim), height(p.height), width(p.width), stride(p.stride), dilation(p.dilation), group(p.group),
          reach(p.dilation * (K / 2)), out_height((p.height + p.stride - 1) / p.stride),
          out_width((p.width + p.stride - 1) / p.stride), parts((p.dim + CHANNELS - 1) / CHANNELS),
          tile(tile_of(out_width)), tiles((out_width + tile - 1) / tile), x(positions(width)), y(positions(height)) {
        int64_t shift = (K - 1) * dilation / stride;
        phase = std::max<int64_t>(tiles * tile + shift, LANES);
        pitch = stride * phase + (stride * phase % 32 ? 0 : 8);  // so that channels differ in cache sets
        columns = std::max(width + 2 * reach, std::max(stride * phase, (tiles * tile - 1) * stride + 2 * reach + 1));
        query_columns = (tiles - 1) * tile + LANES;
        for (int64_t kx = 0; kx < K; kx++) offset[kx] = kx * dilation % stride * phase + kx * dilation / stride;
        for (int rows = 1; rows <= ROWS; rows++) seen[rows] = seen_by(rows);
        capacity = std::min(height, int64_t(seen[ROWS].size()));
    }

    // Of the tiles that cut a row into the fewest pieces, the smallest.
    static int64_t tile_of(int64_t width) {
        int64_t best = LANES;
        for (int64_t tile : {LANES * 7 / 8, LANES * 3 / 4, LANES / 2})
            if ((width + tile - 1) / tile == (width + LANES - 1) / LANES) best = tile;
        return best;
    }
    static std::vector<T> positions(int64_t size) {  // torch.linspace(-1, 1, size)
        std::vector<T> at(size, T(-1));
        T step = T(2) / T(size - 1);
        for (int64_t i = 1; i < size; i++) at[i] = i < size / 2 ? T(i) * step - 1 : 1 - T(size - 1 - i) * step;
        return at;
    }
    std::vector<Seen> seen_by(int rows) const {
        std::vector<Seen> seen((rows - 1) * stride + (K - 1) * dilation + 1);
        for (int row = 0; row < rows; row++)
            for (int ky = 0; ky < K; ky++) {
                Seen &here = seen[row * stride + ky * dilation];
                here.row[here.count] = row;
                here.ky[here.count++] = ky;
            }
        return seen;
    }

    int64_t all_parts() const { return group * parts; }
    int64_t channels() const { return all_parts() * CHANNELS; }
    // Rows end in room for what whole vectors hold beyond them: a cache line, so that pixels stay aligned.
    static constexpr int64_t ROOM = 64 / sizeof(T);
    int64_t wide_keys() const { return channels() * columns + ROOM; }
    int64_t tall_keys() const { return channels() * pitch + ROOM; }
    int64_t wide_queries() const { return channels() * query_columns + ROOM; }
    int64_t tall_queries() const { return tiles * channels() * ROWS * LANES; }
};

inline int64_t reflect(int64_t i, int64_t size) {
    i = i < 0 ? -i : i;
    return i >= size ? 2 * (size - 1) - i : i;
}

}  // namespace
