// The folded convolution path on a CPU: a grouped convolution of q, k and v, forward and backward; see cpp.py.
//
// Compiled once per (S, T, LANES): type of the maps, type of the sums, numbers per vector. Group c of the convolution
// takes channel c of every head of q, k and v, 3N maps in all, and gives N maps. A vector holds neighbouring channels c,
// so each tap of the kernel is one product with a vector of weights; where the heads are narrower than a vector, it holds
// several pixels of them. The rows in use are packed into a ring, so that they lie side by side in the cache.

#include "layout.h"

namespace {

// Where the weights of an output, an input and a tap begin.
inline int64_t weight_place(const Layout &l, int64_t n, int64_t m, int64_t ky, int64_t kx) {
    return ((n * l.inputs + m) * l.taps() + ky * l.kernel + kx) * l.dim;
}

inline Vec spread(const Layout &l, const T *weights) {
    if (l.valid == LANES) return load(weights);
    T values[LANES] = {};
    bool done = l.valid == l.padded && choose<1, 2, 4, 8>(l.padded, [&](auto padded) {
        for (int i = 0; i < LANES; i += padded) copy_pixel<padded>(weights, values + i);
    });
    for (int64_t i = 0; !done && i < LANES; i += l.padded) std::copy_n(weights, l.valid, values + i);
    return load(values);
}

// work(n, m, ky, kx, place) for the weights, place by place, where the outputs are taken in these pieces.
template <class Work>
void each_weight(const Layout &l, const std::vector<Piece> &heads, Work work) {
    int64_t place = 0;
    for (auto [start, outs] : heads)
        for (int64_t ky = 0; ky < l.kernel; ky++)
            for (int64_t m = 0; m < l.inputs; m++)
                for (int64_t kx = 0; kx < l.kernel; kx++)
                    for (int64_t n = start; n < start + outs; n++, place += LANES) work(n, m, ky, kx, place);
}

void pack_weights(const Layout &l, const T *weight, T *packed) {
    each_weight(l, l.results.heads, [&](int64_t n, int64_t m, int64_t ky, int64_t kx, int64_t place) {
        store(packed + place, spread(l, weight + weight_place(l, n, m, ky, kx)));
    });
}

// In the order in which convolve takes them for the gradients of the inputs.
void pack_weights_for_inputs(const Layout &l, const T *weight, T *packed) {
    for (int64_t f = 0; f < l.stride; f++)
        for (int64_t map = 0; map < 3; map++)
            for (auto [start, outs] : l.input_grads[f].heads)
                for (int64_t ky = 0; ky < l.kernel; ky++)
                    for (int64_t n = 0; n < l.heads; n++)
                        for (int64_t kx = 0; kx < l.kernel; kx++)
                            if (kx * l.dilation % l.stride == f)
                                for (int64_t m = start; m < start + outs; m++, packed += LANES)
                                    store(packed, spread(l, weight + weight_place(l, n, map * l.heads + m, ky, kx)));
}

void unpack_weight_grad(const Layout &l, const T *packed, T *dweight) {
    each_weight(l, l.correlated, [&](int64_t n, int64_t m, int64_t ky, int64_t kx, int64_t place) {
        T *to = dweight + weight_place(l, n, m, ky, kx);
        if (l.valid == LANES) return store(to, load(packed + place));
        for (int64_t c = 0; c < l.valid; c++) {
            T sum = 0;
            for (int64_t i = c; i < LANES; i += l.padded) sum += packed[place + i];
            to[c] = sum;
        }
    });
}

// Aligned scratch memory, handed out piece by piece.
struct Memory {
    T *next;
    explicit Memory(int64_t size) {
        auto address = reinterpret_cast<uintptr_t>(scratch(size + 8 * LANES));
        next = reinterpret_cast<T *>((address + sizeof(Vec) - 1) / sizeof(Vec) * sizeof(Vec));
    }
    T *take(int64_t size) {
        T *piece = next;
        next += (size + LANES - 1) / LANES * LANES;
        return piece;
    }
};

// Packed rows of maps, each in the slot of its number modulo the slots; those up to `next` are there.
struct Ring {
    T *data;
    int64_t row, slots, next = 0;
    T *at(int64_t y) const { return data + y % slots * row; }
};

void output_row(const Layout &l, const Ring &inputs, const T *weights, int64_t y, T *rows, Ahead ahead) {
    Taps taps{{}, {}, l.input_offset.data(), l.inputs * l.kernel, weights, &ahead};
    for (int64_t ky = 0; ky < l.kernel; ky++) {
        int64_t row = y * l.stride + ky * l.dilation - l.pad;
        if (row < 0 || row >= l.height) continue;
        taps.rows.push_back(inputs.at(row));
        taps.first.push_back(ky * taps.count);
    }
    ahead.spread(l.results.count() * taps.rows.size() * taps.count);
    for (auto [start, outs] : l.results.heads) {
        for (auto [x, steps] : l.results.vectors[outs])
            tiles.convolve[outs][steps](taps, x * LANES, rows + (start * l.vectors + x) * LANES, l.vectors * LANES, LANES);
        taps.weights += l.inputs * l.taps() * outs * LANES;
    }
}

// Where a row of the gradients of q, k and v goes: to packed rows, or straight to memory where the layout allows it.
struct Target {
    T *row[3];
    int64_t head, column;  // steps in memory
    bool direct;
};

void input_grad_row(const Layout &l, const Ring &grads, const T *weights, int64_t y, const Target &target, Ahead &ahead) {
    Taps taps{{}, {}, nullptr, 0, weights, &ahead};
    for (int64_t f = 0; f < l.stride; f++) {
        const Tiling &tiling = l.input_grads[f];
        taps.rows.clear(), taps.first.clear();
        taps.offset = l.grad_offset.data() + l.grad_taps[f], taps.count = l.grad_taps[f + 1] - l.grad_taps[f];
        for (int64_t ky = 0; ky < l.kernel; ky++) {
            int64_t from = y + l.pad - ky * l.dilation;
            if (from < 0 || from % l.stride || from / l.stride >= l.out_height) continue;
            taps.rows.push_back(grads.at(from / l.stride));
            taps.first.push_back(ky * taps.count);
        }
        int64_t begin = target.direct ? l.column(f) * target.column : f * l.phase;
        int64_t pitch = target.direct ? l.stride * target.column : LANES;
        for (T *row : target.row)
            for (auto [start, outs] : tiling.heads) {
                T *to = row + start * target.head + begin;
                for (auto [i, steps] : tiling.vectors[outs])
                    tiles.convolve[outs][steps](taps, i * LANES, to + i * pitch, target.head, pitch);
                taps.weights += taps.count * l.kernel * outs * LANES;
            }
    }
}

// The share of the rows from y to end - 1 in the gradient of the weight.
void weight_grad(const Layout &l, const Ring &inputs, const Ring &grads, int64_t y, int64_t end, T *sums, Ahead ahead) {
    const int64_t taps = l.inputs * l.kernel;
    Pairs pairs{{}, {}, l.grad_map, l.vectors, &ahead};
    ahead.spread(l.correlated.size() * l.kernel * l.correlated_taps[l.correlated[0].size].size() * (end - y) * l.vectors);
    for (int64_t ky = 0; ky < l.kernel; ky++) {
        pairs.grads.clear(), pairs.inputs.clear();
        for (int64_t i = y; i < end; i++) {
            int64_t row = i * l.stride + ky * l.dilation - l.pad;
            if (row < 0 || row >= l.height) continue;
            pairs.grads.push_back(grads.at(i) + l.margin * l.padded);
            pairs.inputs.push_back(inputs.at(row));
        }
        for (auto [start, outs] : l.correlated) {
            T *to = sums + (start * l.kernel + ky * outs) * taps * LANES;
            for (auto [tap, steps] : l.correlated_taps[outs])
                tiles.correlate[outs][steps](pairs, start, l.input_offset.data() + tap, to + tap * outs * LANES);
        }
    }
}

// q, k and v, and their gradients, where the channels of a block begin.
struct Inputs {
    const Layout &l;
    const Map *maps;
    int64_t first;

