// Sliding-window attention of one or more heads on a CPU, forward and backward; see compiled.py for the interface.
//
// Compiled once per (T, K, LANES): scalar type, window size, numbers per vector. Everything is vectorised over the
// columns x of a row of queries, so that no lane ever waits for another, and a softmax is K² independent vectors.
//
// A head's maps are packed first: rows outermost, then channels, reflected at the border, and columns split by their
// remainder modulo the stride, so that neighbouring queries find their keys in neighbouring places whatever the stride.
// Only a row of logits exists at a time. The gradients of k and v are collected in packed form and unpacked at the end.

#include "maps.h"

namespace {

struct Problem {
    int64_t heads, dim, height, width, stride, dilation;
};

struct Sizes {
    int64_t dim, height, width, stride, dilation, reach, out_height, out_width;
    int64_t margin;     // zero columns on both sides of a row of queries, so that shifted reads stay inside
    int64_t query_row;  // a packed row of queries: margin, columns, margin
    int64_t phase;      // columns of one remainder modulo the stride in a packed row of keys
    int64_t padded_height;
    int64_t offset[K];  // where the keys of a window column begin for query 0, from the start of a channel's packed row
    explicit Sizes(const Problem &p)
        : dim(p.dim), height(p.height), width(p.width), stride(p.stride), dilation(p.dilation),
          reach(p.dilation * (K / 2)), out_height((p.height + p.stride - 1) / p.stride),
          out_width((p.width + p.stride - 1) / p.stride) {
        int64_t shift = (K - 1) * dilation / stride;
        int64_t columns = (out_width + LANES - 1) / LANES * LANES;
        margin = shift + LANES;
        query_row = columns + 2 * margin;
        phase = columns + shift + LANES;
        padded_height = height + 2 * reach;
        for (int64_t kx = 0; kx < K; kx++) offset[kx] = kx * dilation % stride * phase + kx * dilation / stride;
    }
    int64_t key_row() const { return dim * stride * phase; }
    int64_t key_size() const { return padded_height * key_row(); }
    int64_t query_size() const { return out_height * dim * query_row; }
};

inline int64_t reflect(int64_t i, int64_t size) {
    i = i < 0 ? -i : i;
    return i >= size ? 2 * (size - 1) - i : i;
}

// Columns of a row of keys that a packed row can hold; the last ones may lie behind every window of a strided map.
int64_t held(const Sizes &s, int64_t phase) {
    return std::min(s.phase, (s.width + 2 * s.reach - phase + s.stride - 1) / s.stride);
}

// `offset` (dim, height, width), subtracted where it is given, is the position term of the keys.
void pack_keys(const Sizes &s, const Map &map, const T *offset, T *packed) {
    std::fill(packed, packed + s.key_size(), T(0));
    std::vector<T> line(s.width + 2 * s.reach);
    T *inside = line.data() + s.reach;
    for (int64_t y = 0; y < s.padded_height; y++)
        for (int64_t c = 0; c < s.dim; c++) {
            int64_t from = reflect(y - s.reach, s.height);
            const T *row = map.data + c * map.channel + from * map.row;
            for (int64_t x = 0; x < s.width; x++) inside[x] = row[x * map.column];
            if (offset) {
                const T *less = offset + (c * s.height + from) * s.width;
                for (int64_t x = 0; x < s.width; x++) inside[x] -= less[x];
            }
            for (int64_t x = 1; x <= s.reach; x++) {
                inside[-x] = inside[x];
                inside[s.width - 1 + x] = inside[s.width - 1 - x];
            }
            T *target = packed + y * s.key_row() + c * s.stride * s.phase;
            for (int64_t phase = 0; phase < s.stride; phase++)
                for (int64_t x = 0; x < held(s, phase); x++)
                    target[phase * s.phase + x] = line[phase + x * s.stride];
        }
}

// The adjoint of pack_keys without the offset: writes a contiguous (dim, height, width) map.
void unpack_keys(const Sizes &s, const T *packed, T *map) {
    std::fill(map, map + s.dim * s.height * s.width, T(0));
    std::vector<T> line(s.width + 2 * s.reach, T(0));
    T *inside = line.data() + s.reach;
    for (int64_t y = 0; y < s.padded_height; y++)
        for (int64_t c = 0; c < s.dim; c++) {
            const T *from = packed + y * s.key_row() + c * s.stride * s.phase;
            for (int64_t phase = 0; phase < s.stride; phase++)
                for (int64_t x = 0; x < held(s, phase); x++)
                    line[phase + x * s.stride] = from[phase * s.phase + x];
            for (int64_t x = 1; x <= s.reach; x++) {
                inside[x] += inside[-x];
                inside[s.width - 1 - x] += inside[s.width - 1 + x];
            }
            T *row = map + (c * s.height + reflect(y - s.reach, s.height)) * s.width;
            for (int64_t x = 0; x < s.width; x++) row[x] += inside[x];
        }
}

// Every `step`-th pixel of a map, times `scale`.
void pack_queries(const Sizes &s, const Map &map, int64_t step, T scale, T *packed) {
    std::fill(packed, packed + s.query_size(), T(0));
    for (int64_t y = 0; y < s.out_height; y++)
        for (int64_t c = 0; c < s.dim; c++) {
            const T *row = map.data + c * map.channel + y * step * map.row;
            T *target = packed + (y * s.dim + c) * s.query_row + s.margin;
            for (int64_t x = 0; x < s.out_width; x++) target[x] = row[x * step * map.column] * scale;
        }
}

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

// exp of numbers <= 0; NaN stays NaN.
inline Doubles exp_nonpositive(Doubles x) {
    for (int i = 0; i < LANES; i++) x[i] = std::exp(x[i]);
    return x;
}

// The same with a relative error of 1e-7: 2^n times the polynomial of the Cephes library.
inline Floats exp_nonpositive(Floats x) {
    Ints under = x < -87.0f;
    x = under ? Floats{} - 87.0f : x;
    Ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, Ints);  // towards zero, so to the nearest
    Floats whole = __builtin_convertvector(n, Floats);
    Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints exponent = (n + 127) << 23;
    Floats power;
    std::memcpy(&power, &exponent, sizeof power);
    return under ? Floats{} : p * power;
}

