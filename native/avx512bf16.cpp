// Products of bf16 matrices with vdpbf16ps. 8 × 48 outputs stay in 24 registers; a panel of B stays in the second-level cache
// while A's strips, of a symmetric product those from the diagonal on, are multiplied by it.
#include "bf16.h"

#include <cstring>
#include <immintrin.h>

namespace {

constexpr int ROWS = 8, VECTORS = 3, LANES = 16;
static_assert(PANEL_WIDTH == VECTORS * LANES && STRIP_WIDTH == ROWS && LANES == 2 * ROWS);

inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

inline __mmask32 first_halves(int64_t count) {
    return static_cast<__mmask32>(count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1);
}

// 16 × 16 words, rows `in` become columns of `out`, each a vector.
inline void transpose(__m512i (&v)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // v[4q + i]: column 4l + i of rows 4q …, in 128-bit lane l
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x44);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xee);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x44);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[8 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Where 48 rows of A, or columns of B, go.
struct Packed {
    uint32_t *panel, *strips;  // or null
    int64_t pairs;

    // Rows r … r + 15, one pair of each.
    void put(int64_t pair, int64_t r, __m512i words) const {
        if (panel) _mm512_storeu_si512(panel + pair * PANEL_WIDTH + r, words);
        if (!strips) return;
        uint32_t *to = strips + (r / ROWS * pairs + pair) * ROWS;
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_castsi512_si256(words));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + pairs * ROWS), _mm512_extracti64x4_epi64(words, 1));
    }
};

// From x [rows, inner]: pairs lie together already, and are transposed as words. rows: how many of the 48 there are.
void pack_rows(const uint16_t *x, int64_t rows, int64_t inner, Packed to) {
    for (int64_t k = 0; k < inner; k += 2 * LANES) {
        const __mmask32 there = first_halves(inner - k);
        const int64_t pairs = smaller(LANES, to.pairs - k / 2);
        for (int64_t r = 0; r < PANEL_WIDTH; r += LANES) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i)
                v[i] = _mm512_maskz_loadu_epi16(r + i < rows ? there : 0, x + (r + i < rows ? (r + i) * inner + k : 0));
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i)
                if (i < pairs) to.put(k / 2 + i, r, v[i]);
        }
    }
}

