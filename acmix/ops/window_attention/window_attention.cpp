// Attention within the windows that tile a map, on a CPU, forward and backward; see cpp.py for the interface.
//
// Compiled once per (S, T, LANES): type of the maps, type of the sums, numbers per vector. A task is a group of heads,
// neighbours in memory, in some of the windows. A window is packed, computed and written while it lies in the cache;
// weights of keys are kept as [key][query], so that the softmax takes vectors of queries and never sums within one.
// Nothing is kept for the backward pass.

#include "exp2.h"
#include "products.h"
#include "zip.h"

namespace {

constexpr T LOG2E = T(1.4426950408889634);
constexpr T APART = T(-100) * LOG2E;  // added to a logit between regions that a shift has brought together

struct Problem {
    int64_t images, heads, dim, height, width, rows, columns, shift_rows, shift_columns;
    int64_t group;  // heads that are done together
    int64_t parts;  // of the windows of all images, each with its own sum for the gradient of the bias
};

int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

struct Sizes : Problem {
    int64_t area, queries, channels;  // the latter two padded to whole vectors
    int64_t across, windows;          // in a row of an image, in all images
    T to_bits;                        // what products of queries and keys must be multiplied by to be exponents of two

    explicit Sizes(const Problem &p)
        : Problem(p), area(p.rows * p.columns), queries(whole(area)), channels(whole(p.dim)), across(p.width / p.columns),
          windows(p.images * (p.height / p.rows) * across), to_bits(LOG2E / std::sqrt(T(p.dim))) {}

    int64_t wide() const { return queries * channels; }    // [pixel][channel], zeros behind both
    int64_t weights() const { return area * queries; }     // [key][query]
    int64_t region(int64_t at, int64_t size, int64_t window, int64_t shift) const {
        return shift ? (at >= size - window) + (at >= size - shift) : 0;
    }
};

// A window of a head in a map.
struct Place {
    int64_t image, top, left, head;
};

struct View {
    const Sizes &s;
    Map map;
    S *pixel(const Place &at, int64_t row, int64_t column) const {
        return map.data + at.image * map.image + at.head * s.dim * map.channel + (at.top + row) * map.row +
               (at.left + column) * map.column;
    }
    template <class Work>
    void each_pixel(const Place &at, Work work) const {
        for (int64_t row = 0, i = 0; row < s.rows; row++)
            for (int64_t column = 0; column < s.columns; column++, i++) work(pixel(at, row, column), i);
    }
    void read(const Place &at, T *wide) const {
        const int64_t dim = s.dim, channels = s.channels, channel = map.channel;
        each_pixel(at, [=](const S *from, int64_t i) {
            T *to = wide + i * channels;
            if (channel == 1)
                for (int64_t c = 0; c < dim; c++) to[c] = T(from[c]);
            else
                for (int64_t c = 0; c < dim; c++) to[c] = T(from[c * channel]);
        });
    }
    // The map becomes factor * what `wide` holds, or is increased by it.
    void write(const Place &at, const T *wide, T factor, bool accumulate) const {
        const int64_t dim = s.dim, channels = s.channels, channel = map.channel;
        each_pixel(at, [=](S *to, int64_t i) {
            const T *from = wide + i * channels;
            if (channel == 1 && !accumulate)
                for (int64_t c = 0; c < dim; c++) to[c] = S(factor * from[c]);
            else
                for (int64_t c = 0; c < dim; c++) {
                    S &here = to[c * channel];
                    here = S(factor * from[c] + (accumulate ? T(here) : T(0)));
                }
        });
    }
    void fetch(const Place &at) const {
        const int64_t size = map.channel == 1 ? s.dim * int64_t(sizeof(S)) : 0;
        each_pixel(at, [=](const S *from, int64_t) {
            asm volatile("");  // or GCC takes this for a function without effects
            for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(reinterpret_cast<const char *>(from) + byte);
        });
    }
};

struct Task {
    const Sizes &s;
    int64_t head;  // the first of the group
    std::vector<T> region;
    bool divided = false;   // whether the window holds pixels of several regions
    T *memory, *all_biases;  // [head][key][query], in bits
    const T *bias;           // of the head at hand

