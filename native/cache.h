// The cache of keys and values: where they lie, and how one position is stored. floats.cpp reads it.
#pragma once

#include "layout.h"

#include <cmath>
#include <cstring>

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

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One cached vector to int8. Returns its scale, which is NaN where x holds NaN.
template <class Put>
inline float to_int8(const float *x, int64_t n, Put put) {
    float absmax = 1e-20f;
    for (int64_t d = 0; d < n; ++d)
        if (const float a = std::fabs(x[d]); a > absmax || a != a) absmax = a;
    const float factor = 127 / absmax;
    for (int64_t d = 0; d < n; ++d) {
        const float code = x[d] * factor + 12582912.0f;  // rounds half to even, into the low byte
        int32_t bits;
        std::memcpy(&bits, &code, sizeof bits);
        put(d, static_cast<int8_t>(bits));
    }
    return absmax / 127;
}

// One position's key and value of a head, [head_size] each, into the block of its tile.
inline void put_in_cache(const CacheShape &shape, uint8_t *block, int64_t within, const float *key, const float *value) {
    const int64_t e = shape.head_size, key_at = shape.key_at(within), value_at = within * shape.padded_head;
    if (shape.element_bytes == 2) {
        uint16_t *k = reinterpret_cast<uint16_t *>(block) + key_at;
        uint16_t *v = reinterpret_cast<uint16_t *>(block + shape.half_bytes()) + value_at;
        for (int64_t d = 0; d < e; ++d) k[d * LANE_COUNT] = to_bf16(key[d]);
        for (int64_t d = 0; d < e; ++d) v[d] = to_bf16(value[d]);
    } else {
        int8_t *k = reinterpret_cast<int8_t *>(block) + key_at;
        int8_t *v = reinterpret_cast<int8_t *>(block + shape.half_bytes()) + value_at;
        float *scales = reinterpret_cast<float *>(block + 2 * shape.half_bytes()) + within;
        scales[0] = to_int8(key, e, [&](int64_t d, int8_t code) { k[d * LANE_COUNT] = code; });
        scales[TILE] = to_int8(value, e, [&](int64_t d, int8_t code) { v[d] = code; });
    }
}

}  // namespace
