// ARM NEON with the dot product of ARMv8.2: sdot (signed × signed, four products added to an int32 lane) on 16-byte vectors,
// four rows each, eight a panel. Symbols 0, 1, 2 are the same signed or unsigned; int8 bytes turn from code + 128 into codes
// by flipping the top bit, so that nothing has to be subtracted.
//
//     two_bit  byte shifts by 2, 4, 6, & 3
//     base3    s − (s mod 3^i) is 3^i · trit: 81, 162 and 9, 18 & 3 are 1, 2; for 27, 54 and 3, 6 a table looks the trit up
//              by the low four bits (11, 6 and 3, 6)
#include "driver.h"

#include <arm_neon.h>

namespace {

constexpr int VECTORS = PAIR_BYTES / 16;

inline int8x16_t as_signed(uint8x16_t v) { return vreinterpretq_s8_u8(v); }
inline int8x16_t broadcast(const int8_t *x) { return vreinterpretq_s8_s32(vdupq_n_s32(four_activations(x))); }
inline void add_to(int32_t *sums, int32x4_t v) { vst1q_s32(sums, vaddq_s32(vld1q_s32(sums), v)); }

// s mod m for s < 3m: unsigned bytes wrap.
inline uint8x16_t mod3m(uint8x16_t s, int m) {
    const uint8x16_t once = vsubq_u8(s, vdupq_n_u8(static_cast<uint8_t>(m)));
    const uint8x16_t twice = vsubq_u8(s, vdupq_n_u8(static_cast<uint8_t>(2 * m)));
    return vminq_u8(s, vminq_u8(once, twice));
}

// The trit of 3^i · trit.
inline uint8x16_t trit(int i, uint8x16_t multiple) {
    static constexpr uint8_t TABLE[16] = {0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0};
    if (i % 2 == 0) return vandq_u8(multiple, vdupq_n_u8(3));
    return vqtbl1q_u8(vld1q_u8(TABLE), vandq_u8(multiple, vdupq_n_u8(15)));
}

// The symbols of one vector of a tile, for columns 4i … 4i + 3 of each row.
template <Format F>
inline void symbols_of(const uint8_t *from, uint8x16_t (&symbols)[5]) {
    uint8x16_t s = vld1q_u8(from);
    if constexpr (F == Format::two_bit) {
        const uint8x16_t three = vdupq_n_u8(3);
        symbols[0] = vandq_u8(s, three);
        symbols[1] = vandq_u8(vshrq_n_u8(s, 2), three);
        symbols[2] = vandq_u8(vshrq_n_u8(s, 4), three);
        symbols[3] = vshrq_n_u8(s, 6);
    } else {
#pragma GCC unroll 4
        for (int i = 4; i > 0; --i) {
            const uint8x16_t g = mod3m(s, POWERS_OF_3[i]);
            symbols[i] = trit(i, vsubq_u8(s, g));
            s = g;
        }
        symbols[0] = s;
    }
}

template <bool wide>
inline int8x16_t operand(const uint8_t *from) {
    const uint8x16_t v = vld1q_u8(from);
    return as_signed(wide ? veorq_u8(v, vdupq_n_u8(128)) : v);
}

template <bool wide>
struct Micro {
    template <int N>
    struct Tokens {  // one block of 16 rows
        static void run(const uint8_t *w, const int8_t *x, int64_t stride, int64_t steps, bool fresh, int32_t *sums) {
            int32x4_t sum[N][4];
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) sum[n][v] = fresh ? vdupq_n_s32(0) : vld1q_s32(sums + n * UNIT_ROWS + 4 * v);
            for (int64_t step = 0; step < steps; ++step, w += PAIR_BYTES, x += 4) {
                const int8x16_t a[4] = {operand<wide>(w), operand<wide>(w + 16), operand<wide>(w + 32), operand<wide>(w + 48)};
#pragma GCC unroll 6
                for (int n = 0; n < N; ++n) {
                    const int8x16_t four = broadcast(x + n * stride);
#pragma GCC unroll 4
                    for (int v = 0; v < 4; ++v) sum[n][v] = vdotq_s32(sum[n][v], a[v], four);
                }
            }
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) vst1q_s32(sums + n * UNIT_ROWS + 4 * v, sum[n][v]);
        }
    };
};

struct Neon {
    static constexpr int FEW_TOKENS = 0;
    static constexpr int symbol_offset(Format f) { return f == Format::int8 ? 0 : ::symbol_offset(f); }

    template <Format F>
    static void dot(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        constexpr int STEPS = tile_columns(F) / 4;
        int32x4_t sum[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[v] = vdupq_n_s32(0);
        for (int64_t t = 0; t < tiles; ++t, stream += tile_bytes(F), x += tile_columns(F)) {
            __builtin_prefetch(ahead(stream));
            __builtin_prefetch(ahead(stream + VECTOR_BYTES));
            int8x16_t four[STEPS];
#pragma GCC unroll 5
            for (int i = 0; i < STEPS; ++i) four[i] = broadcast(x + 4 * i);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                if constexpr (F == Format::int8) {
#pragma GCC unroll 4
                    for (int i = 0; i < STEPS; ++i)
                        sum[v] = vdotq_s32(sum[v], operand<true>(stream + i * PAIR_BYTES + 16 * v), four[i]);
                } else {
                    uint8x16_t symbols[5];
                    symbols_of<F>(stream + 16 * v, symbols);
#pragma GCC unroll 5
                    for (int i = 0; i < STEPS; ++i) sum[v] = vdotq_s32(sum[v], as_signed(symbols[i]), four[i]);
                }
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) add_to(sums + 4 * v, sum[v]);
    }

    template <Format F>
    static void unpack(const uint8_t *stream, int64_t tiles, uint8_t *to) {
        constexpr int STEPS = tile_columns(F) / 4;
        for (int64_t t = 0; t < tiles; ++t, stream += PAIR_BYTES, to += STEPS * PAIR_BYTES)
            for (int v = 0; v < VECTORS; ++v) {
                uint8x16_t symbols[5];
                symbols_of<F>(stream + 16 * v, symbols);
#pragma GCC unroll 5
                for (int i = 0; i < STEPS; ++i) vst1q_u8(to + i * PAIR_BYTES + 16 * v, symbols[i]);
            }
    }

    template <bool wide>
    static void micro(const uint8_t *const *panels, int count, const int8_t *x, int64_t stride, int tokens, int64_t steps,
                      bool fresh, int32_t *sums) {
        for (int block = 0; block < 2 * count; ++block) {
            const uint8_t *w = panels[block / 2] + block % 2 * VECTOR_BYTES;
            with_tokens<Micro<wide>::template Tokens>(tokens, w, x, stride, steps, fresh, sums + block * BLOCK_ROWS);
        }
    }
};

}  // namespace

const Kernels KERNELS_NEON = {gemv<Neon>, gemm<Neon>, quantize};