    S *row(int64_t i, int64_t image, int64_t y) const {
        return maps[i].data + image * maps[i].image + first * maps[i].channel + y * maps[i].row;
    }
    std::vector<int64_t> lines() const {
        return ::lines(*maps, l.width, l.valid, l.heads, l.dim);
    }
    // The end of the rows that the results before row `end` read.
    int64_t last(int64_t end) const { return std::min(l.height, (end - 1) * l.stride + l.pad + 1); }
    void pack(Ring &ring, int64_t image, int64_t end, T *line) const {
        for (; ring.next < end; ring.next++)
            for (int64_t i = 0; i < 3; i++)
                pack_input(l, maps[i], row(i, image, ring.next), ring.at(ring.next) + i * l.heads * l.input_map, line);
    }
    void fetch(Ahead &ahead, int64_t image, int64_t y, int64_t end, const std::vector<int64_t> &lines) const {
        for (; y < end; y++)
            for (int64_t i = 0; i < 3; i++) ahead.add(row(i, image, y), lines);
    }
};

// The output or its gradient, where the channels of a block begin.
struct Results {
    const Layout &l;
    const Map &map;
    int64_t first;

    S *row(int64_t image, int64_t y) const {
        return map.data + image * map.image + first * l.heads * map.channel + y * map.row;
    }
    std::vector<int64_t> lines() const { return ::lines(map, l.out_width, l.valid * l.heads); }
    // The end of the rows that the gradients of the inputs before row `end` read.
    int64_t last(int64_t end) const { return std::min(l.out_height, (end - 1 + l.pad) / l.stride + 1); }
    void pack(Ring &ring, int64_t image, int64_t end) const {
        for (; ring.next < end; ring.next++) pack_grad(l, map, row(image, ring.next), ring.at(ring.next));
    }
};

// The first row that is read for row `y` of the results, or as their gradient.
int64_t first_input(const Layout &l, int64_t y) { return std::max<int64_t>(0, y * l.stride - l.pad); }
int64_t first_grad(const Layout &l, int64_t y) { return first_input(l, y) / l.stride; }

int64_t line_size(const Layout &l) { return (l.width + LANES) * LANES; }

struct Forward {
    const Layout &l;
    Inputs inputs;
    Results results;
    T *weights, *line, *rows;
    Ring ring;
    std::vector<int64_t> input_lines, result_lines;

