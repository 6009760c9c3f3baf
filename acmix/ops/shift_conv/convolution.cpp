// The folded convolution path on a CPU: a grouped convolution of q, k and v, forward and backward; see compiled.py.
//
// Compiled once per (T, K, N, LANES): scalar type, kernel size, heads, numbers per vector. Group c of the convolution
// takes channel c of every head of q, k and v, 3N maps in all, and gives N maps; they are read where they lie. Sums run
// over the columns x of a row in vectors, several outputs at once, so that a loaded vector meets several weights.

#include "maps.h"

namespace {

struct Problem {
    int64_t images, dim, height, width, stride, dilation;
};

constexpr int tile(int count, int most) {  // the largest divisor up to `most`
    while (count % most) most--;
    return most;
}

constexpr int INPUTS = 3 * N, OUT_TILE = tile(N, 8), IN_TILE = tile(INPUTS, 12), GRAD_TILE = tile(N, K < 12 ? 24 / K : 2);

struct Sizes {
    int64_t height, width, stride, dilation, pad, out_height, out_width;
    int64_t columns;  // of an output row, rounded up to whole vectors
    int64_t margin;   // zero columns on both sides of a row of output gradients
    int64_t grad_row;
    int64_t phase;    // columns of one remainder modulo the stride in a packed, zero-padded row of inputs
    int64_t padded_height;
    int64_t offset[K];  // where the inputs of kernel column kx begin for output 0
    explicit Sizes(const Problem &p)
        : height(p.height), width(p.width), stride(p.stride), dilation(p.dilation), pad(p.dilation * (K / 2)),
          out_height((p.height + p.stride - 1) / p.stride), out_width((p.width + p.stride - 1) / p.stride) {
        int64_t shift = (K - 1) * dilation / stride;
        columns = (out_width + LANES - 1) / LANES * LANES;
        margin = shift + LANES;
        grad_row = columns + 2 * margin;
        phase = columns + shift + LANES;
        padded_height = height + 2 * pad;
        for (int64_t kx = 0; kx < K; kx++) offset[kx] = kx * dilation % stride * phase + kx * dilation / stride;
    }
    int64_t input_row() const { return stride * phase; }
    int64_t input_size() const { return padded_height * input_row(); }
    int64_t grad_size() const { return out_height * grad_row; }
};

// Rows and columns of zeros around a map, columns split by their remainder modulo the stride.
void pack_input(const Sizes &s, const T *map, const Map &m, T *packed) {
    for (int64_t y = 0; y < s.height; y++)
        for (int64_t phase = 0; phase < s.stride; phase++) {
            T *target = packed + (y + s.pad) * s.input_row() + phase * s.phase;
            int64_t first = ((phase - s.pad) % s.stride + s.stride) % s.stride;  // column of the map
            int64_t place = (first + s.pad) / s.stride;
            int64_t count = std::min((s.width - first + s.stride - 1) / s.stride, s.phase - place);
            const T *row = map + y * m.row + first * m.column;
            for (int64_t i = 0; i < count; i++) target[place + i] = row[i * s.stride * m.column];
        }
}

void pack_grad(const Sizes &s, const T *map, const Map &m, T *packed) {
    for (int64_t y = 0; y < s.out_height; y++)
        for (int64_t x = 0; x < s.out_width; x++)
            packed[y * s.grad_row + s.margin + x] = map[y * m.row + x * m.column];
}

const T *channel(const Map maps[3], int64_t image, int64_t dim, int64_t c, int64_t input) {
    const Map &map = maps[input / N];
    return map.data + image * map.image + (input % N * dim + c) * map.channel;
}

// One row of N output maps. weight: [tile of outputs][input][ky][kx][output in tile]
void output_row(const Sizes &s, const T *inputs, const T *weight, int64_t y, T *out) {
    for (int64_t n = 0; n < N; n += OUT_TILE, weight += INPUTS * K * K * OUT_TILE)
        for (int64_t x = 0; x < s.columns; x += LANES) {
            Vec sum[OUT_TILE] = {}, more[OUT_TILE] = {};  // two chains of additions hide their latency
            const T *w = weight;
            for (int64_t m = 0; m < INPUTS; m++) {
                const T *rows = inputs + m * s.input_size() + y * s.stride * s.input_row() + x;
                for (int64_t ky = 0; ky < K; ky++) {
                    const T *row = rows + ky * s.dilation * s.input_row();
#pragma GCC unroll 16
                    for (int kx = 0; kx < K; kx++, w += OUT_TILE) {
                        Vec value = load(row + s.offset[kx]);
#pragma GCC unroll 16
                        for (int i = 0; i < OUT_TILE; i++) (kx % 2 ? more : sum)[i] += w[i] * value;
                    }
                }
            }
            for (int64_t i = 0; i < OUT_TILE; i++) store(out + (n + i) * s.columns + x, sum[i] + more[i]);
        }
}

// One row of the gradients of all 3N inputs. weight: [tile of inputs][output][ky][kx][input in tile]
void input_grad_row(const Sizes &s, const T *grads, const T *weight, int64_t y, T *out) {
    for (int64_t m = 0; m < INPUTS; m += IN_TILE, weight += N * K * K * IN_TILE)
        for (int64_t phase = 0; phase < s.stride; phase++)
            for (int64_t x = 0; x + LANES <= s.phase; x += LANES) {
                Vec sum[IN_TILE] = {};
                for (int64_t ky = 0; ky < K; ky++) {
                    int64_t row = y + s.pad - ky * s.dilation;
                    if (row < 0 || row % s.stride || row / s.stride >= s.out_height) continue;
                    for (int64_t kx = 0; kx < K; kx++) {
                        if (kx * s.dilation % s.stride != phase) continue;
                        const T *from = grads + row / s.stride * s.grad_row + s.margin + x - kx * s.dilation / s.stride;
                        for (int64_t n = 0; n < N; n++) {
                            Vec value = load(from + n * s.grad_size());
                            const T *w = weight + ((n * K + ky) * K + kx) * IN_TILE;
#pragma GCC unroll 16
                            for (int i = 0; i < IN_TILE; i++) sum[i] += w[i] * value;
                        }
                    }
                }
                for (int64_t i = 0; i < IN_TILE; i++) store(out + ((m + i) * s.stride + phase) * s.phase + x, sum[i]);
            }
}

// Adds to dweight[n][m][ky][kx] the sum over rows and columns of grads[n] times the inputs[m] that meet them.
void weight_grad(const Sizes &s, const T *grads, const T *inputs, T *dweight) {
    for (int64_t m = 0; m < INPUTS; m++)
        for (int64_t ky = 0; ky < K; ky++)
            for (int64_t n = 0; n < N; n += GRAD_TILE) {
                Vec sum[GRAD_TILE][K] = {};
                for (int64_t y = 0; y < s.out_height; y++) {
                    const T *row = inputs + m * s.input_size() + (y * s.stride + ky * s.dilation) * s.input_row();
                    const T *grad = grads + n * s.grad_size() + y * s.grad_row + s.margin;
                    for (int64_t x = 0; x < s.columns; x += LANES) {
                        Vec value[K];
#pragma GCC unroll 16
                        for (int kx = 0; kx < K; kx++) value[kx] = load(row + s.offset[kx] + x);
#pragma GCC unroll 16
                        for (int i = 0; i < GRAD_TILE; i++) {
                            Vec g = load(grad + i * s.grad_size() + x);
#pragma GCC unroll 16
                            for (int kx = 0; kx < K; kx++) sum[i][kx] += g * value[kx];
                        }
                    }
                }
                for (int64_t i = 0; i < GRAD_TILE; i++)
                    for (int64_t kx = 0; kx < K; kx++)
                        for (int64_t lane = 0; lane < LANES; lane++)
                            dweight[(((n + i) * INPUTS + m) * K + ky) * K + kx] += sum[i][kx][lane];
            }
}

}  // namespace

