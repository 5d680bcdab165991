// What a product needs of its activations besides their codes: segments spread to whole tiles, and their sums.
#pragma once

#include "layout.h"

#include <cstddef>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

inline int32_t sum_of(const int8_t *x, int64_t n) {
    int32_t sum = 0;
    int64_t k = 0;
#if defined(__SSE2__)  // which every x86_64 has: psadbw adds eight unsigned bytes, here each 128 more than the signed one
    __m128i biased = _mm_setzero_si128();
    for (; k + 16 <= n; k += 16) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i *>(x + k));
        biased = _mm_add_epi32(biased, _mm_sad_epu8(_mm_xor_si128(v, _mm_set1_epi8(-128)), _mm_setzero_si128()));
    }
    sum = _mm_cvtsi128_si32(_mm_add_epi32(biased, _mm_srli_si128(biased, 8))) - 128 * static_cast<int32_t>(k);
#endif
    for (; k < n; ++k) sum += x[k];
    return sum;
}

// One token's codes x [K] → its sums [segments] and, where tiles have padding, `spread` [padded columns] (else null).
inline void spread_token(const Geometry &g, const int8_t *x, int8_t *spread, int32_t *sums) {
    for (int64_t s = 0; s < g.segments; ++s) {
        const int8_t *from = x + s * g.group;
        const int64_t n = g.columns_of(s), room = g.tiles_of(s) * tile_columns(g.format);
        sums[s] = sum_of(from, n);
        if (!spread) continue;
        int8_t *to = spread + s * g.segment_tiles * tile_columns(g.format);
        std::memcpy(to, from, static_cast<size_t>(n));
        std::memset(to + n, 0, static_cast<size_t>(room - n));
    }
}

}  // namespace
