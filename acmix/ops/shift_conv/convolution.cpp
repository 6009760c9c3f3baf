// The folded convolution path on a CPU: a grouped convolution of q, k and v, forward and backward; see cpp.py.
//
// Compiled once per (S, T, LANES): type of the maps, type of the sums, numbers per vector. Group c of the convolution
// takes channel c of every head of q, k and v, 3N maps in all, and gives N maps. A vector holds neighbouring channels c,
// so each tap of the kernel is one product with a vector of weights; where the heads are narrower than a vector, it holds
// several pixels of them. The rows in use are packed into a ring, so that they lie side by side in the cache.

#include "rows.h"

namespace {

struct Problem {
    int64_t images, heads, dim, height, width, kernel, stride, dilation;
    int64_t bands;  // into which the rows of an image are cut
    int64_t parts;  // of the work on all bands of all images, each with its own sum for the gradient of the weight
};

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
#if defined(__AVX__)
constexpr bool AVX = true;
#else
constexpr bool AVX = false;
#endif
constexpr int MOST_OUTS = 4, MOST_STEPS = 8;  // of a register tile: outputs, and vectors of each
constexpr int steps_of(int outs) { return std::min(MOST_STEPS, (REGISTERS == 32 ? 24 : 12) / outs); }

// Keeps a loaded vector in its register: compilers load it again for each of its uses, which then wait for the memory.
inline void keep(Vec &value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__x86_64__)
    if constexpr (sizeof(Vec) <= 16 || (sizeof(Vec) == 32 && AVX)) asm("" : "+x"(value));
#elif defined(__aarch64__)
    if constexpr (sizeof(Vec) == 16) asm("" : "+w"(value));
#endif
}

// The rows that a row of results is summed over. Tap t of each is at offset[t]; its weights are in the order of the taps.
struct Taps {
    std::vector<const T *> rows, weights;
    const int64_t *offset;
    int64_t count;
};