    static int64_t size(const Sizes &s, int64_t wides, int64_t weights) {
        return wides * s.wide() + (weights + s.group) * s.weights() + 64;
    }
    Task(const Sizes &s, int64_t head, const T *biases, int64_t size) : s(s), head(head), region(s.queries) {
        memory = scratch(size);
        memory += (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(T);
        std::fill_n(memory, size - 64, T(0));
        bias = all_biases = take(s.group * s.weights());
        biases += head * s.area * s.area;
        for (int64_t i = 0; i < s.group * s.area; i++)
            for (int64_t key = 0; key < s.area; key++)
                all_biases[(i / s.area * s.area + key) * s.queries + i % s.area] = LOG2E * biases[i * s.area + key];
    }
    T *take(int64_t size) {
        T *taken = memory;
        memory += size;
        return taken;
    }
    // work(index of the head in the group, its window, the window that follows) for the windows begin..end-1.
    template <class Work>
    void each_window(int64_t begin, int64_t end, Work work) {
        for (int64_t i = begin * s.group; i < end * s.group; i++) {
            const Place at = place(i);
            bias = all_biases + i % s.group * s.weights();
            if (i % s.group == 0) set_regions(at);
            work(i % s.group, at, place(std::min(i + 1, end * s.group - 1)));
        }
    }
    Place place(int64_t i) const {
        const int64_t window = i / s.group, down = s.height / s.rows, row = window / s.across % down;
        return {window / s.across / down, row * s.rows, window % s.across * s.columns, head + i % s.group};
    }
    void set_regions(const Place &at) {
        divided = false;
        for (int64_t row = 0, i = 0; row < s.rows; row++)
            for (int64_t column = 0; column < s.columns; column++, i++) {
                region[i] = T(3 * s.region(at.top + row, s.height, s.rows, s.shift_rows) +
                              s.region(at.left + column, s.width, s.columns, s.shift_columns));
                divided = divided || region[i] != region[0];
            }
    }

    // [pixel][channel] to [channel][pixel], times a factor.
    void turn(const T *wide, T factor, T *tall) const {
        for (int64_t c = 0; c < s.channels; c += LANES)
            for (int64_t x = 0; x < s.queries; x += LANES) {
                Vec v[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) v[i] = load(wide + (x + i) * s.channels + c);
                interleave<LANES>(v);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store(tall + (c + i) * s.queries + x, v[i] * factor);
            }
    }

    // weights [key][query] of every query, which sum to 1; `queries` is tall and holds bits.
    void attend(const T *queries, const T *keys, T *weights) const {
        multiply({s.dim, s.channels, 1, s.queries, s.queries}, s.area, s.queries, keys, queries, weights);
        const Exp2 exp2;
        const int64_t end = s.area * s.queries;
        for (int64_t x = 0; x < s.queries; x += LANES) {
            Vec top = Vec{} - std::numeric_limits<T>::infinity(), sum = {};
            const Vec here = load(region.data() + x);
            for (int64_t at = x, key = 0; at < end; at += s.queries, key++) {
                Vec logit = load(weights + at) + load(bias + at);
                if (divided) logit = here == region[key] ? logit : logit + APART;
                top = logit > top ? logit : top;
                store(weights + at, logit);
            }
            for (int64_t at = x; at < end; at += s.queries) {
                Vec weight = exp2(load(weights + at) - top);
                sum += weight;
                store(weights + at, weight);
            }
            const Vec inverse = T(1) / sum;
            for (int64_t at = x; at < end; at += s.queries) store(weights + at, load(weights + at) * inverse);
        }
    }
    // out[query] = sum over keys of weights[key][query] * keys[key], wide.
    void sum_keys(const T *weights, const T *keys, T *out) const {
        multiply({s.area, 1, s.queries, s.channels, s.channels}, s.area, s.channels, weights, keys, out);
    }
    // out[key] = sum over queries of weights[key][query] * queries[query], wide.
    void sum_queries(const T *weights, const T *queries, T *out) const {
        multiply({s.area, s.queries, 1, s.channels, s.channels}, s.area, s.channels, weights, queries, out);
    }
};

struct Forward : Task {
    Forward(const Sizes &s, int64_t head, const T *biases) : Task(s, head, biases, size(s, 5, 1)) {}

