// What a translation unit of floats.cpp gives to engine.cpp: the parts of a decoder layer that are not integer products,
// over ranges of work. Each vector width is a compilation of its own; results differ in the order of sums and in fused
// multiply-adds.
#pragma once

#include "cache.h"

namespace {

// Attention goes through positions in spans, each with a maximum and sums of its own, which are then put together in their
// order: whether one thread does that or several, the bits are the same.
constexpr int64_t SPAN = 512;
static_assert(SPAN % TILE == 0);

// What a span gives a query: [padded_head] sums of values, then its largest score and the sum of its weights.
constexpr int64_t part_floats(int64_t padded_head) { return padded_head + LANE_COUNT; }

struct AttendCall {
    CacheShape shape;
    const uint8_t *cache;
    int64_t layer;
    const float *q;        // [T, heads · head_size]
    float *out;            // the same
    const int32_t *slots, *positions;  // [T]
    const int32_t *blocks;             // block b: rows blocks[b] … blocks[b + 1] − 1, all of one slot
    int64_t heads, window;             // window: latest positions that are seen, 0: all
    float scale;
    int64_t spans;  // of the furthest position, where work is shared out by span too
    float *parts;   // then: [T, heads, spans, part_floats]
};

struct GateCall {  // gate = f(gate) · up, in place, for columns begin … end − 1 of rows of `columns`; f: silu, or max(x, 0)²
    float *gate;
    const float *up;
    int64_t columns, begin, end;
    bool squared_relu;
};

struct NormalizeCall {  // y = x / √(mean x² + eps) · gain, rows of `columns`; gain: [columns], or one number
    const float *x;
    float *y;
    const float *gain;
    int64_t columns, gain_count;
    float eps;
};

struct ReadCall {  // bytes to be looked at and nothing else: how fast memory can be read
    const uint8_t *from;
    int64_t bytes;
};
constexpr int64_t READ_CHUNK = 1 << 20;

}  // namespace

struct FloatKernels {
    void (*attend)(const void *call, int64_t begin, int64_t end);       // items block · kv_heads + key head
    void (*attend_spans)(const void *call, int64_t begin, int64_t end);  // items (block · kv_heads + key head) · spans + span
    void (*combine)(const void *call, int64_t begin, int64_t end);      // rows, whose spans are all there
    void (*gate)(const void *call, int64_t begin, int64_t end);       // rows
    void (*normalize)(const void *call, int64_t begin, int64_t end);  // rows
    void (*read)(const void *call, int64_t begin, int64_t end);       // chunks of READ_CHUNK bytes
};

extern const FloatKernels FLOATS_BASE, FLOATS_AVX2, FLOATS_AVX512;