    static int64_t rows_size(const Layout &l) { return (l.heads * l.vectors + LANES) * LANES; }
    static int64_t size(const Layout &l) {
        return l.weights() * LANES + l.input_slots * l.input_row + line_size(l) + rows_size(l);
    }
    Forward(const Layout &l, const Map *maps, const T *weight, const Map &out, int64_t first, Memory &memory)
        : l(l), inputs{l, maps, first}, results{l, out, first}, weights(memory.take(l.weights() * LANES)),
          line(memory.take(line_size(l))), rows(memory.take(rows_size(l))),
          ring{memory.take(l.input_slots * l.input_row), l.input_row, l.input_slots}, input_lines(inputs.lines()),
          result_lines(results.lines()) {
        pack_weights(l, weight + first, weights);
    }
    void begin(int64_t y) { ring.next = first_input(l, y); }
    void advance(int64_t image, int64_t y, int64_t end, int64_t stop) {
        for (; y < end; y++) {
            inputs.pack(ring, image, inputs.last(y + 1), line);
            Ahead ahead;
            ahead.add(results.row(image, y), result_lines);
            if (y + 1 < stop) inputs.fetch(ahead, image, ring.next, inputs.last(y + 2), input_lines);
            output_row(l, ring, weights, y, rows, ahead);
            unpack_output(l, results.map, rows, results.row(image, y));
        }
    }
    void finish(int64_t) {}
};

struct Backward {
    const Layout &l;
    Inputs inputs, targets;
    Results results;
    T *weights, *sums, *line, *rows, *dweight;
    Ring ring, grads;
    std::vector<int64_t> input_lines, target_lines, result_lines;
    bool direct;

