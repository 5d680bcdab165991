// The entry points of trilobit.h: check, pack, spread the activations, choose an instruction set, share out the work.
//
// The processor is asked once, at the first use: what it has (cpuid) and what the system saves for it (xgetbv).
#include "kernels.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t CHUNK_BYTES = 128 << 10;  // of weights, that a thread takes at once

bool always() { return true; }

#if defined(__x86_64__)
struct Features {
    bool avx2, avxvnni, avx512, avx512vbmi;

    Features() : avx2(false), avxvnni(false), avx512(false), avx512vbmi(false) {
        unsigned a, b, c, d, a1, b1, c1, d1;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
        unsigned saved, upper;
        asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
        const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = ymm && (b & 1u << 5);
        avx512 = zmm && (b & 1u << 16) && (b & 1u << 30) && (b & 1u << 31) && (c & 1u << 11);  // F, BW, VL, VNNI
        avx512vbmi = avx512 && (c & 1u << 1);
        avxvnni = a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && avx2 && (a1 & 1u << 4);
    }
};

const Features &features() {
    static const Features found;
    return found;
}
#endif

struct Set {
    const char *name;
    const Kernels *kernels;
    bool (*runs)();
};

const Set SETS[] = {
    {"scalar", &KERNELS_SCALAR, always},
#if defined(__x86_64__)
    {"avx2", &KERNELS_AVX2, [] { return features().avx2; }},
    {"avxvnni", &KERNELS_AVXVNNI, [] { return features().avxvnni; }},
    {"avx512", &KERNELS_AVX512, [] { return features().avx512; }},
    {"avx512vbmi", &KERNELS_AVX512VBMI, [] { return features().avx512vbmi; }},
#elif defined(__aarch64__) && defined(__linux__)
    {"neon", &KERNELS_NEON, [] { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }},  // HWCAP_ASIMDDP: sdot
#elif defined(__aarch64__)
    {"neon", &KERNELS_NEON, always},  // every Apple processor of this kind has sdot
#endif
};
constexpr int32_t SET_COUNT = sizeof SETS / sizeof SETS[0];

const Kernels *kernels_of(int32_t set) {
    if (set == -1) set = trilobit_best_set();
    return set >= 0 && set < SET_COUNT && SETS[set].runs() ? SETS[set].kernels : nullptr;
}

int32_t check(int32_t format, int64_t rows, int64_t columns, int64_t group) {
    if (format < TRILOBIT_TWO_BIT || format > TRILOBIT_INT8) return TRILOBIT_BAD_FORMAT;
    const int64_t most = max_columns(static_cast<Format>(format));
    const bool fits = rows >= 1 && rows <= INT32_MAX && columns >= 1 && columns <= most && group >= 0;
    return fits ? TRILOBIT_OK : TRILOBIT_BAD_SHAPE;
}

Geometry geometry(const trilobit_matrix &m) { return {static_cast<Format>(m.format), m.rows, m.columns, m.group}; }