extern "C" {

// Groups begin..end-1. weight: as output_row takes it, for each group. `out` (images, dim, N, Ho, Wo) is contiguous.
void forward(const Problem *problem, const Map *maps, const T *weight, T *out, int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t c) {
    T *inputs = scratch(INPUTS * s.input_size() + N * s.columns), *rows = inputs + INPUTS * s.input_size();
    std::fill(inputs, rows, T(0));
    for (int64_t image = 0; image < problem->images; image++)
        {
            for (int64_t m = 0; m < INPUTS; m++)
                pack_input(s, channel(maps, image, problem->dim, c, m), maps[m / N], inputs + m * s.input_size());
            for (int64_t y = 0; y < s.out_height; y++) {
                output_row(s, inputs, weight + c * N * INPUTS * K * K, y, rows);
                for (int64_t n = 0; n < N; n++)
                    std::copy_n(rows + n * s.columns, s.out_width,
                                out + (((image * problem->dim + c) * N + n) * s.out_height + y) * s.out_width);
            }
        }
    });
}

// weight: as input_grad_row takes it, for each group. The gradients of q, k, v (images, N, dim, H, W) are contiguous;
// dweight (dim, N, 3N, K, K) starts at zero.
void backward(const Problem *problem, const Map *grad, const Map *maps, const T *weight, T *const dmaps[3], T *dweight,
              int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t c) {
    const int64_t dim = problem->dim, row_size = s.stride * s.phase, area = s.height * s.width;
    T *inputs = scratch(INPUTS * (s.input_size() + row_size) + N * s.grad_size());
    T *grads = inputs + INPUTS * s.input_size(), *rows = grads + N * s.grad_size();
    std::fill(inputs, rows, T(0));
    for (int64_t image = 0; image < problem->images; image++)
        {
            for (int64_t m = 0; m < INPUTS; m++)
                pack_input(s, channel(maps, image, dim, c, m), maps[m / N], inputs + m * s.input_size());
            for (int64_t n = 0; n < N; n++)
                pack_grad(s, grad->data + image * grad->image + (c * N + n) * grad->channel, *grad,
                          grads + n * s.grad_size());
            weight_grad(s, grads, inputs, dweight + c * N * INPUTS * K * K);
            for (int64_t y = 0; y < s.height; y++) {
                input_grad_row(s, grads, weight + c * N * INPUTS * K * K, y, rows);
                for (int64_t m = 0; m < INPUTS; m++) {
                    T *target = dmaps[m / N] + ((image * N + m % N) * dim + c) * area + y * s.width;
                    const T *from = rows + m * row_size;
                    for (int64_t phase = 0; phase < s.stride; phase++) {
                        int64_t first = ((phase - s.pad) % s.stride + s.stride) % s.stride;
                        int64_t place = phase * s.phase + (first + s.pad) / s.stride;
                        for (int64_t x = first, i = 0; x < s.width; x += s.stride, i++) target[x] = from[place + i];
                    }
                }
            }
        }
    });
}

}  // extern "C"
