// What a translation unit of one instruction set gives to dispatch.cpp: a table of three functions over ranges of work.
#pragma once

#include "layout.h"

#include <cstddef>
#include <cstring>

namespace {

// One product. Activations come twice: as they are (the scalar reference reads these), and spread so that each segment
// starts at a tile, zeros between, with the sums that undo the symbols' offset.
struct Call {
    Geometry shape;
    const uint8_t *packed;
    const int8_t *x;       // [T, K]
    const int8_t *spread;  // [T, padded columns]
    const int32_t *sums;   // [T, segments]
    int64_t tokens;
    int32_t *integers;  // [T, O]; else null, and what follows is set
    float *y;           // [T, O]
    const float *scales, *x_scale, *bias;
    bool grouped, per_row;  // scales: [segments, O], [O] or [1]
    bool x_grouped;         // x_scale: [T, segments] instead of [T]; only where grouped
    const uint16_t *half_scales;  // fp16, instead of scales; only where grouped
    bool pairs;             // rows 2t and 2t + 1 of x are two parts of one token: their outputs are added up in y [T/2, O]
};

// A finite fp16 number, exactly: its bits as those of an fp32 number, whose exponent is then 112 too small.
inline float from_half(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half & 0x8000) << 16 | static_cast<uint32_t>(half & 0x7fff) << 13;
    float small;
    std::memcpy(&small, &bits, sizeof small);
    return small * 0x1p112f;
}

struct QuantizeCall {
    const void *x;
    bool bf16;
    int64_t columns;
    const float *gain;
    int64_t gain_count;
    float eps;
    int8_t *codes;
    float *scales;
};

}  // namespace

constexpr int64_t CHUNK_BYTES = 128 << 10;  // of weights, that a thread takes at once
constexpr int64_t GEMV_TOKENS = 2;
constexpr int64_t UNIT_PANELS = 2;  // panels that a matrix–matrix kernel takes at once

struct Kernels {
    void (*gemv)(const void *call, int64_t begin, int64_t end);      // up to GEMV_TOKENS; panels begin … end − 1
    void (*gemm)(const void *call, int64_t begin, int64_t end);      // any number of tokens; units of UNIT_PANELS panels
    void (*quantize)(const void *call, int64_t begin, int64_t end);  // tokens begin … end − 1 of a QuantizeCall
};

extern const Kernels KERNELS_SCALAR, KERNELS_AVX2, KERNELS_AVXVNNI, KERNELS_AVX512, KERNELS_AVX512VBMI, KERNELS_NEON;

// dispatch.cpp: what an instruction set (−1: the best here) provides, null where it is none of this processor's; and the status
// of a matrix's format and shape.
struct FloatKernels;
const Kernels *kernels_of(int32_t set);
const FloatKernels *floats_of(int32_t set);
int32_t check(int32_t format, int64_t rows, int64_t columns, int64_t group);

// pool.cpp: run(call, b, e) over ranges that make up 0 … count, `grain` at a time, on up to `threads` threads.
// streams: of what lies in memory in order, so that a thread takes half of its fair share first, in one piece.
void run_parallel(void (*run)(const void *, int64_t, int64_t), const void *call, int64_t count, int64_t grain, int threads,
                  bool streams = false);
// pool.cpp: memory of the calling thread, 64-byte aligned, good until its next call; null if there is none.
void *thread_scratch(size_t bytes);
