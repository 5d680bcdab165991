// AVX-512 with VNNI: one 64-byte vector holds four columns of 16 rows, so vpdpbusd (unsigned symbols × signed activations,
// four products added to an int32 lane, no saturation) needs no horizontal sum. Compiled a second time with VBMI.
//
//     two_bit  s & 3, s & 12, s & 48, s & 192 into four accumulators; >> 0, 2, 4, 6 at the end (exact: all multiples)
//     base3    g = min(s, s − 81, s − 162) is s mod 81, because unsigned bytes wrap; s − g = 81 · trit 4
//              VBMI: one vpermi2b maps g to four trits of two bits, then as two_bit
//              else the same with 27, 9 and 3: multiples of a trit into accumulators of their own, divided exactly at the end
//     int8     the bytes themselves
//
// vpdpbusd is inline assembly: written as intrinsics, accumulators are copied between registers.
#include "driver.h"

#include <immintrin.h>

namespace {

inline void dp(__m512i &sum, __m512i symbols, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(symbols), "v"(x)); }
inline __m512i load(const uint8_t *from) { return _mm512_loadu_si512(from); }
inline __m512i broadcast(const int8_t *x) { return _mm512_set1_epi32(four_activations(x)); }

// s mod m for s < 3m.
inline __m512i mod3m(__m512i s, int m) {
    const __m512i once = _mm512_sub_epi8(s, _mm512_set1_epi8(static_cast<char>(m)));
    const __m512i twice = _mm512_sub_epi8(s, _mm512_set1_epi8(static_cast<char>(2 * m)));
    return _mm512_min_epu8(s, _mm512_min_epu8(once, twice));
}

inline void add_to(int32_t *sums, __m512i v) { _mm512_storeu_si512(sums, _mm512_add_epi32(_mm512_loadu_si512(sums), v)); }

inline __m512i undo_shifts(const __m512i (&a)[4]) {
    return _mm512_add_epi32(_mm512_add_epi32(a[0], _mm512_srai_epi32(a[1], 2)),
                            _mm512_add_epi32(_mm512_srai_epi32(a[2], 4), _mm512_srai_epi32(a[3], 6)));
}

inline __m512i exact(__m512i multiple, int32_t inverse) { return _mm512_mullo_epi32(multiple, _mm512_set1_epi32(inverse)); }

#ifdef __AVX512VBMI__
// Entry g: trits 0 … 3 of g at bits 0, 2, 4, 6.
struct Trits {
    alignas(64) uint8_t of[128];
    constexpr Trits() : of{} {
        for (int g = 0; g < 81; ++g) of[g] = static_cast<uint8_t>(g % 3 | g / 3 % 3 << 2 | g / 9 % 3 << 4 | g / 27 << 6);
    }
};
constexpr Trits TRITS;

inline __m512i four_trits(__m512i g) { return _mm512_permutex2var_epi8(load(TRITS.of), g, load(TRITS.of + 64)); }
#endif

template <int N>
struct MicroTwoPanels {
    static void run(const uint8_t *a, const uint8_t *b, const int8_t *x, int64_t stride, int64_t steps, bool fresh,
                    int32_t *sums) {
        __m512i sum[N][4];
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r)
                sum[n][r] = fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + n * UNIT_ROWS + r * 16);
        for (int64_t step = 0; step < steps; ++step, a += PAIR_BYTES, b += PAIR_BYTES, x += 4) {
            const __m512i w[4] = {load(a), load(a + 64), load(b), load(b + 64)};
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n) {
                const __m512i four = broadcast(x + n * stride);
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) dp(sum[n][r], w[r], four);
            }
        }
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) _mm512_storeu_si512(sums + n * UNIT_ROWS + r * 16, sum[n][r]);
    }
};

template <int N>
struct MicroOnePanel {
    static void run(const uint8_t *a, const int8_t *x, int64_t stride, int64_t steps, bool fresh, int32_t *sums) {
        __m512i sum[N][2];
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r)
                sum[n][r] = fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + n * UNIT_ROWS + r * 16);
        for (int64_t step = 0; step < steps; ++step, a += PAIR_BYTES, x += 4) {
            const __m512i w[2] = {load(a), load(a + 64)};
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n) {
                const __m512i four = broadcast(x + n * stride);
#pragma GCC unroll 2
                for (int r = 0; r < 2; ++r) dp(sum[n][r], w[r], four);
            }
        }
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) _mm512_storeu_si512(sums + n * UNIT_ROWS + r * 16, sum[n][r]);
    }
};

struct Avx512 {
    static constexpr int symbol_offset(Format f) { return ::symbol_offset(f); }

    template <Format F>
    static void dot(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        if constexpr (F == Format::two_bit) dot_two_bit(stream, x, tiles, sums);
        else if constexpr (F == Format::base3) dot_base3(stream, x, tiles, sums);
        else dot_int8(stream, x, tiles, sums);
    }

