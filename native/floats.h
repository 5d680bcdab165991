// What a translation unit of floats.cpp gives to engine.cpp: the parts of a decoder layer that are not integer products,
// over ranges of work. Each vector width is a compilation of its own; results differ in the order of sums and in fused
// multiply-adds.
#pragma once

#include "layout.h"

namespace {

constexpr int64_t LANE_COUNT = 16;
constexpr int64_t HEAD_STEP = 32;  // heads are padded to this: vectors are taken in pairs
constexpr int64_t MOST_HEAD_SIZE = 256;

// Keys and values, in tiles of TILE positions: what a sequence has not reached is never touched. For each slot, tile, layer
// and key head, one after another:
//
//     keys    [TILE/16][head_size][16]   lane = position: a score needs no horizontal sum
//     values  [TILE][head_size]
//     int8 only: a scale for each position's key, then for each position's value, fp32
//
// Head sizes are padded to HEAD_STEP; padding is zero.
constexpr int64_t TILE = 64;

struct CacheShape {
    int64_t tiles, layers, head_size, padded_head, kv_heads, element_bytes;

    constexpr int64_t half_bytes() const { return TILE * padded_head * element_bytes; }  // keys, or values
    constexpr int64_t block_bytes() const { return 2 * half_bytes() + (element_bytes == 1 ? 2 * TILE * 4 : 0); }
    constexpr int64_t tile_bytes() const { return layers * kv_heads * block_bytes(); }
    constexpr int64_t slot_bytes() const { return tiles * tile_bytes(); }
    constexpr int64_t block_at(int64_t slot, int64_t tile, int64_t layer, int64_t head) const {
        return slot * slot_bytes() + tile * tile_bytes() + (layer * kv_heads + head) * block_bytes();
    }
    constexpr int64_t key_at(int64_t p) const { return p / LANE_COUNT * LANE_COUNT * padded_head + p % LANE_COUNT; }
};

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
    void (*attend)(const void *call, int64_t begin, int64_t end);     // items block · kv_heads + key head
    void (*gate)(const void *call, int64_t begin, int64_t end);       // rows
    void (*normalize)(const void *call, int64_t begin, int64_t end);  // rows
    void (*read)(const void *call, int64_t begin, int64_t end);       // chunks of READ_CHUNK bytes
};

extern const FloatKernels FLOATS_BASE, FLOATS_AVX2, FLOATS_AVX512;
