// RMSNorm, absmax and rounding to int8 in one sweep of three passes over a token (which stays in the first-level cache),
// in the compiler's own 16-lane vectors: every instruction set computes the same lanes in the same order, the same bits.
//
//     squares   four vectors of partial sums, added pairwise at the end
//     absmax    maximum of |v| as integers: sign cleared, bit patterns of floats order like floats, and NaN is the largest
//     rounding  v + 1.5·2²³ rounds half to even and leaves the code in the low byte; |v| ≤ 127.00003 needs no clipping
#pragma once

#include "kernels.h"

#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int LANES = 16;

// Lanes past n are zero. n is a constant except for the last vector of a token: no branch, no call to memcpy.
template <class V, class T>
inline V load_lanes(const T *from, int64_t n) {
    V v = {};
    std::memcpy(&v, from, static_cast<size_t>(n) * sizeof(T));
    return v;
}

template <bool BF16>
inline Floats load_values(const void *x, int64_t index, int64_t n) {
    if constexpr (!BF16) {
        return load_lanes<Floats>(static_cast<const float *>(x) + index, n);
    } else {
        const Words bits = __builtin_convertvector(load_lanes<Halves>(static_cast<const uint16_t *>(x) + index, n), Words)
                           << 16;
        return (Floats)bits;
    }
}

// visit(first column, columns, which of four accumulators) for whole vectors, then for what is left.
template <class Visit>
inline void for_each_vector(int64_t n, Visit visit) {
    int64_t k = 0;
    for (; k + 4 * LANES <= n; k += 4 * LANES) {
        visit(k, LANES, 0);
        visit(k + LANES, LANES, 1);
        visit(k + 2 * LANES, LANES, 2);
        visit(k + 3 * LANES, LANES, 3);
    }
    for (; k + LANES <= n; k += LANES) visit(k, LANES, 0);
    if (k < n) visit(k, n - k, 1);
}

inline float sum_lanes(Floats v) {
    float lanes[LANES];
    std::memcpy(lanes, &v, sizeof v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] + lanes[i + width];
    return lanes[0];
}

template <bool BF16>
inline float inverse_rms(const void *x, int64_t start, int64_t n, float eps) {
    Floats sums[4] = {};
    for_each_vector(n, [&](int64_t k, int64_t lanes, int i) __attribute__((always_inline)) {
        const Floats v = load_values<BF16>(x, start + k, lanes);
        sums[i] += v * v;
    });
    const float mean = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n);
    return 1 / __builtin_sqrtf(mean + eps);
}

// The low byte of each lane. For AVX-512 an instruction does it; gcc writes a long sequence for __builtin_convertvector.
inline Bytes low_bytes(Ints v) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

inline Ints larger_of(Ints a, Ints b) { return a > b ? a : b; }

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