    NOT_INLINED static void dot_two_bit(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        __m512i a[4], b[4], mask[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            a[i] = b[i] = _mm512_setzero_si512();
            mask[i] = _mm512_set1_epi8(static_cast<char>(3 << 2 * i));
        }
        for (int64_t t = 0; t < tiles; ++t, stream += PAIR_BYTES, x += 16) {
            _mm_prefetch(ahead(stream), _MM_HINT_T0);
            _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
            const __m512i s = load(stream), u = load(stream + VECTOR_BYTES);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i four = broadcast(x + 4 * i);
                dp(a[i], _mm512_and_si512(s, mask[i]), four);
                dp(b[i], _mm512_and_si512(u, mask[i]), four);
            }
        }
        add_to(sums, undo_shifts(a));
        add_to(sums + 16, undo_shifts(b));
    }

#ifdef __AVX512VBMI__
    NOT_INLINED static void dot_base3(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        __m512i a[4], b[4], mask[4], a4 = _mm512_setzero_si512(), b4 = a4;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            a[i] = b[i] = _mm512_setzero_si512();
            mask[i] = _mm512_set1_epi8(static_cast<char>(3 << 2 * i));
        }
        for (int64_t t = 0; t < tiles; ++t, stream += PAIR_BYTES, x += 20) {
            _mm_prefetch(ahead(stream), _MM_HINT_T0);
            _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
            const __m512i s = load(stream), u = load(stream + VECTOR_BYTES);
            const __m512i g = mod3m(s, 81), h = mod3m(u, 81), last = broadcast(x + 16);
            dp(a4, _mm512_sub_epi8(s, g), last);
            dp(b4, _mm512_sub_epi8(u, h), last);
            const __m512i p = four_trits(g), q = four_trits(h);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i four = broadcast(x + 4 * i);
                dp(a[i], _mm512_and_si512(p, mask[i]), four);
                dp(b[i], _mm512_and_si512(q, mask[i]), four);
            }
        }
        add_to(sums, _mm512_add_epi32(undo_shifts(a), exact(a4, INVERSE_OF_81)));
        add_to(sums + 16, _mm512_add_epi32(undo_shifts(b), exact(b4, INVERSE_OF_81)));
    }
#else
    NOT_INLINED static void dot_base3(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        __m512i a[5], b[5];
#pragma GCC unroll 5
        for (int i = 0; i < 5; ++i) a[i] = b[i] = _mm512_setzero_si512();
        for (int64_t t = 0; t < tiles; ++t, stream += PAIR_BYTES, x += 20) {
            _mm_prefetch(ahead(stream), _MM_HINT_T0);
            _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
            __m512i s = load(stream), u = load(stream + VECTOR_BYTES);
#pragma GCC unroll 4
            for (int i = 4; i > 0; --i) {
                const __m512i g = mod3m(s, POWERS_OF_3[i]), h = mod3m(u, POWERS_OF_3[i]), four = broadcast(x + 4 * i);
                dp(a[i], _mm512_sub_epi8(s, g), four);
                dp(b[i], _mm512_sub_epi8(u, h), four);
                s = g;
                u = h;
            }
            const __m512i four = broadcast(x);
            dp(a[0], s, four);
            dp(b[0], u, four);
        }
        add_to(sums, divide_trits(a));
        add_to(sums + 16, divide_trits(b));
    }

    static __m512i divide_trits(const __m512i (&a)[5]) {
        const __m512i high = _mm512_add_epi32(exact(a[4], INVERSE_OF_81), exact(a[3], INVERSE_OF_27));
        const __m512i low = _mm512_add_epi32(exact(a[2], INVERSE_OF_9), exact(a[1], INVERSE_OF_3));
        return _mm512_add_epi32(a[0], _mm512_add_epi32(high, low));
    }
#endif

    NOT_INLINED static void dot_int8(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        __m512i a[4], b[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) a[i] = b[i] = _mm512_setzero_si512();
        for (int64_t t = 0; t < tiles; ++t, x += 16)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i, stream += PAIR_BYTES) {
                _mm_prefetch(ahead(stream), _MM_HINT_T0);
                _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
                const __m512i four = broadcast(x + 4 * i);
                dp(a[i], load(stream), four);
                dp(b[i], load(stream + VECTOR_BYTES), four);
            }
        add_to(sums, _mm512_add_epi32(_mm512_add_epi32(a[0], a[1]), _mm512_add_epi32(a[2], a[3])));
        add_to(sums + 16, _mm512_add_epi32(_mm512_add_epi32(b[0], b[1]), _mm512_add_epi32(b[2], b[3])));
    }

    // A vector of the stream as one symbol a byte: w[i] for columns 4i … 4i + 3 of its tile.
    template <Format F>
    static void symbols(__m512i s, __m512i (&w)[tile_columns(F) / 4]) {
        const __m512i three = _mm512_set1_epi8(3);
        if constexpr (F == Format::two_bit) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) w[i] = _mm512_and_si512(_mm512_srli_epi16(s, 2 * i), three);
        } else {
#ifdef __AVX512VBMI__
            const __m512i g = mod3m(s, 81), p = four_trits(g);
            w[4] = _mm512_and_si512(_mm512_sub_epi8(s, g), three);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) w[i] = _mm512_and_si512(_mm512_srli_epi16(p, 2 * i), three);