struct Row {  // K² rows of weights, one for each member of the window, with the margins of a packed row of queries
    T *data;
    int64_t length;
    T *at(int64_t ky, int64_t kx) const { return data + (ky * K + kx) * length; }
};

// out[ky][kx][x] = sum_c a[c][x] * b[c][key of (ky, kx) for query x]
void products(const Sizes &s, const T *a, const T *b, int64_t y, Row out) {
    for (int64_t x = s.margin; x < s.query_row - s.margin; x += LANES)
        for (int64_t ky = 0; ky < K; ky++) {
            const T *keys = b + (y * s.stride + ky * s.dilation) * s.key_row() + x - s.margin;
            Vec sum[K] = {};
            for (int64_t c = 0; c < s.dim; c++) {
                Vec value = load(a + c * s.query_row + x);
                const T *row = keys + c * s.stride * s.phase;
#pragma GCC unroll 16
                for (int kx = 0; kx < K; kx++) sum[kx] += value * load(row + s.offset[kx]);
            }
#pragma GCC unroll 16
            for (int kx = 0; kx < K; kx++) store(out.at(ky, kx) + x, sum[kx]);
        }
}

// out[c][x] = sum_{ky, kx} w[ky][kx][x] * b[c][key of (ky, kx) for query x]; out has columns only, no margins
void gather(const Sizes &s, Row w, const T *b, int64_t y, T *out) {
    int64_t columns = s.query_row - 2 * s.margin;
    std::fill(out, out + s.dim * columns, T(0));
    for (int64_t x = 0; x < columns; x += LANES)
        for (int64_t ky = 0; ky < K; ky++) {
            const T *keys = b + (y * s.stride + ky * s.dilation) * s.key_row() + x;
            Vec weight[K];
#pragma GCC unroll 16
            for (int kx = 0; kx < K; kx++) weight[kx] = load(w.at(ky, kx) + s.margin + x);
            for (int64_t c = 0; c < s.dim; c++) {
                const T *row = keys + c * s.stride * s.phase;
                Vec sum = load(out + c * columns + x);
#pragma GCC unroll 16
                for (int kx = 0; kx < K; kx++) sum += weight[kx] * load(row + s.offset[kx]);
                store(out + c * columns + x, sum);
            }
        }
}

