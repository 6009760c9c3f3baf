// How the rows of maps are packed for the convolution: moved from memory, and back.

#pragma once

#include "rows.h"
#include "tiles.h"

namespace {

struct Problem {
    int64_t images, heads, dim, height, width, kernel, stride, dilation;
    int64_t bands;  // into which the rows of an image are cut
    int64_t parts;  // of the work on all bands of all images, each with its own sum for the gradient of the weight
};

struct Layout {  // of a block of up to LANES channels of every head, and of the rows of maps packed for it
    int64_t heads, inputs, dim, height, width, kernel, stride, dilation, pad, out_height, out_width;
    int64_t valid;            // channels of the block
    int64_t padded, pixels;   // channels and pixels of a vector: padded * pixels = LANES
    int64_t vectors;          // of a row of results
    int64_t phase;            // numbers of a packed row of inputs whose columns have one remainder modulo the stride
    int64_t input_map, input_row, input_slots;
    int64_t margin, grad_map, grad_row, grad_slots;
    int64_t chunk;            // rows of results that are computed together
    std::vector<int64_t> place;          // of a column in a packed row of an input
    std::vector<int64_t> result_place;   // of a column in a row of the gradient of an input
    std::vector<int64_t> input_offset;   // of the taps (input, kx) in a packed row of inputs
    std::vector<int64_t> grad_offset;    // of the taps (head, kx) in a packed row of gradients, phase by phase
    std::vector<int64_t> grad_taps;      // where the taps of each phase begin
    Tiling results;                      // of a row
    std::vector<Tiling> input_grads;     // of each phase of a row of the gradient of an input
    std::vector<Piece> correlated, correlated_taps[MOST_OUTS + 1];  // heads and taps that are correlated together

    Layout(const Problem &p, int64_t channels)
        : heads(p.heads), inputs(3 * p.heads), dim(p.dim), height(p.height), width(p.width), kernel(p.kernel),
          stride(p.stride), dilation(p.dilation), pad(p.dilation * (p.kernel / 2)),
          out_height((p.height + p.stride - 1) / p.stride), out_width((p.width + p.stride - 1) / p.stride),
          valid(channels), padded(1) {
        while (padded < valid) padded *= 2;
        pixels = LANES / padded;
        vectors = (out_width + pixels - 1) / pixels;
        const int64_t shift = (kernel - 1) * dilation / stride;
        phase = whole(std::max(vectors * pixels + shift, (width + 2 * pad + stride - 1) / stride) + pixels);
        input_map = stride * phase;
        input_row = inputs * input_map;
        margin = pad / stride;
        grad_map = whole(margin + std::max(vectors * pixels, (width - 1 + pad) / stride + 1) + pixels);
        grad_row = heads * grad_map;
        chunk = std::min(out_height, (48 + vectors - 1) / vectors);
        input_slots = (chunk - 1) * stride + 2 * pad + 1;
        grad_slots = chunk + (2 * pad + stride - 1) / stride + 1;
        for (int64_t x = 0; x < width; x++) {
            int64_t f = (x + pad) % stride;
            place.push_back(f * phase + (x + pad) / stride * padded);
            result_place.push_back(f * phase + (x - column(f)) / stride * padded);
        }
        for (int64_t m = 0; m < inputs; m++)
            for (int64_t kx = 0; kx < kernel; kx++)
                input_offset.push_back(m * input_map + kx * dilation % stride * phase +
                                       kx * dilation / stride * padded);
        for (int64_t f = 0; f < stride; f++) {
            grad_taps.push_back(grad_offset.size());
            for (int64_t n = 0; n < heads; n++)
                for (int64_t kx = 0; kx < kernel; kx++)
                    if (kx * dilation % stride == f)
                        grad_offset.push_back(n * grad_map +
                                              (margin + (column(f) + pad - kx * dilation) / stride) * padded);
        }
        grad_taps.push_back(grad_offset.size());
        results = Tiling(heads, vectors);
        for (int64_t f = 0; f < stride; f++)
            input_grads.push_back(Tiling(heads, (columns(f) + pixels - 1) / pixels));
        correlated = cut(heads, MOST_OUTS);
        for (int outs = 1; outs <= MOST_OUTS; outs++)
            for (auto [start, size] : cut(heads * kernel, outs * 6 <= MOST_SUMS ? 2 : 1))
                correlated_taps[outs].push_back({3 * start, 3 * size});
    }