    static int64_t size(const Layout &l) {
        return 2 * l.weights() * LANES + line_size(l) + l.input_row + LANES * LANES + l.input_slots * l.input_row +
               l.grad_slots * l.grad_row;
    }
    Backward(const Layout &l, const Map &grad, const Map *maps, const T *weight, const Map *dmaps, T *dweight, int64_t first,
             Memory &memory)
        : l(l), inputs{l, maps, first}, targets{l, dmaps, first}, results{l, grad, first},
          weights(memory.take(l.weights() * LANES)), sums(memory.take(l.weights() * LANES)),
          line(memory.take(line_size(l))), rows(memory.take(l.input_row + LANES * LANES)), dweight(dweight + first),
          ring{memory.take(l.input_slots * l.input_row), l.input_row, l.input_slots},
          grads{memory.take(l.grad_slots * l.grad_row), l.grad_row, l.grad_slots}, input_lines(inputs.lines()),
          target_lines(targets.lines()), result_lines(results.lines()) {
        direct = std::is_same_v<S, T> && l.valid == LANES;
        for (int64_t i = 0; i < 3; i++) direct = direct && dmaps[i].channel == 1 && dmaps[i].column == dmaps->column;
        pack_weights_for_inputs(l, weight + first, weights);
        std::fill_n(sums, l.weights() * LANES, T(0));
    }
    void begin(int64_t y) { ring.next = first_input(l, y), grads.next = first_grad(l, y); }
    void advance(int64_t image, int64_t y, int64_t end, int64_t stop) {
        const int64_t top = y * l.stride, bottom = std::min(l.height, end * l.stride);
        inputs.pack(ring, image, inputs.last(end), line);
        results.pack(grads, image, results.last(bottom));
        Ahead ahead;
        targets.fetch(ahead, image, top, bottom, target_lines);
        weight_grad(l, ring, grads, y, end, sums, ahead);
        ahead = Ahead();
        if (end < stop) {
            int64_t next = std::min(stop, end + l.chunk);
            inputs.fetch(ahead, image, ring.next, inputs.last(next), input_lines);
            for (int64_t i = grads.next; i < results.last(std::min(l.height, next * l.stride)); i++)
                ahead.add(results.row(image, i), result_lines);
        }
        ahead.spread(std::max<int64_t>(1, (bottom - top) * 3 * l.taps() * l.heads * l.input_grads[0].count() / l.stride));
        for (int64_t i = top; i < bottom; i++) input_row(image, i, ahead);
    }
    void input_row(int64_t image, int64_t y, Ahead &ahead) {
        Target target{{}, direct ? l.dim : l.input_map, targets.maps->column, direct};
        for (int64_t i = 0; i < 3; i++)
            target.row[i] = direct ? reinterpret_cast<T *>(targets.row(i, image, y)) : rows + i * l.heads * l.input_map;
        input_grad_row(l, grads, weights, y, target, ahead);
        for (int64_t i = 0; i < 3 && !direct; i++)
            unpack_input_grad(l, targets.maps[i], target.row[i], targets.row(i, image, y), line);
    }
    void finish(int64_t part) { unpack_weight_grad(l, sums, dweight + part * l.weights() * l.dim); }
};

// Tasks begin..end-1 of parts * blocks of channels. make(layout, first channel, memory) gives the Pass for a block.
template <class Pass, class Make>
void run(const Problem &p, int64_t begin, int64_t end, int64_t threads, Make make) {
    const Layout whole(p, std::min<int64_t>(LANES, p.dim)), tail(p, (p.dim - 1) % LANES + 1);
    const int64_t blocks = (p.dim + LANES - 1) / LANES, units = p.images * p.bands;
    parallel(begin, end, threads, [&](int64_t task) {
        const int64_t part = task / blocks, block = task % blocks;
        const Layout &l = block + 1 < blocks ? whole : tail;
        Memory memory(Pass::size(l));
        Pass pass = make(l, block * LANES, memory);
        for (int64_t i = units * part / p.parts; i < units * (part + 1) / p.parts; i++) {
            const int64_t band = i % p.bands, stop = l.out_height * (band + 1) / p.bands;
            int64_t y = l.out_height * band / p.bands;
            pass.begin(y);
            for (; y < stop; y += l.chunk) pass.advance(i / p.bands, y, std::min(stop, y + l.chunk), stop);
        }
        pass.finish(part);
    });
}

}  // namespace

extern "C" {

// weight: (heads, 3 * heads, kernel, kernel, dim), contiguous.
void forward(const Problem *problem, const Map *maps, const T *weight, const Map *out, int64_t begin, int64_t end,
             int64_t threads) {
    run<Forward>(*problem, begin, end, threads, [&](const Layout &l, int64_t first, Memory &memory) {
        return Forward(l, maps, weight, *out, first, memory);
    });
}

// dmaps: the gradients of q, k and v. dweight: (parts, heads, 3 * heads, kernel, kernel, dim), whose sum over the parts
// is the gradient of the weight. All are written.
void backward(const Problem *problem, const Map *grad, const Map *maps, const T *weight, const Map *dmaps, T *dweight,
              int64_t begin, int64_t end, int64_t threads) {
    run<Backward>(*problem, begin, end, threads, [&](const Layout &l, int64_t first, Memory &memory) {
        return Backward(l, *grad, maps, weight, dmaps, dweight, first, memory);
    });
}

}  // extern "C"