// b[c][key of (ky, kx) for query x] += w[ky][kx][x] * a[c][x], as sums over the queries that see a key
void scatter(const Sizes &s, Row w, const T *a, int64_t y, T *b) {
    for (int64_t ky = 0; ky < K; ky++)
        for (int64_t phase = 0; phase < s.stride; phase++) {
            int64_t shift[K], seen = 0;
            const T *rows[K];
            for (int64_t kx = 0; kx < K; kx++)
                if (kx * s.dilation % s.stride == phase) {
                    shift[seen] = kx * s.dilation / s.stride;
                    rows[seen++] = w.at(ky, kx) + s.margin;
                }
            if (!seen) continue;
            T *keys = b + (y * s.stride + ky * s.dilation) * s.key_row() + phase * s.phase;
            for (int64_t x = 0; x + LANES <= s.phase; x += LANES) {
                Vec weight[K];
                for (int64_t i = 0; i < seen; i++) weight[i] = load(rows[i] + x - shift[i]);
                for (int64_t c = 0; c < s.dim; c++) {
                    const T *value = a + c * s.query_row + s.margin + x;
                    T *target = keys + c * s.stride * s.phase + x;
                    Vec sum = load(target);
                    if (seen == K) {
#pragma GCC unroll 16
                        for (int i = 0; i < K; i++) sum += weight[i] * load(value - shift[i]);
                    } else {
                        for (int64_t i = 0; i < seen; i++) sum += weight[i] * load(value - shift[i]);
                    }
                    store(target, sum);
                }
            }
        }
}

void softmax(const Sizes &s, Row row) {
    for (int64_t x = s.margin; x < s.query_row - s.margin; x += LANES) {
        Vec top = load(row.at(0, 0) + x), sum = {};
        for (int64_t i = 1; i < K * K; i++) {
            Vec value = load(row.data + i * row.length + x);
            top = value > top ? value : top;
        }
        for (int64_t i = 0; i < K * K; i++) {
            Vec value = exp_nonpositive(load(row.data + i * row.length + x) - top);
            sum += value;
            store(row.data + i * row.length + x, value);
        }
        Vec inverse = T(1) / sum;
        for (int64_t i = 0; i < K * K; i++) store(row.data + i * row.length + x, load(row.data + i * row.length + x) * inverse);
    }
}

// Gradient of the logits from the weights and the gradient of the weights, which it replaces.
void softmax_backward(const Sizes &s, Row weights, Row grads) {
    for (int64_t x = s.margin; x < s.query_row - s.margin; x += LANES) {
        Vec sum = {};
        for (int64_t i = 0; i < K * K; i++)
            sum += load(weights.data + i * weights.length + x) * load(grads.data + i * grads.length + x);
        for (int64_t i = 0; i < K * K; i++) {
            T *grad = grads.data + i * grads.length + x;
            store(grad, load(weights.data + i * weights.length + x) * (load(grad) - sum));
        }
    }
}

Map head_of(const Map &map, const Problem &p, int64_t index) {
    Map head = map;
    head.data += index / p.heads * map.image + index % p.heads * p.dim * map.channel;
    return head;
}

}  // namespace

