// The compiler's own vectors of 16 floats: one register of AVX-512, two of AVX2, four of SSE2 or NEON.
#pragma once

#include "kernels.h"

#include <cstring>

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

inline Ints larger_of(Ints a, Ints b) { return a > b ? a : b; }

}  // namespace
