// AVX-VNNI: vpdpbusd on 32-byte vectors, VEX-encoded (processors with VNNI but without AVX-512). Sums are int32 from the
// start, so nothing has to be widened on the way.
#include "ymm.h"

namespace {

struct Vnni {
    static constexpr int64_t dot_tiles = DOT_TILES, micro_steps = INT64_MAX;

    static void add(__m256i &sum, __m256i symbols, __m256i x) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(symbols), "x"(x));
    }
    static __m256i widen(__m256i sum) { return sum; }

    template <bool wide>
    using Micro = Vnni;

    static void dot_int8(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        __m256i sum[2][4];  // even and odd steps apart: two shorter chains
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[0][v] = sum[1][v] = _mm256_setzero_si256();
        for (int64_t t = 0; t < tiles; ++t, x += 16)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i, stream += PAIR_BYTES) {
                _mm_prefetch(ahead(stream), _MM_HINT_T0);
                _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
                const __m256i four = broadcast(x + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) add(sum[i % 2][v], load(stream + 32 * v), four);
            }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) add_to(sums + 8 * v, _mm256_add_epi32(sum[0][v], sum[1][v]));
    }
};

}  // namespace

const Kernels KERNELS_AVXVNNI = {gemv<Ymm<Vnni>>, gemm<Ymm<Vnni>>, quantize};
