// RMSNorm, absmax and rounding to int8 in one sweep of three passes over a token (which stays in the first-level cache),
// in the compiler's own 16-lane vectors: every instruction set computes the same lanes in the same order, the same bits.
//
//     squares   four vectors of partial sums, added pairwise at the end
//     absmax    maximum of |v| as integers: sign cleared, bit patterns of floats order like floats, and NaN is the largest
//     rounding  v + 1.5·2²³ rounds half to even and leaves the code in the low byte; |v| ≤ 127.00003 needs no clipping
#pragma once

#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// The low byte of each lane. For AVX-512 an instruction does it; gcc writes a long sequence for __builtin_convertvector.
inline Bytes low_bytes(Ints v) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

// Gains: 0 no norm, 1 one gain, 2 a gain for each column.
template <bool BF16, int GAINS>
void quantize_token(const QuantizeCall &c, int64_t t) {
    const int64_t n = c.columns, start = t * n;
    const float inverse = GAINS ? inverse_rms<BF16>(c.x, start, n, c.eps) : 1;
    auto normed = [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
        const Floats v = load_values<BF16>(c.x, start + k, lanes);
        if constexpr (GAINS == 0) return v;
        if constexpr (GAINS == 1) return (v * inverse) * c.gain[0];
        return (v * inverse) * load_lanes<Floats>(c.gain + k, lanes);
    };
    Ints largest[4] = {};
    for_each_vector(n, [&](int64_t k, int64_t lanes, int i) __attribute__((always_inline)) {
        largest[i] = larger_of((Ints)normed(k, lanes) & 0x7fffffff, largest[i]);
    });
    const Ints all = larger_of(larger_of(largest[0], largest[1]), larger_of(largest[2], largest[3]));
    int32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits = all[i] > bits ? all[i] : bits;
    float absmax;
    std::memcpy(&absmax, &bits, sizeof absmax);
    absmax = absmax < 1e-5f ? 1e-5f : absmax;
    const float reciprocal = 1 / absmax, factor = reciprocal * 127;
    for_each_vector(n, [&](int64_t k, int64_t lanes, int) __attribute__((always_inline)) {
        const Floats rounded = normed(k, lanes) * factor + 12582912.0f;
        const Bytes codes = low_bytes((Ints)rounded);
        std::memcpy(c.codes + start + k, &codes, static_cast<size_t>(lanes));
    });
    c.scales[t] = absmax / 127;
}

template <bool BF16>
void quantize_tokens(const QuantizeCall &c, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        if (c.gain_count == 0) quantize_token<BF16, 0>(c, t);
        else if (c.gain_count == 1) quantize_token<BF16, 1>(c, t);
        else quantize_token<BF16, 2>(c, t);
    }
}

void quantize(const void *call, int64_t begin, int64_t end) {
    const QuantizeCall &c = *static_cast<const QuantizeCall *>(call);
    if (c.bf16) quantize_tokens<true>(c, begin, end);
    else quantize_tokens<false>(c, begin, end);
}

}  // namespace