int32_t sum_of(const int8_t *x, int64_t n) {
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

// Fill in call.spread and call.sums, from scratch memory that lives until this thread's next product.
int32_t spread_activations(Call &call) {
    const Geometry &g = call.shape;
    const int64_t width = g.padded_columns();
    const bool as_it_is = width == g.columns;  // then every group is whole tiles too
    const size_t spread_bytes = as_it_is ? 0 : static_cast<size_t>(call.tokens * width);
    const size_t sums_at = (spread_bytes + 63) / 64 * 64;
    uint8_t *memory =
        static_cast<uint8_t *>(thread_scratch(sums_at + static_cast<size_t>(call.tokens * g.segments) * sizeof(int32_t)));
    if (!memory) return TRILOBIT_NO_MEMORY;
    int8_t *spread = reinterpret_cast<int8_t *>(memory);
    int32_t *sums = reinterpret_cast<int32_t *>(memory + sums_at);
    for (int64_t t = 0; t < call.tokens; ++t)
        for (int64_t s = 0; s < g.segments; ++s) {
            const int8_t *from = call.x + t * g.columns + s * g.group;
            const int64_t n = g.columns_of(s), room = g.tiles_of(s) * tile_columns(g.format);
            sums[t * g.segments + s] = sum_of(from, n);
            if (as_it_is) continue;
            int8_t *to = spread + t * width + s * g.segment_tiles * tile_columns(g.format);
            std::memcpy(to, from, static_cast<size_t>(n));
            std::memset(to + n, 0, static_cast<size_t>(room - n));
        }
    call.spread = as_it_is ? call.x : spread;
    call.sums = sums;
    return TRILOBIT_OK;
}

int32_t multiply(Call &call, int32_t set, int32_t threads) {
    const Kernels *kernels = kernels_of(set);
    if (!kernels) return TRILOBIT_BAD_SET;
    if (call.tokens == 0) return TRILOBIT_OK;
    if (const int32_t status = spread_activations(call)) return status;
    const int64_t panels = call.shape.panels();
    if (call.tokens == 1) {
        run_parallel(kernels->gemv, &call, panels, larger(1, CHUNK_BYTES / call.shape.panel_bytes()), threads);
    } else {
        run_parallel(kernels->gemm, &call, divide_up(panels, UNIT_PANELS), 1, threads);
    }
    return TRILOBIT_OK;
}

// visit(row, first column, columns) for every tile of every row that is not only padding.
template <class Visit>
void for_each_tile(const Geometry &g, Visit visit) {
    const int width = tile_columns(g.format);
    for (int64_t o = 0; o < g.rows; ++o)
        for (int64_t s = 0; s < g.segments; ++s)
            for (int64_t k = 0; k < g.columns_of(s); k += width)
                visit(o, s * g.group + k, static_cast<int>(smaller(width, g.columns_of(s) - k)));
}

// Large packed matrices are read from end to end for every token: two-megabyte pages spare the translation of addresses.
void ask_for_huge_pages([[maybe_unused]] uint8_t *memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t trilobit_abi(void) { return TRILOBIT_ABI; }
EXPORT int32_t trilobit_set_count(void) { return SET_COUNT; }
EXPORT const char *trilobit_set_name(int32_t set) { return set >= 0 && set < SET_COUNT ? SETS[set].name : nullptr; }
EXPORT int32_t trilobit_set_runs_here(int32_t set) { return set >= 0 && set < SET_COUNT && SETS[set].runs(); }

EXPORT int32_t trilobit_best_set(void) {
    static const int32_t best = [] {
        int32_t set = SET_COUNT - 1;
        while (!SETS[set].runs()) --set;
        return set;
    }();
    return best;
}

EXPORT int64_t trilobit_packed_bytes(int32_t format, int64_t rows, int64_t columns, int64_t group) {
    if (const int32_t status = check(format, rows, columns, group)) return status;
    const Geometry g(static_cast<Format>(format), rows, columns, group);
    return g.panels() * g.panel_bytes();
}

EXPORT int32_t trilobit_pack(int32_t format, int64_t rows, int64_t columns, int64_t group, const int8_t *codes,
                             uint8_t *packed) {
    if (const int32_t status = check(format, rows, columns, group)) return status;
    const Geometry g(static_cast<Format>(format), rows, columns, group);
    const int64_t bytes = g.panels() * g.panel_bytes();
    ask_for_huge_pages(packed, bytes);
    const int zero = g.format == Format::two_bit ? 0b01010101 : g.format == Format::base3 ? 121 : 128;
    std::memset(packed, zero, static_cast<size_t>(bytes));
    for_each_tile(g, [&](int64_t o, int64_t first, int columns_here) {
        const int8_t *from = codes + o * columns + first;
        uint8_t *to = packed + place(g, o, first).byte;
        for (int i = 0; i < columns_here; ++i) {
            if (g.format == Format::int8) to[i / 4 * PAIR_BYTES + i % 4] = static_cast<uint8_t>(from[i] + 128);
            else if (g.format == Format::two_bit) to[i % 4] = static_cast<uint8_t>(to[i % 4] + from[i] * (1 << i / 4 * 2));
            else to[i % 4] = static_cast<uint8_t>(to[i % 4] + from[i] * POWERS_OF_3[i / 4]);
        }
    });
    return TRILOBIT_OK;
}

EXPORT int32_t trilobit_unpack(const trilobit_matrix *matrix, int8_t *codes) {
    if (const int32_t status = check(matrix->format, matrix->rows, matrix->columns, matrix->group)) return status;
    const Geometry g = geometry(*matrix);
    for_each_tile(g, [&](int64_t o, int64_t first, int columns_here) {
        const uint8_t *from = matrix->packed + place(g, o, first).byte;
        int8_t *to = codes + o * g.columns + first;
        for (int i = 0; i < columns_here; ++i)
            to[i] = static_cast<int8_t>(
                code_at(g.format, from[g.format == Format::int8 ? i / 4 * PAIR_BYTES + i % 4 : i % 4], i / 4));
    });
    return TRILOBIT_OK;
}

EXPORT int32_t trilobit_product(const trilobit_matrix *matrix, const int8_t *x, int64_t tokens, int32_t *y, int32_t set,
                                int32_t threads) {
    if (const int32_t status = check(matrix->format, matrix->rows, matrix->columns, matrix->group)) return status;
    if (tokens < 0) return TRILOBIT_BAD_SHAPE;
    Call call = {geometry(*matrix), matrix->packed, x,       nullptr, nullptr, tokens, y,
                 nullptr,           nullptr,        nullptr, nullptr, false,   false};
    return multiply(call, set, threads);
}

EXPORT int32_t trilobit_linear(const trilobit_matrix *matrix, const float *scales, int64_t scale_count, const int8_t *x,
                               const float *x_scale, int64_t tokens, const float *bias, float *y, int32_t set,
                               int32_t threads) {
    if (const int32_t status = check(matrix->format, matrix->rows, matrix->columns, matrix->group)) return status;
    if (tokens < 0) return TRILOBIT_BAD_SHAPE;
    const Geometry g = geometry(*matrix);
    const bool grouped = matrix->group > 0;
    if (grouped ? scale_count != g.segments * g.rows : scale_count != 1 && scale_count != g.rows) return TRILOBIT_BAD_SCALE;
    Call call = {g, matrix->packed, x, nullptr, nullptr, tokens, nullptr, y, scales, x_scale, bias, grouped, scale_count != 1};
    return multiply(call, set, threads);
}

EXPORT int32_t trilobit_quantize(const void *x, int32_t bf16, int64_t tokens, int64_t columns, const float *gain,
                                 int64_t gain_count, float eps, int8_t *codes, float *scales, int32_t set, int32_t threads) {
    if (tokens < 0 || columns < 1) return TRILOBIT_BAD_SHAPE;
    if (gain_count != 0 && gain_count != 1 && gain_count != columns) return TRILOBIT_BAD_SCALE;
    const Kernels *kernels = kernels_of(set);
    if (!kernels) return TRILOBIT_BAD_SET;
    const QuantizeCall call = {x, bf16 != 0, columns, gain, gain_count, eps, codes, scales};
    run_parallel(kernels->quantize, &call, tokens, larger(1, CHUNK_BYTES / (4 * columns)), threads);
    return TRILOBIT_OK;
}
