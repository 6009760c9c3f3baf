// The softmax over a window, for LANES queries at once, in powers of two.

#pragma once

#include "exp2.h"
#include "vectors.h"

namespace {

// Logits (K², LANES) become weights that are not normalised yet; returns their sum.
inline Vec softmax(T *logits, Vec top) {
    const Exp2 exp2;
    Vec sum = {};
    for (int i = 0; i < K * K; i++) {
        Vec weight = exp2(load(logits + i * LANES) - top);
        sum += weight;
        store(logits + i * LANES, weight);
    }
    return sum;
}

// Logits (K, LANES) of `count` rows of queries become weights.
inline void weigh(int count, T *const *logits, const T *const *lse) {
    const Exp2 exp2;
    for (int n = 0; n < count; n++) {
        Vec logs = load(lse[n]);
        for (int kx = 0; kx < K; kx++) store(logits[n] + kx * LANES, exp2(load(logits[n] + kx * LANES) - logs));
    }
}

// Adds weights (K, LANES) to totals (LANES), and their products with their gradients to sums, for `count` rows of queries.
inline void add_products(int count, T *const *weights, T *const *grads, T *const *sums, T *const *totals) {
    for (int n = 0; n < count; n++) {
        Vec sum = load(sums[n]), total = load(totals[n]);
        for (int kx = 0; kx < K; kx++) {
            Vec weight = load(weights[n] + kx * LANES);
            sum += weight * load(grads[n] + kx * LANES);
            total += weight;
        }
        store(sums[n], sum);
        store(totals[n], total);
    }
}

// Weights (K², LANES), whose sum is `total`, are divided by it: they sum to 1 but for the rounding of the sum of
// exponentials, which is not small where logits are large. Their gradients, whose mean by the weights is `mean`, become
// scale * those of logits. The mean of what is left after it makes good its rounding, which counts where all values are
// alike.
inline void softmax_backward(T *weights, T *grads, Vec mean, Vec total, T scale) {
    const Vec share = 1 / total;
    Vec left[4] = {};  // sums that do not wait for each other
    auto add = [&](int i, Vec &sum) {
        Vec weight = load(weights + i * LANES) * share;
        store(weights + i * LANES, weight);
        sum += (load(grads + i * LANES) - mean) * weight;
    };
    for (int i = 0; i + 4 <= K * K; i += 4) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) add(i + n, left[n]);
    }
    for (int i = K * K / 4 * 4; i < K * K; i++) add(i, left[0]);
    mean += (left[0] + left[1]) + (left[2] + left[3]);
    for (int i = 0; i < K * K; i++) {
        Vec weight = load(weights + i * LANES) * scale;
        store(grads + i * LANES, (load(grads + i * LANES) - mean) * weight);
    }
}

}  // namespace