    void run(int64_t begin, int64_t end, const Map *q, const Map *k, const Map *v, const Map *out) {
        const View queries{s, *q}, keys{s, *k}, values{s, *v}, results{s, *out};
        T *query = take(s.wide()), *tall = take(s.wide()), *key = take(s.wide()), *value = take(s.wide());
        T *attended = take(s.wide()), *weights = take(s.weights());
        each_window(begin, end, [&](int64_t, const Place &at, const Place &next) {
            queries.read(at, query), keys.read(at, key), values.read(at, value);
            turn(query, s.to_bits, tall);
            results.fetch(at), queries.fetch(next);
            attend(tall, key, weights);
            keys.fetch(next), values.fetch(next);
            sum_keys(weights, value, attended);
            results.write(at, attended, 1, false);
        });
    }
};

struct Backward : Task {
    Backward(const Sizes &s, int64_t head, const T *biases) : Task(s, head, biases, size(s, 7, 2 + s.group)) {}

    void run(int64_t begin, int64_t end, const Map *grad, const Map *q, const Map *k, const Map *v, const Map *dq,
             const Map *dk, const Map *dv, bool accumulate, T *dbias) {
        const View grads{s, *grad}, queries{s, *q}, keys{s, *k}, values{s, *v};
        const View dqueries{s, *dq}, dkeys{s, *dk}, dvalues{s, *dv};
        T *query = take(s.wide()), *key = take(s.wide()), *value = take(s.wide()), *out_grad = take(s.wide());
        T *tall = take(s.wide()), *tall_grad = take(s.wide()), *result = take(s.wide());
        T *weights = take(s.weights()), *dweights = take(s.weights()), *sums = take(s.group * s.weights());
        const T scale = 1 / std::sqrt(T(s.dim));
        each_window(begin, end, [&](int64_t head, const Place &at, const Place &next) {
            queries.read(at, query), keys.read(at, key), values.read(at, value), grads.read(at, out_grad);
            turn(query, s.to_bits, tall), turn(out_grad, 1, tall_grad);
            dvalues.fetch(at), dqueries.fetch(at);
            attend(tall, key, weights);
            dkeys.fetch(at), queries.fetch(next);
            multiply({s.dim, s.channels, 1, s.queries, s.queries}, s.area, s.queries, value, tall_grad, dweights);
            keys.fetch(next), values.fetch(next);
            sum_queries(weights, out_grad, result);
            dvalues.write(at, result, 1, accumulate);
            differentiate(weights, dweights, sums + head * s.weights());
            grads.fetch(next);
            sum_keys(dweights, key, result);
            dqueries.write(at, result, scale, accumulate);
            sum_queries(dweights, query, result);
            dkeys.write(at, result, scale, accumulate);
        });
        std::copy_n(sums, s.group * s.weights(), dbias);
    }

    // Gradients of weights become those of logits, which are added to sums too.
    void differentiate(const T *weights, T *grads, T *sums) const {
        const int64_t end = s.area * s.queries;
        for (int64_t x = 0; x < s.queries; x += LANES) {
            Vec mean = {};
            for (int64_t at = x; at < end; at += s.queries) mean += load(weights + at) * load(grads + at);
            for (int64_t at = x; at < end; at += s.queries) {
                const Vec grad = load(weights + at) * (load(grads + at) - mean);
                store(grads + at, grad);
                store(sums + at, load(sums + at) + grad);
            }
        }
    }
};

}  // namespace

extern "C" {

// Tasks begin..end-1 of parts * groups of heads. bias: (heads, queries, keys), contiguous.
void forward(const Problem *problem, const Map *q, const Map *k, const Map *v, const T *bias, const Map *out,
             int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t task) {
        const int64_t groups = s.heads / s.group, part = task / groups;
        Forward(s, task % groups * s.group, bias)
            .run(s.windows * part / s.parts, s.windows * (part + 1) / s.parts, q, k, v, out);
    });
}

// dq, dk and dv receive the gradients for `grad`, that of the output, or are increased by them. dbias (parts, heads,
// keys, queries padded to whole vectors), whose sum over the parts is the gradient of the bias, is written.
void backward(const Problem *problem, const Map *grad, const Map *q, const Map *k, const Map *v, const T *bias,
              int64_t accumulate, const Map *dq, const Map *dk, const Map *dv, T *dbias, int64_t begin, int64_t end,
              int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t task) {
        const int64_t groups = s.heads / s.group, part = task / groups;
        Backward(s, task % groups * s.group, bias)
            .run(s.windows * part / s.parts, s.windows * (part + 1) / s.parts, grad, q, k, v, dq, dk, dv,
                 accumulate != 0, dbias + task * s.group * s.weights());
    });
}

}  // extern "C"
