// The vector registers of the machine.

#pragma once

#include "maps.h"

namespace {

#if defined(__AVX512F__)
constexpr int REGISTERS = 32, REGISTER_BYTES = 64;
#elif defined(__aarch64__)
constexpr int REGISTERS = 32, REGISTER_BYTES = 16;
#elif defined(__AVX__)
constexpr int REGISTERS = 16, REGISTER_BYTES = 32;
#else
constexpr int REGISTERS = 16, REGISTER_BYTES = 16;
#endif

// Keeps a vector that several operations use in its register: GCC would load it anew for each of them.
template <class V>
inline __attribute__((always_inline)) void keep([[maybe_unused]] V &v) {
    if constexpr (sizeof(V) <= REGISTER_BYTES) {
#if defined(__AVX512F__)
        asm("" : "+v"(v));
#elif defined(__x86_64__)
        asm("" : "+x"(v));
#elif defined(__aarch64__)
        asm("" : "+w"(v));
#endif
    }
}

}  // namespace