    int64_t whole(int64_t count) const { return (count + pixels - 1) / pixels * LANES; }  // numbers in whole vectors
    int64_t column(int64_t f) const { return ((f - pad) % stride + stride) % stride; }     // the first one of phase f
    int64_t columns(int64_t f) const { return std::max<int64_t>(0, width - column(f) + stride - 1) / stride; }
    int64_t taps() const { return kernel * kernel; }
    int64_t weights() const { return heads * inputs * taps(); }
};

// A row of q, k or v, from the block's first channel on, into a packed row of l.heads maps.
void pack_input(const Layout &l, const Map &map, const S *row, T *packed, T *line) {
    const int64_t width = l.width, heads = l.heads, pitch = l.input_map, column = map.column;
    const int64_t step = l.dim * map.channel;
    const int64_t *place = l.place.data();  // what is loaded into locals need not be loaded again after each store
    for (int64_t f = 0; f < l.stride; f++) {  // zeros around the columns
        const int64_t count = l.columns(f), start = count ? (l.column(f) + l.pad) / l.stride * l.padded : l.phase;
        for (T *begin = packed + f * l.phase, *end = begin + heads * pitch; begin < end; begin += pitch) {
            std::fill(begin, begin + start, T(0));
            std::fill(begin + start + count * l.padded, begin + l.phase, T(0));
        }
    }
    if (map.channel == 1 && l.valid == LANES) {
        for (int64_t x = 0; x < width; x++)
            for (int64_t m = 0; m < heads; m++) store(packed + m * pitch + place[x], read(row + x * column + m * step));
        return;
    }
    bool done = map.column == 1 && choose<1, 2, 4, 8, 16>(l.padded, [&](auto padded) {
        for (int64_t m = 0; m < l.heads; m++) {
            T *to = packed + m * l.input_map;
            T *pixels = l.stride == 1 ? to + l.place[0] : line;
            pixels_from_planes<padded>(row + m * step, map.channel, l.valid, l.width, pixels);
            for (int64_t x = 0; l.stride > 1 && x < width; x++) std::copy_n(line + x * padded, padded, to + place[x]);
        }
    });
    done = done || (map.channel == 1 && l.valid == l.padded && choose<1, 2, 4, 8>(l.padded, [=](auto padded) {
        for (int64_t x = 0; x < width; x++) {
            const S *from = row + x * column;
            T *to = packed + place[x];
            for (int64_t m = 0; m < heads; m++, from += step, to += pitch) copy_pixel<padded>(from, to);
        }
    }));
    if (done) return;
    for (int64_t m = 0; m < l.heads; m++)
        for (int64_t x = 0; x < l.width; x++)
            for (int64_t c = 0; c < l.padded; c++)
                packed[m * l.input_map + l.place[x] + c] =
                    c < l.valid ? T(row[m * step + c * map.channel + x * map.column]) : T(0);
}

// The inverse of pack_input for gradients.
void unpack_input_grad(const Layout &l, const Map &map, const T *packed, S *row, T *line) {
    const int64_t width = l.width, heads = l.heads, pitch = l.input_map, column = map.column;
    const int64_t step = l.dim * map.channel;
    const int64_t *place = l.result_place.data();
    if (map.channel == 1 && l.valid == LANES) {
        for (int64_t x = 0; x < width; x++)
            for (int64_t m = 0; m < heads; m++) write(row + x * column + m * step, load(packed + m * pitch + place[x]));
        return;
    }
    bool done = map.column == 1 && choose<1, 2, 4, 8, 16>(l.padded, [&](auto padded) {
        for (int64_t m = 0; m < l.heads; m++) {
            const T *from = packed + m * l.input_map;
            for (int64_t x = 0; l.stride > 1 && x < width; x++) std::copy_n(from + place[x], padded, line + x * padded);
            const T *pixels = l.stride == 1 ? from + l.result_place[0] : line;
            planes_from_pixels<padded>(pixels, map.channel, l.valid, l.width, row + m * step);
        }
    });
    done = done || (map.channel == 1 && l.valid == l.padded && choose<1, 2, 4, 8>(l.padded, [=](auto padded) {
        for (int64_t x = 0; x < width; x++) {
            const T *from = packed + place[x];
            S *to = row + x * column;
            for (int64_t m = 0; m < heads; m++, from += pitch, to += step) copy_pixel<padded>(from, to);
        }
    }));
    if (done) return;
    for (int64_t m = 0; m < l.heads; m++)
        for (int64_t x = 0; x < l.width; x++)
            for (int64_t c = 0; c < l.valid; c++)
                row[m * step + c * map.channel + x * map.column] = S(packed[m * l.input_map + l.result_place[x] + c]);
}

// Vectors of a row of outputs whose numbers lie in memory as those of all heads in turn do, none left out; `pitch` from
// one to the next.
int64_t mixed_vectors(const Layout &l, const Map &map, int64_t *pitch) {
    *pitch = l.pixels == 1 ? map.column : LANES * l.heads;
    bool dense = l.pixels == 1 || map.column == l.padded * l.heads;
    return map.channel == 1 && l.valid == l.padded && dense ? l.out_width / l.pixels : 0;
}

// A row of the output's gradient, channels (dim, heads), into a packed row.
void pack_grad(const Layout &l, const Map &map, const S *row, T *packed) {
    const int64_t step = l.heads * map.channel;
    for (int64_t n = 0; n < l.heads; n++) {
        T *begin = packed + n * l.grad_map, *inside = begin + l.margin * l.padded;
        std::fill(begin, inside, T(0));
        std::fill(inside + l.out_width * l.padded, begin + l.grad_map, T(0));
    }
    bool done = map.column == 1 && choose<1, 2, 4, 8, 16>(l.padded, [&](auto padded) {
        for (int64_t n = 0; n < l.heads; n++)
            pixels_from_planes<padded>(row + n * map.channel, step, l.valid, l.out_width,
                                       packed + n * l.grad_map + l.margin * l.padded);
    });
    if (done) return;
    int64_t pitch, whole = mixed_vectors(l, map, &pitch);
    done = whole && choose<1, 2, 3, 4, 6, 8, 12, 16, 24>(l.heads, [&](auto heads) {
        rows_from_heads<heads>(row, pitch, whole, l.grad_map, packed + l.margin * l.padded);
    });
    for (int64_t n = 0; n < l.heads; n++)
        for (int64_t x = done ? whole * l.pixels : 0; x < l.out_width; x++)
            for (int64_t c = 0; c < l.padded; c++)
                packed[n * l.grad_map + (l.margin + x) * l.padded + c] =
                    c < l.valid ? T(row[c * step + n * map.channel + x * map.column]) : T(0);
}

// A row of results into the output, channels (dim, heads).
void unpack_output(const Layout &l, const Map &map, const T *rows, S *row) {
    const int64_t step = l.heads * map.channel, length = l.vectors * LANES;
    bool done = map.column == 1 && choose<1, 2, 4, 8, 16>(l.padded, [&](auto padded) {
        for (int64_t n = 0; n < l.heads; n++)
            planes_from_pixels<padded>(rows + n * length, step, l.valid, l.out_width, row + n * map.channel);
    });
    if (done) return;
    int64_t pitch, whole = mixed_vectors(l, map, &pitch);
    done = whole && choose<1, 2, 3, 4, 6, 8, 12, 16, 24>(l.heads, [&](auto heads) {
        heads_from_rows<heads>(rows, length, whole, pitch, row);
    });
    for (int64_t x = done ? whole * l.pixels : 0; x < l.out_width; x++)
        for (int64_t c = 0; c < l.valid; c++)
            for (int64_t n = 0; n < l.heads; n++)
                row[c * step + n * map.channel + x * map.column] = S(rows[n * length + x * l.padded + c]);
}

// The lines of memory of a row of a map, as bytes from its start: of `count` channels, `times` times, `step` between.
std::vector<int64_t> lines(const Map &map, int64_t width, int64_t count, int64_t times = 1, int64_t step = 0) {
    constexpr int64_t LINE = 64;
    std::vector<int64_t> offsets;
    auto add = [&](int64_t first, int64_t length) {
        const int64_t size = sizeof(S);
        for (int64_t at = first * size; at < (first + length) * size; at += LINE)
            if (offsets.empty() || at < offsets.back() || at >= offsets.back() + LINE) offsets.push_back(at);
    };
    if (map.channel == 1) {
        for (int64_t x = 0; x < width; x++)
            for (int64_t i = 0; i < times; i++) add(x * map.column + i * step, count);
    } else if (map.column == 1) {
        for (int64_t i = 0; i < times; i++)
            for (int64_t c = 0; c < count; c++) add(i * step * map.channel + c * map.channel, width);
    }
    return offsets;
}

}  // namespace