// From x [inner, stride], of which the first `columns` columns count: two rows are interleaved.
void pack_columns(const uint16_t *x, int64_t columns, int64_t inner, int64_t stride, Packed to) {
    for (int64_t k = 0; k < inner; k += 2)
        for (int64_t r = 0; r < PANEL_WIDTH; r += LANES) {
            const __mmask16 there = first_lanes(columns - r), also = k + 1 < inner ? there : 0;
            const uint16_t *from = x + (there ? k * stride + r : 0);
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(also, from + (also ? stride : 0)));
            to.put(k / 2, r, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

void pack(const void *call, int64_t begin, int64_t end) {
    const Bf16Call &c = *static_cast<const Bf16Call *>(call);
    const int64_t all_of_b = c.count * c.blocks_of_b();
    for (int64_t item = begin; item < end; ++item) {
        const bool is_b = item < all_of_b;
        const int64_t index = is_b ? item : item - all_of_b, at = index * c.block_words();
        const int64_t blocks = is_b ? c.blocks_of_b() : c.blocks_of_a(), size = is_b ? c.columns : c.rows;
        const int64_t first = index % blocks * PANEL_WIDTH, count = smaller(PANEL_WIDTH, size - first);
        const uint16_t *x = (is_b ? c.b : c.a) + index / blocks * size * c.inner;
        const Packed to = {is_b ? c.panels + at : nullptr, !is_b || c.one_operand() ? c.strips + at : nullptr, c.pairs()};
        if (is_b ? c.b_transposed : !c.a_transposed) pack_rows(x + first * c.inner, count, c.inner, to);
        else pack_columns(x + first, count, c.inner, size, to);
    }
}

inline __m512 widen(__mmask16 lanes, const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

// Columns 0 … 7 of eight rows of 16-bit numbers, as rows.
inline void transpose_halves(const __m128i (&v)[8], __m128i (&t)[8]) {
    __m128i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        b[4 * i] = _mm_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm_unpacklo_epi64(b[i], b[4 + i]);
        t[2 * i + 1] = _mm_unpackhi_epi64(b[i], b[4 + i]);
    }
}

// The upper triangle of a tile's part that lies on the diagonal, from the lower one (they differ where A is not B).
inline void mirror_corner(uint16_t (&y)[ROWS][PANEL_WIDTH], int64_t column) {
    for (int r = 0; r < ROWS; ++r)
        for (int q = r + 1; q < ROWS; ++q) y[r][column + q] = y[q][column + r];
}

// The image of a tile [8, columns] of an n × n matrix.
inline void mirror(const uint16_t (&y)[ROWS][PANEL_WIDTH], int64_t rows, int64_t columns, uint16_t *image, int64_t n) {
    for (int64_t v = 0; v < columns; v += ROWS) {
        __m128i block[ROWS], turned[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) block[r] = _mm_load_si128(reinterpret_cast<const __m128i *>(y[r] + v));
        transpose_halves(block, turned);
        if (rows == ROWS && v + ROWS <= columns) {
#pragma GCC unroll 8
            for (int q = 0; q < ROWS; ++q) _mm_storeu_si128(reinterpret_cast<__m128i *>(image + (v + q) * n), turned[q]);
        } else {
            for (int64_t q = 0; q < smaller(ROWS, columns - v); ++q)
                std::memcpy(image + (v + q) * n, &turned[q], static_cast<size_t>(rows) * 2);
        }
    }
}

// Rows i … i + 7 of C, and N vectors of columns from j on; of a symmetric product their image too. Where that lies across the
// diagonal, the image of a later tile overwrites what this one wrote above it.
template <int N>
void tile(const Bf16Call &c, int64_t matrix, int64_t i, int64_t j) {
    const int64_t pairs = c.pairs(), width = c.columns;
    const uint32_t *a = c.strips + matrix * c.blocks_of_a() * c.block_words() + i * pairs;
    const uint32_t *b = c.panels + matrix * c.blocks_of_b() * c.block_words() + j * pairs;
    const int64_t at = (matrix * c.rows + i) * width + j;
    const int64_t rows = smaller(ROWS, c.rows - i), columns = smaller(N * LANES, width - j);
    const bool with_a = c.beta != 0, with_b = c.gamma != 0;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; k += LANES) {
            if (with_a) __builtin_prefetch(c.a + at + r * width + k);
            if (with_b) __builtin_prefetch(c.b + at + r * width + k);
        }
    __m512 sums[ROWS][N];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k, a += STRIP_WIDTH, b += PANEL_WIDTH) {
        __m512bh right[N];
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r]));
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
    }

    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    alignas(64) uint16_t y[ROWS][PANEL_WIDTH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) {
            const int64_t from = at + smaller(r, rows - 1) * width + v * LANES;
            const __mmask16 lanes = first_lanes(columns - v * LANES);
            __m512 sum = _mm512_mul_ps(sums[r][v], _mm512_set1_ps(c.alpha));
            if (with_a) sum = _mm512_fmadd_ps(widen(lanes, c.a + from), _mm512_set1_ps(c.beta), sum);
            if (with_b) sum = _mm512_fmadd_ps(widen(lanes, c.b + from), _mm512_set1_ps(c.gamma), sum);
            const __m512i diagonal = _mm512_set1_epi32(static_cast<int>(i - j) + r - v * LANES);
            sum = _mm512_mask_add_ps(sum, _mm512_cmpeq_epi32_mask(lane, diagonal), sum, _mm512_set1_ps(c.delta));
            _mm256_store_si256(reinterpret_cast<__m256i *>(y[r] + v * LANES), (__m256i)_mm512_cvtneps_pbh(sum));
        }
    if (c.symmetric && i < j + PANEL_WIDTH) mirror_corner(y, i - j);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(c.c + at + r * width, y[r], static_cast<size_t>(columns) * 2);
    if (c.symmetric) mirror(y, rows, columns, c.c + (matrix * width + j) * width + i, width);
}

void multiply(const void *call, int64_t begin, int64_t end) {
    const Bf16Call &c = *static_cast<const Bf16Call *>(call);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t matrix = item / c.blocks_of_b(), j = item % c.blocks_of_b() * PANEL_WIDTH;
        for (int64_t i = c.symmetric ? j : 0; i < c.rows; i += ROWS) {
            if (c.symmetric && i < j + LANES) tile<1>(c, matrix, i, j);
            else if (c.symmetric && i < j + 2 * LANES) tile<2>(c, matrix, i, j);
            else tile<3>(c, matrix, i, j);
        }
    }
}

}  // namespace

const Bf16Kernels BF16_AVX512 = {pack, multiply};