#else
            // 81, 162 and 9, 18 & 3 are 1, 2; the low four bits of 27, 54 and of 3, 6 are 11, 6 and 3, 6.
            const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0));
#pragma GCC unroll 4
            for (int i = 4; i > 0; --i) {
                const __m512i g = mod3m(s, POWERS_OF_3[i]), multiple = _mm512_sub_epi8(s, g);
                w[i] = i % 2 ? _mm512_shuffle_epi8(table, multiple) : _mm512_and_si512(multiple, three);
                s = g;
            }
            w[0] = s;
#endif
        }
    }

    template <Format F>
    static void unpack(const uint8_t *stream, int64_t tiles, uint8_t *to) {
        constexpr int STEPS = tile_columns(F) / 4;
        for (int64_t t = 0; t < tiles; ++t, to += STEPS * PAIR_BYTES)
            for (int block = 0; block < 2; ++block, stream += VECTOR_BYTES) {
                __m512i w[STEPS];
                symbols<F>(load(stream), w);
#pragma GCC unroll 5
                for (int i = 0; i < STEPS; ++i) _mm512_storeu_si512(to + i * PAIR_BYTES + block * VECTOR_BYTES, w[i]);
            }
    }

    // More than eight tokens in two halves: with both blocks at once a broadcast serves two products.
    static constexpr int FEW_TOKENS = 16;
    template <Format F>
    static void few(const uint8_t *stream, const int8_t *x, int64_t stride, int tokens, int64_t tiles, int32_t *sums) {
        const int second = tokens > FEW_TOKENS / 2 ? tokens / 2 : 0, first = tokens - second;
        few_tokens<F>(stream, x, stride, first, tiles, sums);
        if (second) few_tokens<F>(stream, x + first * stride, stride, second, tiles, sums + first * PANEL_ROWS);
    }

    template <Format F>
    static void few_tokens(const uint8_t *stream, const int8_t *x, int64_t stride, int tokens, int64_t tiles, int32_t *sums) {
        switch (tokens) {
            case 1: return few_tokens<F, 1>(stream, x, stride, tiles, sums);
            case 2: return few_tokens<F, 2>(stream, x, stride, tiles, sums);
            case 3: return few_tokens<F, 3>(stream, x, stride, tiles, sums);
            case 4: return few_tokens<F, 4>(stream, x, stride, tiles, sums);
            case 5: return few_tokens<F, 5>(stream, x, stride, tiles, sums);
            case 6: return few_tokens<F, 6>(stream, x, stride, tiles, sums);
            case 7: return few_tokens<F, 7>(stream, x, stride, tiles, sums);
            default: return few_tokens<F, 8>(stream, x, stride, tiles, sums);
        }
    }

    template <Format F, int N>
    NOT_INLINED static void few_tokens(const uint8_t *stream, const int8_t *x, int64_t stride, int64_t tiles, int32_t *sums) {
        constexpr int STEPS = tile_columns(F) / 4;
        __m512i a[N], b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) a[n] = b[n] = _mm512_setzero_si512();
        for (int64_t t = 0; t < tiles; ++t, stream += PAIR_BYTES, x += 4 * STEPS) {
            _mm_prefetch(ahead(stream), _MM_HINT_T0);
            _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
            __m512i w[STEPS], v[STEPS];
            symbols<F>(load(stream), w);
            symbols<F>(load(stream + VECTOR_BYTES), v);
#pragma GCC unroll 5
            for (int i = 0; i < STEPS; ++i)
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    const __m512i four = broadcast(x + n * stride + 4 * i);
                    dp(a[n], w[i], four);
                    dp(b[n], v[i], four);
                }
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            _mm512_storeu_si512(sums + n * PANEL_ROWS, a[n]);
            _mm512_storeu_si512(sums + n * PANEL_ROWS + BLOCK_ROWS, b[n]);
        }
    }

    template <bool wide>
    static void micro(const uint8_t *const *panels, int count, const int8_t *x, int64_t stride, int tokens, int64_t steps,
                      bool fresh, int32_t *sums) {
        if (count == 2) with_tokens<MicroTwoPanels>(tokens, panels[0], panels[1], x, stride, steps, fresh, sums);
        else with_tokens<MicroOnePanel>(tokens, panels[0], x, stride, steps, fresh, sums);
    }
};

}  // namespace

#ifdef __AVX512VBMI__
const Kernels KERNELS_AVX512VBMI = {gemv<Avx512>, gemm<Avx512>, quantize};
#else
const Kernels KERNELS_AVX512 = {gemv<Avx512>, gemm<Avx512>, quantize};
#endif