// STEPS neighbouring vectors of OUTS rows of results.
template <int OUTS, int STEPS>
__attribute__((noinline)) void convolve(const Taps &taps, int64_t x, T *out, int64_t out_pitch, int64_t pitch) {
    Vec sum[OUTS][STEPS] = {};
    for (size_t row = 0; row < taps.rows.size(); row++) {
        const T *from = taps.rows[row] + x, *weights = taps.weights[row];
        for (int64_t tap = 0; tap < taps.count; tap++, weights += OUTS * LANES) {
            const T *values = from + taps.offset[tap];
#pragma GCC unroll 8
            for (int i = 0; i < STEPS; i++) {
                Vec value = load(values + i * LANES);
                keep(value);
#pragma GCC unroll 4
                for (int n = 0; n < OUTS; n++) sum[n][i] += load(weights + n * LANES) * value;
            }
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < OUTS; n++)
#pragma GCC unroll 8
        for (int i = 0; i < STEPS; i++) store(out + n * out_pitch + i * pitch, sum[n][i]);
}

// Pairs of a row of gradients and a row of inputs, whose products are summed over x.
struct Pairs {
    std::vector<const T *> grads, inputs;
    int64_t head_pitch, vectors;
};

// Adds to sums[tap][n] the products of the gradients of OUTS heads with the inputs of STEPS taps.
template <int OUTS, int STEPS>
__attribute__((noinline)) void correlate(const Pairs &pairs, int64_t head, const int64_t *offset, T *sums) {
    Vec sum[STEPS][OUTS];
#pragma GCC unroll 8
    for (int t = 0; t < STEPS; t++)
#pragma GCC unroll 4
        for (int n = 0; n < OUTS; n++) sum[t][n] = load(sums + (t * OUTS + n) * LANES);
    for (size_t row = 0; row < pairs.grads.size(); row++) {
        const T *grads = pairs.grads[row] + head * pairs.head_pitch, *inputs = pairs.inputs[row];
        for (int64_t x = 0; x < pairs.vectors; x++, grads += LANES, inputs += LANES) {
            Vec grad[OUTS];
#pragma GCC unroll 4
            for (int n = 0; n < OUTS; n++) grad[n] = load(grads + n * pairs.head_pitch);
#pragma GCC unroll 8
            for (int t = 0; t < STEPS; t++) {
                Vec value = load(inputs + offset[t]);
                keep(value);
#pragma GCC unroll 4
                for (int n = 0; n < OUTS; n++) sum[t][n] += grad[n] * value;
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < STEPS; t++)
#pragma GCC unroll 4
        for (int n = 0; n < OUTS; n++) store(sums + (t * OUTS + n) * LANES, sum[t][n]);
}

using Convolve = void (*)(const Taps &, int64_t, T *, int64_t, int64_t);
using Correlate = void (*)(const Pairs &, int64_t, const int64_t *, T *);

template <int OUTS, int... I>
void list_tiles(Convolve *convolves, Correlate *correlates, std::integer_sequence<int, I...>) {
    ((convolves[I + 1] = convolve<OUTS, I + 1>, correlates[I + 1] = correlate<OUTS, I + 1>), ...);
}

struct Tiles {
    Convolve convolve[MOST_OUTS + 1][MOST_STEPS + 1];
    Correlate correlate[MOST_OUTS + 1][MOST_STEPS + 1];
    Tiles() { list(std::make_integer_sequence<int, MOST_OUTS>()); }
    template <int... I>
    void list(std::integer_sequence<int, I...>) {
        (list_tiles<I + 1>(convolve[I + 1], correlate[I + 1], std::make_integer_sequence<int, steps_of(I + 1)>()), ...);
    }
};
const Tiles tiles;

// work(start, size) for a cut of `count` into as few and as equal pieces of at most `most` as can be.
template <class Work>
inline void cut(int64_t count, int64_t most, Work work) {
    int64_t pieces = (count + most - 1) / most;
    for (int64_t i = 0, start = 0; i < pieces; i++) {
        int64_t size = (count - start) / (pieces - i);
        work(start, size);
        start += size;
    }
}

struct Layout {  // of one block of channels, and of the rows of maps packed for it
    int64_t heads, inputs, dim, height, width, kernel, stride, dilation, pad, out_height, out_width;
    int64_t first, valid;     // channels of the block
    int64_t padded, pixels;   // channels and pixels of a vector: padded * pixels = LANES
    int64_t vectors;          // of a row of results
    int64_t phase;            // numbers of a packed row of inputs whose columns have one remainder modulo the stride
    int64_t input_map, input_row, input_slots;
    int64_t margin, grad_map, grad_row, grad_slots;
    int64_t chunk;            // rows of results that are computed together
    std::vector<int64_t> place;          // of a column in a packed row of an input
    std::vector<int64_t> input_offset;   // of the taps (input, kx) in a packed row of inputs
    std::vector<int64_t> grad_offset;    // of the taps (head, kx) in a packed row of gradients, phase by phase
    std::vector<int64_t> grad_taps;      // where the taps of each phase begin

    Layout(const Problem &p, int64_t block)
        : heads(p.heads), inputs(3 * p.heads), dim(p.dim), height(p.height), width(p.width), kernel(p.kernel),
          stride(p.stride), dilation(p.dilation), pad(p.dilation * (p.kernel / 2)),
          out_height((p.height + p.stride - 1) / p.stride), out_width((p.width + p.stride - 1) / p.stride),
          first(block * LANES), valid(std::min<int64_t>(LANES, p.dim - first)), padded(1) {
        while (padded < valid) padded *= 2;
        pixels = LANES / padded;
        vectors = (out_width + pixels - 1) / pixels;
        const int64_t shift = (kernel - 1) * dilation / stride;
        phase = whole(std::max(vectors * pixels + shift, (width + 2 * pad + stride - 1) / stride) + pixels);
        input_map = stride * phase;
        input_row = inputs * input_map;
        margin = shift * padded;
        grad_map = whole(shift + std::max(vectors * pixels, (width - 1 + pad) / stride + 1 + pixels));
        grad_row = heads * grad_map;
        chunk = std::min(out_height, (48 + vectors - 1) / vectors);
        input_slots = (chunk - 1) * stride + 2 * pad + 1;
        grad_slots = chunk + (2 * pad + stride - 1) / stride + 1;
        for (int64_t x = 0; x < width; x++) place.push_back((x + pad) % stride * phase + (x + pad) / stride * padded);
        for (int64_t m = 0; m < inputs; m++)
            for (int64_t kx = 0; kx < kernel; kx++)
                input_offset.push_back(m * input_map + kx * dilation % stride * phase + kx * dilation / stride * padded);
        for (int64_t f = 0; f < stride; f++) {
            grad_taps.push_back(grad_offset.size());
            for (int64_t n = 0; n < heads; n++)
                for (int64_t kx = 0; kx < kernel; kx++)
                    if (kx * dilation % stride == f)
                        grad_offset.push_back(n * grad_map + margin + (column(f) + pad - kx * dilation) / stride * padded);
        }
        grad_taps.push_back(grad_offset.size());
    }

    int64_t whole(int64_t count) const { return (count + pixels - 1) / pixels * LANES; }  // numbers in whole vectors
    int64_t column(int64_t f) const { return ((f - pad) % stride + stride) % stride; }     // the first one of phase f
    int64_t taps() const { return kernel * kernel; }
    int64_t weights() const { return heads * inputs * taps() * LANES; }
};

// A vector of the block's weights (or their place in a gradient) for an output, an input and a tap.
inline int64_t weight_place(const Layout &l, int64_t n, int64_t m, int64_t ky, int64_t kx) {
    return ((n * l.inputs + m) * l.taps() + ky * l.kernel + kx) * l.dim + l.first;
}

inline Vec spread(const Layout &l, const T *weights) {
    if (l.valid == LANES) return load(weights);
    T values[LANES] = {};
    for (int64_t i = 0; i < LANES; i += l.padded) std::copy_n(weights, l.valid, values + i);
    return load(values);
}

// work(n, m, ky, kx, place) for the weights in the order in which convolve takes them for outputs, correlate gives them.
template <class Work>
void each_weight(const Layout &l, Work work) {
    int64_t place = 0;
    cut(l.heads, MOST_OUTS, [&](int64_t start, int64_t outs) {
        for (int64_t ky = 0; ky < l.kernel; ky++)
            for (int64_t m = 0; m < l.inputs; m++)
                for (int64_t kx = 0; kx < l.kernel; kx++)
                    for (int64_t n = start; n < start + outs; n++, place += LANES) work(n, m, ky, kx, place);
    });
}

void pack_weights(const Layout &l, const T *weight, T *packed) {
    each_weight(l, [&](int64_t n, int64_t m, int64_t ky, int64_t kx, int64_t place) {
        store(packed + place, spread(l, weight + weight_place(l, n, m, ky, kx)));
    });
}

// In the order in which convolve takes them for the gradients of the inputs.
void pack_weights_for_inputs(const Layout &l, const T *weight, T *packed) {
    for (int64_t map = 0; map < 3; map++)
        cut(l.heads, MOST_OUTS, [&](int64_t start, int64_t outs) {
            for (int64_t ky = 0; ky < l.kernel; ky++)
                for (int64_t f = 0; f < l.stride; f++)
                    for (int64_t n = 0; n < l.heads; n++)
                        for (int64_t kx = 0; kx < l.kernel; kx++)
                            if (kx * l.dilation % l.stride == f)
                                for (int64_t m = start; m < start + outs; m++, packed += LANES)
                                    store(packed, spread(l, weight + weight_place(l, n, map * l.heads + m, ky, kx)));
        });
}

void unpack_weight_grad(const Layout &l, const T *packed, T *dweight) {
    each_weight(l, [&](int64_t n, int64_t m, int64_t ky, int64_t kx, int64_t place) {
        T *to = dweight + weight_place(l, n, m, ky, kx);
        for (int64_t c = 0; c < l.valid; c++) {
            T sum = 0;
            for (int64_t i = c; i < LANES; i += l.padded) sum += packed[place + i];
            to[c] = sum;
        }
    });
}

// A row of q, k or v, its heads from channel l.first on, into a packed row of l.heads maps.
void pack_input(const Layout &l, const Map &map, const S *row, T *packed, T *line) {
    for (int64_t m = 0; m < l.heads; m++)  // zeros around the columns
        for (int64_t f = 0; f < l.stride; f++) {
            T *begin = packed + m * l.input_map + f * l.phase, *end = begin + l.phase;
            int64_t x = l.column(f), count = x < l.width ? (l.width - x + l.stride - 1) / l.stride : 0;
            T *inside = begin + (x + l.pad) / l.stride * l.padded;
            std::fill(begin, count ? inside : end, T(0));
            if (count) std::fill(inside + count * l.padded, end, T(0));
        }
    const int64_t step = l.dim * map.channel;
    if (map.channel == 1 && l.valid == LANES) {
        for (int64_t x = 0; x < l.width; x++)
            for (int64_t m = 0; m < l.heads; m++)
                store(packed + m * l.input_map + l.place[x], read(row + x * map.column + m * step));
        return;
    }
    bool done = map.column == 1 && choose<1, 2, 4, 8, 16>(l.padded, [&](auto padded) {
        for (int64_t m = 0; m < l.heads; m++) {
            T *to = packed + m * l.input_map;
            T *pixels = l.stride == 1 ? to + l.place[0] : line;
            pixels_from_planes<padded>(row + m * step, map.channel, l.valid, l.width, pixels);
            for (int64_t x = 0; l.stride > 1 && x < l.width; x++) std::copy_n(line + x * padded, padded, to + l.place[x]);
        }
    });
    done = done || (map.channel == 1 && l.valid == l.padded && choose<1, 2, 4, 8>(l.padded, [&](auto padded) {
        for (int64_t x = 0; x < l.width; x++)
            for (int64_t m = 0; m < l.heads; m++)
                for (int c = 0; c < padded; c++)
                    packed[m * l.input_map + l.place[x] + c] = T(row[x * map.column + m * step + c]);
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
    const int64_t step = l.dim * map.channel;
    if (map.channel == 1 && l.valid == LANES) {
        for (int64_t x = 0; x < l.width; x++)
            for (int64_t m = 0; m < l.heads; m++)
                write(row + x * map.column + m * step, load(packed + m * l.input_map + l.place[x]));
        return;
    }
    bool done = map.column == 1 && choose<1, 2, 4, 8, 16>(l.padded, [&](auto padded) {
        for (int64_t m = 0; m < l.heads; m++) {
            const T *from = packed + m * l.input_map;
            for (int64_t x = 0; l.stride > 1 && x < l.width; x++) std::copy_n(from + l.place[x], padded, line + x * padded);
            const T *pixels = l.stride == 1 ? from + l.place[0] : line;
            planes_from_pixels<padded>(pixels, map.channel, l.valid, l.width, row + m * step);
        }
    });
    done = done || (map.channel == 1 && l.valid == l.padded && choose<1, 2, 4, 8>(l.padded, [&](auto padded) {
        for (int64_t x = 0; x < l.width; x++)
            for (int64_t m = 0; m < l.heads; m++)
                for (int c = 0; c < padded; c++)
                    row[x * map.column + m * step + c] = S(packed[m * l.input_map + l.place[x] + c]);
    }));
    if (done) return;
    for (int64_t m = 0; m < l.heads; m++)
        for (int64_t x = 0; x < l.width; x++)
            for (int64_t c = 0; c < l.valid; c++)
                row[m * step + c * map.channel + x * map.column] = S(packed[m * l.input_map + l.place[x] + c]);
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
        T *begin = packed + n * l.grad_map, *inside = begin + l.margin;
        std::fill(begin, inside, T(0));
        std::fill(inside + l.out_width * l.padded, begin + l.grad_map, T(0));
    }
    bool done = map.column == 1 && choose<1, 2, 4, 8, 16>(l.padded, [&](auto padded) {
        for (int64_t n = 0; n < l.heads; n++)
            pixels_from_planes<padded>(row + n * map.channel, step, l.valid, l.out_width,
                                       packed + n * l.grad_map + l.margin);
    });
    if (done) return;
    int64_t pitch, whole = mixed_vectors(l, map, &pitch);
    done = whole && choose<1, 2, 3, 4, 6, 8, 12, 16, 24>(l.heads, [&](auto heads) {
        rows_from_heads<heads>(row, pitch, whole, l.grad_map, packed + l.margin);
    });
    for (int64_t n = 0; n < l.heads; n++)
        for (int64_t x = done ? whole * l.pixels : 0; x < l.out_width; x++)
            for (int64_t c = 0; c < l.padded; c++)
                packed[n * l.grad_map + l.margin + x * l.padded + c] =
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

// Aligned scratch memory, handed out piece by piece.
struct Memory {
    T *next;
    explicit Memory(int64_t size) {
        auto address = reinterpret_cast<uintptr_t>(scratch(size + LANES));
        next = reinterpret_cast<T *>((address + sizeof(Vec) - 1) / sizeof(Vec) * sizeof(Vec));
    }
    T *take(int64_t size) {
        T *piece = next;
        next += (size + LANES - 1) / LANES * LANES;
        return piece;
    }
};

// The rows of some maps from `next` on are packed when they are needed, into the slot of their number modulo the slots.
struct Ring {
    T *data;
    int64_t row, slots, next = 0;
    T *at(int64_t y) const { return data + y % slots * row; }
    template <class Pack>
    void advance(int64_t end, Pack pack) {
        for (; next < end; next++) pack(next, at(next));
    }
};

struct Inputs {
    const Map *maps;
    Ring ring;
    T *line;
    // Packs what the results up to row `end` - 1 read.
    void advance(const Layout &l, int64_t image, int64_t end) {
        ring.advance(std::min(l.height, (end - 1) * l.stride + l.pad + 1), [&](int64_t y, T *packed) {
            for (int64_t i = 0; i < 3; i++) {
                const Map &map = maps[i];
                const S *row = map.data + image * map.image + l.first * map.channel + y * map.row;
                pack_input(l, map, row, packed + i * l.heads * l.input_map, line);
            }
        });
    }
};

void output_row(const Layout &l, const Ring &inputs, const T *weights, int64_t y, T *rows) {
    Taps taps{{}, {}, l.input_offset.data(), l.inputs * l.kernel};
    cut(l.heads, MOST_OUTS, [&](int64_t start, int64_t outs) {
        taps.rows.clear(), taps.weights.clear();
        const T *from = weights + start * l.inputs * l.taps() * LANES;
        for (int64_t ky = 0; ky < l.kernel; ky++) {
            int64_t row = y * l.stride + ky * l.dilation - l.pad;
            if (row < 0 || row >= l.height) continue;
            taps.rows.push_back(inputs.at(row));
            taps.weights.push_back(from + ky * taps.count * outs * LANES);
        }
        cut(l.vectors, steps_of(outs), [&](int64_t x, int64_t steps) {
            T *to = rows + (start * l.vectors + x) * LANES;
            tiles.convolve[outs][steps](taps, x * LANES, to, l.vectors * LANES, LANES);
        });
    });
}

// A row of the gradient of one of q, k and v: to packed rows, or straight to memory where `row` is not null.
void input_grad_row(const Layout &l, const Ring &grads, const T *weights, int64_t y, T *rows, T *row, int64_t column) {
    Taps taps;
    cut(l.heads, MOST_OUTS, [&](int64_t start, int64_t outs) {
        for (int64_t f = 0; f < l.stride; f++) {
            int64_t x = l.column(f);
            if (x >= l.width) continue;
            taps.rows.clear(), taps.weights.clear();
            taps.offset = l.grad_offset.data() + l.grad_taps[f], taps.count = l.grad_taps[f + 1] - l.grad_taps[f];
            for (int64_t ky = 0; ky < l.kernel; ky++) {
                int64_t from = y + l.pad - ky * l.dilation;
                if (from < 0 || from % l.stride || from / l.stride >= l.out_height) continue;
                taps.rows.push_back(grads.at(from / l.stride));
                int64_t place = start * l.taps() * l.heads + (ky * l.kernel * l.heads + l.grad_taps[f]) * outs;
                taps.weights.push_back(weights + place * LANES);
            }
            T *to = row ? row + start * l.dim + x * column : rows + start * l.input_map + l.place[x];
            int64_t out_pitch = row ? l.dim : l.input_map, pitch = row ? l.stride * column : LANES;
            int64_t count = ((l.width - x + l.stride - 1) / l.stride + l.pixels - 1) / l.pixels;
            cut(count, steps_of(outs), [&](int64_t i, int64_t steps) {
                tiles.convolve[outs][steps](taps, i * LANES, to + i * pitch, out_pitch, pitch);
            });
        }
    });
}

// The share of the rows from y to end - 1 in the gradient of the weight.
void weight_grad(const Layout &l, const Ring &inputs, const Ring &grads, int64_t y, int64_t end, T *sums) {
    const int64_t taps = l.inputs * l.kernel;
    Pairs pairs{{}, {}, l.grad_map, l.vectors};
    for (int64_t ky = 0; ky < l.kernel; ky++) {
        pairs.grads.clear(), pairs.inputs.clear();
        for (int64_t i = y; i < end; i++) {
            int64_t row = i * l.stride + ky * l.dilation - l.pad;
            if (row < 0 || row >= l.height) continue;
            pairs.grads.push_back(grads.at(i) + l.margin);
            pairs.inputs.push_back(inputs.at(row));
        }
        cut(l.heads, MOST_OUTS, [&](int64_t start, int64_t outs) {
            T *to = sums + (start * l.kernel + ky * outs) * taps * LANES;
            cut(taps, steps_of(outs), [&](int64_t tap, int64_t steps) {
                tiles.correlate[outs][steps](pairs, start, l.input_offset.data() + tap, to + tap * outs * LANES);
            });
        });
    }
}

int64_t blocks(const Problem &p) { return (p.dim + LANES - 1) / LANES; }

// work(image, first row of results, end) for the bands of a part.
template <class Work>
void each_band(const Problem &p, int64_t part, int64_t out_height, Work work) {
    int64_t units = p.images * p.bands;
    for (int64_t i = units * part / p.parts; i < units * (part + 1) / p.parts; i++) {
        int64_t band = i % p.bands;
        work(i / p.bands, out_height * band / p.bands, out_height * (band + 1) / p.bands);
    }
}

}  // namespace

extern "C" {

// Tasks begin..end-1 of parts * ceil(dim / LANES). weight: (heads, 3 * heads, kernel, kernel, dim), contiguous.
void forward(const Problem *problem, const Map *maps, const T *weight, const Map *out, int64_t begin, int64_t end,
             int64_t threads) {
    parallel(begin, end, threads, [&](int64_t task) {
        const Layout l(*problem, task % blocks(*problem));
        const int64_t rows_size = l.heads * l.vectors * LANES + LANES * LANES;
        Memory memory(l.weights() + l.input_slots * l.input_row + l.width * LANES + LANES * LANES + rows_size);
        T *weights = memory.take(l.weights());
        Inputs inputs{maps, {memory.take(l.input_slots * l.input_row), l.input_row, l.input_slots},
                      memory.take(l.width * LANES + LANES * LANES)};
        T *rows = memory.take(rows_size);
        pack_weights(l, weight, weights);
        each_band(*problem, task / blocks(*problem), l.out_height, [&](int64_t image, int64_t y, int64_t stop) {
            inputs.ring.next = std::max<int64_t>(0, y * l.stride - l.pad);
            for (; y < stop; y++) {
                inputs.advance(l, image, y + 1);
                output_row(l, inputs.ring, weights, y, rows);
                unpack_output(l, *out, rows, out->data + image * out->image + l.first * l.heads * out->channel + y * out->row);
            }
        });
    });
}

// dmaps: the gradients of q, k and v. dweight: (parts, heads, 3 * heads, kernel, kernel, dim), whose sum over the parts
// is the gradient of the weight. All are written.
void backward(const Problem *problem, const Map *grad, const Map *maps, const T *weight, const Map *dmaps, T *dweight,
              int64_t begin, int64_t end, int64_t threads) {
    parallel(begin, end, threads, [&](int64_t task) {
        const Layout l(*problem, task % blocks(*problem));
        const int64_t line_size = l.width * LANES + LANES * LANES, rows_size = l.heads * l.input_map + LANES * LANES;
        Memory memory(2 * l.weights() + l.input_slots * l.input_row + l.grad_slots * l.grad_row + line_size + rows_size);
        T *weights = memory.take(l.weights()), *sums = memory.take(l.weights());
        Inputs inputs{maps, {memory.take(l.input_slots * l.input_row), l.input_row, l.input_slots}, memory.take(line_size)};
        Ring grads{memory.take(l.grad_slots * l.grad_row), l.grad_row, l.grad_slots};
        T *rows = memory.take(rows_size);
        pack_weights_for_inputs(l, weight, weights);
        std::fill_n(sums, l.weights(), T(0));
        auto gradient_rows = [&](int64_t image, int64_t y) {
            for (int64_t i = 0; i < 3; i++) {
                const Map &map = dmaps[i];
                S *row = map.data + image * map.image + l.first * map.channel + y * map.row;
                const T *from = weights + i * l.weights() / 3;
                T *direct = nullptr;
                if constexpr (std::is_same_v<S, T>) direct = map.channel == 1 && l.valid == LANES ? reinterpret_cast<T *>(row) : nullptr;
                input_grad_row(l, grads, from, y, rows, direct, map.column);
                if (!direct) unpack_input_grad(l, map, rows, row, inputs.line);
            }
        };
        each_band(*problem, task / blocks(*problem), l.out_height, [&](int64_t image, int64_t y, int64_t stop) {
            inputs.ring.next = std::max<int64_t>(0, y * l.stride - l.pad);
            grads.next = std::max<int64_t>(0, (y * l.stride - l.pad) / l.stride);
            for (; y < stop; y += l.chunk) {
                int64_t last = std::min(stop, y + l.chunk), bottom = std::min(l.height, last * l.stride);
                inputs.advance(l, image, last);
                grads.advance(std::min(l.out_height, (bottom - 1 + l.pad) / l.stride + 1), [&](int64_t row, T *packed) {
                    pack_grad(l, *grad, grad->data + image * grad->image + l.first * l.heads * grad->channel + row * grad->row,
                              packed);
                });
                weight_grad(l, inputs.ring, grads, y, last, sums);
                for (int64_t i = y * l.stride; i < bottom; i++) gradient_rows(image, i);
            }
        });
        unpack_weight_grad(l, sums, dweight + task / blocks(*problem) * l.heads * l.inputs * l.taps() * l.dim);
    });
}

}  // extern "C"
