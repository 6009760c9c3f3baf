// Register tiles: the sums of products that the convolution spends its time on.

#pragma once

#include <utility>

#include "registers.h"

namespace {

constexpr int MOST_OUTS = 4, MOST_STEPS = 8;  // of a register tile: outputs, and vectors of each
constexpr int MOST_SUMS = REGISTERS == 32 ? 24 : 12;
constexpr int steps_of(int outs) { return outs == 1 ? 4 : std::min(MOST_STEPS, MOST_SUMS / outs); }

// Lines of memory that are fetched into the cache ahead of their use, a few at each step of a computation that hides the
// wait: more at once would keep its own loads waiting.
struct Ahead {
    static constexpr int MOST = 16;  // streams; what is more is not fetched
    struct Stream {
        const char *base;
        const int64_t *offset, *end;
    };
    Stream streams[MOST];
    int count = 0, current = 0;
    int64_t size = 0, rate = 0;
    void add(const void *base, const std::vector<int64_t> &offsets) {
        if (count == MOST) return;
        streams[count++] = {static_cast<const char *>(base), offsets.data(), offsets.data() + offsets.size()};
        size += offsets.size();
    }
    void spread(int64_t steps) { rate = (size + steps - 1) / steps; }
    Stream *stream() {  // with lines left; the last one may be empty
        static Stream none{};
        while (current < count && streams[current].offset == streams[current].end) current++;
        return current < count ? streams + current : &none;
    }
};

inline void fetch(Ahead::Stream &stream, int64_t rate) {
    for (int64_t i = 0; i < rate && stream.offset != stream.end; i++) __builtin_prefetch(stream.base + *stream.offset++);
}

// The rows that a row of results is summed over. Tap t of each is at offset[t]; the weights are in the order of the taps.
struct Taps {
    std::vector<const T *> rows;
    std::vector<int64_t> first;  // weight of each row, of one output
    const int64_t *offset;
    int64_t count;
    const T *weights;
    Ahead *ahead;
};

// STEPS neighbouring vectors of OUTS rows of results.
template <int OUTS, int STEPS>
__attribute__((noinline)) void convolve(const Taps &taps, int64_t x, T *out, int64_t out_pitch, int64_t pitch) {
    Vec sum[OUTS][STEPS] = {};
    const int64_t rate = taps.ahead->rate;
    for (size_t row = 0; row < taps.rows.size(); row++) {
        const T *from = taps.rows[row] + x, *weights = taps.weights + taps.first[row] * OUTS * LANES;
        Ahead::Stream ahead = *taps.ahead->stream();
        for (int64_t tap = 0; tap < taps.count; tap++, weights += OUTS * LANES) {
            fetch(ahead, rate);
            const T *values = from + taps.offset[tap];
#pragma GCC unroll 8
            for (int i = 0; i < STEPS; i++) {
                Vec value = load(values + i * LANES);
                keep(value);
#pragma GCC unroll 4
                for (int n = 0; n < OUTS; n++) sum[n][i] += load(weights + n * LANES) * value;
            }
        }
        *taps.ahead->stream() = ahead;
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
    Ahead *ahead;
};

// Adds to sums[tap][n] the products of the gradients of OUTS heads with the inputs of STEPS taps: their own sum, which
// stays small, so that little is lost to rounding.
template <int OUTS, int STEPS>
__attribute__((noinline)) void correlate(const Pairs &pairs, int64_t head, const int64_t *offset, T *sums) {
    Vec sum[STEPS][OUTS] = {};
    for (size_t row = 0; row < pairs.grads.size(); row++) {
        const T *grads = pairs.grads[row] + head * pairs.head_pitch, *inputs = pairs.inputs[row];
        Ahead::Stream ahead = *pairs.ahead->stream();
        const int64_t rate = pairs.ahead->rate;
        for (int64_t x = 0; x < pairs.vectors; x++, grads += LANES, inputs += LANES) {
            fetch(ahead, rate);
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
        *pairs.ahead->stream() = ahead;
    }
#pragma GCC unroll 8
    for (int t = 0; t < STEPS; t++)
#pragma GCC unroll 4
        for (int n = 0; n < OUTS; n++) {
            T *to = sums + (t * OUTS + n) * LANES;
            store(to, load(to) + sum[t][n]);
        }
}

using Convolve = void (*)(const Taps &, int64_t, T *, int64_t, int64_t);
using Correlate = void (*)(const Pairs &, int64_t, const int64_t *, T *);

// By outputs and vectors of each; taps that are correlated come by threes, as q, k and v do.
struct Tiles {
    Convolve convolve[MOST_OUTS + 1][MOST_STEPS + 1];
    Correlate correlate[MOST_OUTS + 1][MOST_STEPS + 1];
    Tiles() { list(std::make_integer_sequence<int, MOST_OUTS>()); }
    template <int... I>
    void list(std::integer_sequence<int, I...>) {
        (list_outs<I + 1>(std::make_integer_sequence<int, steps_of(I + 1)>()), ...);
    }
    template <int OUTS, int... I>
    void list_outs(std::integer_sequence<int, I...>) {
        ((convolve[OUTS][I + 1] = ::convolve<OUTS, I + 1>), ...);
        correlate[OUTS][3] = ::correlate<OUTS, 3>;
        if constexpr (OUTS * 6 <= MOST_SUMS) correlate[OUTS][6] = ::correlate<OUTS, 6>;
    }
};
const Tiles tiles;

struct Piece {
    int64_t start, size;
};

int64_t piece_count(int64_t count, int64_t most) { return (count + most - 1) / most; }

// As few and as equal pieces of at most `most` as can be.
std::vector<Piece> cut(int64_t count, int64_t most) {
    std::vector<Piece> pieces;
    for (int64_t start = 0, rest = piece_count(count, most); rest; rest--) {
        pieces.push_back({start, (count - start) / rest});
        start += pieces.back().size;
    }
    return pieces;
}

// How N heads and a row of vectors are cut into tiles: fewer outputs of more vectors where that row is short, since the
// weights, which come from far, then serve more products.
struct Tiling {
    std::vector<Piece> heads, vectors[MOST_OUTS + 1];
    Tiling() = default;
    Tiling(int64_t count, int64_t length) {
        bool wide = length >= (steps_of(MOST_OUTS) - 1) * piece_count(length, steps_of(MOST_OUTS));
        heads = cut(count, wide ? MOST_OUTS : MOST_OUTS - 1);
        for (int outs = 1; outs <= MOST_OUTS; outs++) vectors[outs] = cut(length, steps_of(outs));
    }
    int64_t count() const { return heads.size() * vectors[heads[0].size].size(); }
};

}  // namespace
