// Attention, the gate of an MLP, RMSNorm and reads of memory, in the compiler's own vectors: compiled for several processors.
#include "attention.h"

namespace {

// visit(first column, columns): whole vectors, whose length is then a constant, and what is left.
template <class Visit>
inline void by_vector(int64_t begin, int64_t end, Visit visit) {
    int64_t k = begin;
    for (; k + LANES <= end; k += LANES) visit(k, LANES);
    if (k < end) visit(k, end - k);
}

void gate(const void *call, int64_t begin, int64_t end) {
    const GateCall &c = *static_cast<const GateCall *>(call);
    for (int64_t t = begin; t < end; ++t) {
        float *row = c.gate + t * c.columns;
        const float *up = c.up + t * c.columns;
        by_vector(c.begin, c.end, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            const Floats x = load_lanes<Floats>(row + k, n), positive = x < 0.0f ? Floats{} : x;
            const Floats f = c.squared_relu ? positive * positive : x / (1.0f + exponential(-x));
            const Floats y = f * load_lanes<Floats>(up + k, n);
            std::memcpy(row + k, &y, static_cast<size_t>(n) * sizeof(float));
        });
    }
}

void normalize(const void *call, int64_t begin, int64_t end) {
    const NormalizeCall &c = *static_cast<const NormalizeCall *>(call);
    for (int64_t t = begin; t < end; ++t) {
        const float *x = c.x + t * c.columns;
        float *to = c.y + t * c.columns;
        const float inverse = inverse_rms<false>(x, 0, c.columns, c.eps);
        by_vector(0, c.columns, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            const Floats gains = c.gain_count == 1 ? broadcast(c.gain[0]) : load_lanes<Floats>(c.gain + k, n);
            const Floats y = (load_lanes<Floats>(x + k, n) * inverse) * gains;
            std::memcpy(to + k, &y, static_cast<size_t>(n) * sizeof(float));
        });
    }
}

void read(const void *call, int64_t begin, int64_t end) {
    const ReadCall &c = *static_cast<const ReadCall *>(call);
    Ints sums[4] = {};
    const uint8_t *from = c.from + begin * READ_CHUNK, *stop = c.from + smaller(end * READ_CHUNK, c.bytes);
    for (; from + 4 * 64 <= stop; from += 4 * 64)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(from) + 8192 + 64 * i));
            sums[i] += load_lanes<Ints>(reinterpret_cast<const int32_t *>(from) + i * LANES, LANES);
        }
    const Ints all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    asm volatile("" ::"m"(all));  // so that the sums are wanted
}

}  // namespace

#if defined(__AVX512F__)
const FloatKernels FLOATS_AVX512 = {attend, attend_spans, combine, gate, normalize, read};
#elif defined(__AVX2__)
const FloatKernels FLOATS_AVX2 = {attend, attend_spans, combine, gate, normalize, read};
#else
const FloatKernels FLOATS_BASE = {attend, attend_spans, combine, gate, normalize, read};
#endif
