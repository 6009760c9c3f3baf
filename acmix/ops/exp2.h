// Powers of two and binary logarithms of LANES numbers.

#pragma once

#include "registers.h"

namespace {

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

// 2^x for x <= 1, relative error 2e-7; zero below -126.5; NaN stays NaN. The constants are kept in registers.
struct Exp2 {
    Floats least = Floats{} - 127.0f;
    Floats shift = Floats{} + (0x1.8p23f + 127);  // brings the nearest integer + 127 into the lowest bits
    Floats c1 = Floats{} + 6.93146978e-1f, c2 = Floats{} + 2.40222421e-1f, c3 = Floats{} + 5.55073375e-2f,
           c4 = Floats{} + 9.67151286e-3f, c5 = Floats{} + 1.32647271e-3f, one = Floats{} + 1.0f;

    Exp2() {
        for (Floats *constant : {&least, &shift, &c1, &c2, &c3, &c4, &c5, &one}) keep(*constant);
    }
    Floats operator()(Floats x) const {
        x = x < least ? least : x;
        Floats shifted = x + shift, r = x - (shifted - shift);
        Floats p = ((((r * c5 + c4) * r + c3) * r + c2) * r + c1) * r + one;
        Ints bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bits <<= 23;
        Floats power;
        std::memcpy(&power, &bits, sizeof power);
        return p * power;
    }
    Doubles operator()(Doubles x) const {
        for (int i = 0; i < LANES; i++) x[i] = std::exp2(x[i]);
        return x;
    }
};

// log2 of normal numbers: exponent + 2 atanh((m - 1) / (m + 1)) / ln 2 with m in [sqrt(1/2), sqrt(2)]
inline Floats log2_of(Floats x) {
    Ints bits;
    std::memcpy(&bits, &x, sizeof bits);
    Ints exponent = (bits - 0x3f3504f3) >> 23, rest = bits - (exponent << 23);
    Floats m;
    std::memcpy(&m, &rest, sizeof m);
    Floats t = (m - 1.0f) / (m + 1.0f), u = t * t;
    Floats p = ((u * 4.31702544e-1f + 5.76716194e-1f) * u + 9.61798819e-1f) * u + 2.88539008f;
    return x == x ? p * t + __builtin_convertvector(exponent, Floats) : x;
}

inline Doubles log2_of(Doubles x) {
    for (int i = 0; i < LANES; i++) x[i] = std::log2(x[i]);
    return x;
}

}  // namespace
