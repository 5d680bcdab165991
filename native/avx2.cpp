// AVX2: vpmaddubsw adds two products in int16. Ternary symbols are small enough to add many of those before widening:
// a tile adds at most 2 · 2 · 8 · 128 = 4096 (two_bit, the & 12 half: symbols up to 8), so 7 tiles stay below 2¹⁵; unpacked
// symbols at most 2 · 2 · 128 = 512 a step, 63 steps. Whole bytes (int8) would saturate: they are split into even and odd
// columns of 16 bits, and multiplied by vpmaddwd.
#include "ymm.h"

namespace {

inline __m256i even16(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
inline __m256i odd16(__m256i v) { return _mm256_srai_epi16(v, 8); }

// Sums of whole bytes × activations, in int32.
struct WideSum {
    static constexpr int64_t micro_steps = INT64_MAX;
    static void add(__m256i &sum, __m256i symbols, __m256i x) {
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(symbols, _mm256_set1_epi16(255)), even16(x));
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(symbols, 8), odd16(x));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    }
    static __m256i widen(__m256i sum) { return sum; }
};

struct Avx2 {
    static constexpr int64_t dot_tiles = 7, micro_steps = 63;

    static void add(__m256i &sum, __m256i symbols, __m256i x) {  // written as an intrinsic, gcc spills the sums
        asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(symbols, x)));
    }
    static __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

    template <bool wide>
    struct MicroOf {
        using Type = Avx2;
    };
    template <bool wide>
    using Micro = typename MicroOf<wide>::Type;

    static void dot_int8(const uint8_t *stream, const int8_t *x, int64_t tiles, int32_t *sums) {
        __m256i sum[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[v] = _mm256_setzero_si256();
        for (int64_t step = 0; step < 4 * tiles; ++step, x += 4, stream += PAIR_BYTES) {
            _mm_prefetch(ahead(stream), _MM_HINT_T0);
            _mm_prefetch(ahead(stream + VECTOR_BYTES), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) WideSum::add(sum[v], load(stream + 32 * v), broadcast(x));
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) add_to(sums + 8 * v, sum[v]);
    }
};

template <>
struct Avx2::MicroOf<true> {
    using Type = WideSum;
};

}  // namespace

const Kernels KERNELS_AVX2 = {gemv<Ymm<Avx2>>, gemm<Ymm<Avx2>>, quantize};
