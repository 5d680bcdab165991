// What AVX2 and AVX-VNNI share: the same layouts in 32-byte vectors, eight rows each, four a panel. With 16 registers
// a panel has two accumulators a vector instead of four or five:
//
//     two_bit  s & 3 and (s >> 4) & 3 into one, s & 12 and (s >> 4) & 12 into the other, >> 2 at the end
//     base3    s − (s mod 3^i) is 3^i · trit, and what is left at the end is trit 0: 81, 162 and 9, 18 & 3 are 1, 2; for
//              27, 54 and 3, 6 a byte shuffle looks the trit up by the low four bits (11, 6 and 3, 6)
//
// A set provides Sum (what four columns of eight rows are added up in), add(Sum, symbols, x) for symbols up to 12, and
// widen(Sum) → eight int32; and after how many tiles (dot) or steps (micro) its Sums have to be widened.
#pragma once

#include "driver.h"

#include <immintrin.h>

namespace {

inline __m256i load(const uint8_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
inline void store(uint8_t *to, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), v); }
inline __m256i broadcast(const int8_t *x) { return _mm256_set1_epi32(four_activations(x)); }
inline __m256i bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

inline void put(int32_t *sums, __m256i v, bool fresh) {
    __m256i *at = reinterpret_cast<__m256i *>(sums);
    _mm256_storeu_si256(at, fresh ? v : _mm256_add_epi32(_mm256_loadu_si256(at), v));
}
inline void add_to(int32_t *sums, __m256i v) { put(sums, v, false); }

// s mod m for s < 3m: unsigned bytes wrap.
inline __m256i mod3m(__m256i s, int m) {
    return _mm256_min_epu8(s, _mm256_min_epu8(_mm256_sub_epi8(s, bytes(m)), _mm256_sub_epi8(s, bytes(2 * m))));
}

// The trit of 3^i · trit.
inline __m256i trit(int i, __m256i multiple) {
    if (i % 2 == 0) return _mm256_and_si256(multiple, bytes(3));
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0));
    return _mm256_shuffle_epi8(table, multiple);
}

template <class Set>
struct MicroYmm {
    template <int M>
    struct Tokens {
        static void run(const uint8_t *w, const int8_t *x, int64_t stride, int64_t steps, bool fresh, int32_t *sums) {
            while (steps > 0) {
                const int64_t some = smaller(steps, Set::micro_steps);
                __m256i sum[M][2];
#pragma GCC unroll 6
                for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
                for (int64_t step = 0; step < some; ++step, w += PAIR_BYTES, x += 4) {
                    const __m256i a = load(w), b = load(w + 32);
#pragma GCC unroll 6
                    for (int m = 0; m < M; ++m) {
                        const __m256i four = broadcast(x + m * stride);
                        Set::add(sum[m][0], a, four);
                        Set::add(sum[m][1], b, four);
                    }
                }
#pragma GCC unroll 6
                for (int m = 0; m < M; ++m) {
                    put(sums + m * UNIT_ROWS, Set::widen(sum[m][0]), fresh);
                    put(sums + m * UNIT_ROWS + 8, Set::widen(sum[m][1]), fresh);
                }
                steps -= some;
                fresh = false;
            }
        }
    };
};

template <class Set>
struct Ymm {
    static constexpr int FEW_TOKENS = 0;
    static constexpr int symbol_offset(Format f) { return ::symbol_offset(f); }

    template <Format F>
    static void dot(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        if constexpr (F == Format::int8) return Set::dot_int8(stream, x, tiles, sums);
        while (tiles > 0) {
            const int64_t some = smaller(tiles, Set::dot_tiles);
            __m256i low[4], high[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) low[v] = high[v] = _mm256_setzero_si256();
            for (int64_t t = 0; t < some; ++t, stream += PAIR_BYTES, x += tile_columns(F)) {
                _mm_prefetch(ahead(stream), _MM_HINT_T0);
                _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
                if constexpr (F == Format::two_bit) {
                    add_half<0>(low, high, stream, broadcast(x), broadcast(x + 4));
                    asm volatile("" ::: "memory");  // read the tile again rather than keep it: an accumulator would be spilled
                    add_half<4>(low, high, stream, broadcast(x + 8), broadcast(x + 12));
                } else {
#pragma GCC unroll 4
                    for (int v = 0; v < 4; ++v) add_base3(low[v], high[v], load(stream + 32 * v), x);
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                add_to(sums + 8 * v, Set::widen(low[v]));
                add_to(sums + 8 * v, _mm256_srai_epi32(Set::widen(high[v]), F == Format::two_bit ? 2 : 0));
            }
            tiles -= some;
        }
    }

    template <int shift>
    static void add_half(__m256i (&low)[4], __m256i (&high)[4], const uint8_t *stream, __m256i first, __m256i second) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m256i s = _mm256_srli_epi16(load(stream + 32 * v), shift);
            Set::add(low[v], _mm256_and_si256(s, bytes(3)), first);
            Set::add(high[v], _mm256_and_si256(s, bytes(12)), second);
        }
    }

    static void add_base3(__m256i &low, __m256i &high, __m256i s, const int8_t *x) {
#pragma GCC unroll 4
        for (int i = 4; i > 0; --i) {
            const __m256i g = mod3m(s, POWERS_OF_3[i]);
            Set::add(i % 2 ? high : low, trit(i, _mm256_sub_epi8(s, g)), broadcast(x + 4 * i));
            s = g;
        }
        Set::add(low, s, broadcast(x));
    }

    template <Format F>
    static void unpack(const uint8_t *stream, int64_t tiles, uint8_t *symbols) {
        for (int64_t t = 0; t < 4 * tiles; ++t, stream += 32) {
            uint8_t *to = symbols + t / 4 * (tile_columns(F) / 4) * PAIR_BYTES + t % 4 * 32;
            __m256i s = load(stream);
            if constexpr (F == Format::two_bit) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) store(to + i * PAIR_BYTES, _mm256_and_si256(_mm256_srli_epi16(s, 2 * i), bytes(3)));
            } else {
#pragma GCC unroll 4
                for (int i = 4; i > 0; --i) {
                    const __m256i g = mod3m(s, POWERS_OF_3[i]);
                    store(to + i * PAIR_BYTES, trit(i, _mm256_sub_epi8(s, g)));
                    s = g;
                }
                store(to, s);
            }
        }
    }

    template <bool wide>
    static void micro(const uint8_t *const *panels, int count, const int8_t *x, int64_t stride, int tokens, int64_t steps,
                      bool fresh, int32_t *sums) {
        for (int block = 0; block < 2 * count; ++block) {
            const uint8_t *w = panels[block / 2] + block % 2 * VECTOR_BYTES;
            with_tokens<MicroYmm<typename Set::template Micro<wide>>::template Tokens>(tokens, w, x, stride, steps, fresh,
                                                                                       sums + block * BLOCK_ROWS);
        }
    }
};

}  // namespace