extern "C" {

// Heads begin..end-1, counted over all images. `out` (images * heads, dim, out_height, out_width) is contiguous.
void forward(const Problem *problem, const Map *q, const Map *k, const Map *v, const T *offset, T *out, int64_t begin,
             int64_t end, int64_t threads) {
    const Sizes s(*problem);
    int64_t columns = s.query_row - 2 * s.margin;
    parallel(begin, end, threads, [&](int64_t head) {
    T *keys = scratch(2 * s.key_size() + s.query_size() + K * K * s.query_row + s.dim * columns);
    T *values = keys + s.key_size(), *queries = values + s.key_size();
    Row row{queries + s.query_size(), s.query_row};
    T *sums = row.data + K * K * s.query_row;
        pack_keys(s, head_of(*k, *problem, head), offset, keys);
        pack_keys(s, head_of(*v, *problem, head), nullptr, values);
        pack_queries(s, head_of(*q, *problem, head), s.stride, T(1) / std::sqrt(T(s.dim)), queries);
        for (int64_t y = 0; y < s.out_height; y++) {
            products(s, queries + y * s.dim * s.query_row, keys, y, row);
            softmax(s, row);
            gather(s, row, values, y, sums);
            for (int64_t c = 0; c < s.dim; c++)
                std::copy_n(sums + c * columns, s.out_width, out + ((head * s.dim + c) * s.out_height + y) * s.out_width);
        }
    });
}

// Gradients of q, k, v as contiguous (images * heads, dim, height, width); dq is zero where no query stands.
void backward(const Problem *problem, const Map *grad, const Map *q, const Map *k, const Map *v, const T *offset, T *dq,
              T *dk, T *dv, int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    int64_t columns = s.query_row - 2 * s.margin, area = s.dim * s.height * s.width;
    parallel(begin, end, threads, [&](int64_t head) {
    T *keys = scratch(4 * s.key_size() + 2 * s.query_size() + 2 * K * K * s.query_row + s.dim * columns);
    T *values = keys + s.key_size(), *dkeys = values + s.key_size(), *dvalues = dkeys + s.key_size();
    T *queries = dvalues + s.key_size(), *grads = queries + s.query_size();
    Row row{grads + s.query_size(), s.query_row}, drow{row.data + K * K * s.query_row, s.query_row};
    T *sums = drow.data + K * K * s.query_row;
    const T scale = T(1) / std::sqrt(T(s.dim));
    std::fill(row.data, sums, T(0));  // the margins
        pack_keys(s, head_of(*k, *problem, head), offset, keys);
        pack_keys(s, head_of(*v, *problem, head), nullptr, values);
        pack_queries(s, head_of(*q, *problem, head), s.stride, scale, queries);
        pack_queries(s, head_of(*grad, *problem, head), 1, T(1), grads);
        std::fill(dkeys, dkeys + 2 * s.key_size(), T(0));
        if (s.stride > 1) std::fill(dq + head * area, dq + (head + 1) * area, T(0));
        for (int64_t y = 0; y < s.out_height; y++) {
            const T *query = queries + y * s.dim * s.query_row, *g = grads + y * s.dim * s.query_row;
            products(s, query, keys, y, row);
            softmax(s, row);
            products(s, g, values, y, drow);
            softmax_backward(s, row, drow);
            gather(s, drow, keys, y, sums);
            for (int64_t c = 0; c < s.dim; c++) {
                T *target = dq + head * area + (c * s.height + y * s.stride) * s.width;
                for (int64_t x = 0; x < s.out_width; x++) target[x * s.stride] = sums[c * columns + x] * scale;
            }
            scatter(s, drow, query, y, dkeys);
            scatter(s, row, g, y, dvalues);
        }
        unpack_keys(s, dkeys, dk + head * area);
        unpack_keys(s, dvalues, dv + head * area);
    });
}

}  // extern "C"
