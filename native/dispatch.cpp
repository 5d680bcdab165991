// The entry points of trilobit.h: check, pack, spread the activations, choose an instruction set, share out the work.
//
// The processor is asked as the library is loaded: what it has (cpuid) and what the system saves for it (xgetbv).
#include "bf16.h"
#include "floats.h"
#include "kernels.h"
#include "memory.h"
#include "spread.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
struct Features {
    bool avx2, fma, avxvnni, avx512, avx512vbmi, avx512bf16;

    Features() : avx2(false), fma(false), avxvnni(false), avx512(false), avx512vbmi(false), avx512bf16(false) {
        unsigned a, b, c, d, a1, b1, c1, d1;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
        unsigned saved, upper;
        asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
        const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
        const bool has_fma = c & 1u << 12;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        const bool amx_bf16 = d & 1u << 22;
        avx2 = ymm && (b & 1u << 5);
        fma = avx2 && has_fma;
        avx512 = zmm && (b & 1u << 16) && (b & 1u << 30) && (b & 1u << 31) && (c & 1u << 11);  // F, BW, VL, VNNI
        avx512vbmi = avx512 && (c & 1u << 1);
        if (a < 1 || !__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) return;
        avxvnni = avx2 && (a1 & 1u << 4);
        avx512bf16 = avx512 && (a1 & 1u << 5) && !amx_bf16;  // where there are tiles, torch uses them and is faster
    }
};

const Features features;
#endif

struct Set {
    const char *name;
    const Kernels *kernels;
    const FloatKernels *floats;
    bool (*runs)();
};

const Set SETS[] = {
    {"scalar", &KERNELS_SCALAR, &FLOATS_BASE, always},
#if defined(__x86_64__)
    {"avx2", &KERNELS_AVX2, &FLOATS_AVX2, [] { return features.avx2 && features.fma; }},
    {"avxvnni", &KERNELS_AVXVNNI, &FLOATS_AVX2, [] { return features.avxvnni && features.fma; }},
    {"avx512", &KERNELS_AVX512, &FLOATS_AVX512, [] { return features.avx512; }},
    {"avx512vbmi", &KERNELS_AVX512VBMI, &FLOATS_AVX512, [] { return features.avx512vbmi; }},
#elif defined(__aarch64__) && defined(__linux__)
    {"neon", &KERNELS_NEON, &FLOATS_BASE, [] { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }},  // HWCAP_ASIMDDP: sdot
#elif defined(__aarch64__)
    {"neon", &KERNELS_NEON, &FLOATS_BASE, always},  // every Apple processor of this kind has sdot
#endif
};
constexpr int32_t SET_COUNT = sizeof SETS / sizeof SETS[0];

bool has(int32_t set) { return set >= 0 && set < SET_COUNT && SETS[set].runs(); }

Geometry geometry(const trilobit_matrix &m) { return {static_cast<Format>(m.format), m.rows, m.columns, m.group}; }

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
        spread_token(g, call.x + t * g.columns, as_it_is ? nullptr : spread + t * width, sums + t * g.segments);
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
    if (call.tokens <= GEMV_TOKENS) {
        run_parallel(kernels->gemv, &call, panels, larger(1, CHUNK_BYTES / call.shape.panel_bytes()), threads, true);
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

}  // namespace

const Kernels *kernels_of(int32_t set) {
    if (set == -1) set = trilobit_best_set();
    return has(set) ? SETS[set].kernels : nullptr;
}

const FloatKernels *floats_of(int32_t set) {
    if (set == -1) set = trilobit_best_set();
    return has(set) ? SETS[set].floats : nullptr;
}

const Bf16Kernels *bf16_kernels() {
#if defined(__x86_64__)
    if (features.avx512bf16) return &BF16_AVX512;
#endif
    return nullptr;
}

int32_t check(int32_t format, int64_t rows, int64_t columns, int64_t group) {
    if (format < TRILOBIT_TWO_BIT || format > TRILOBIT_INT8) return TRILOBIT_BAD_FORMAT;
    const int64_t most = max_columns(static_cast<Format>(format));
    const bool fits = rows >= 1 && rows <= INT32_MAX && columns >= 1 && columns <= most && group >= 0;
    return fits ? TRILOBIT_OK : TRILOBIT_BAD_SHAPE;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t trilobit_abi(void) { return TRILOBIT_ABI; }
EXPORT int32_t trilobit_set_count(void) { return SET_COUNT; }
EXPORT const char *trilobit_set_name(int32_t set) { return set >= 0 && set < SET_COUNT ? SETS[set].name : nullptr; }
EXPORT int32_t trilobit_set_runs_here(int32_t set) { return has(set); }

EXPORT int32_t trilobit_best_set(void) {
    int32_t set = SET_COUNT - 1;
    while (!SETS[set].runs()) --set;
    return set;
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
                 nullptr,           nullptr,        nullptr, nullptr, false,   false,  false, nullptr, false};
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
    Call call = {g,       matrix->packed, x,    nullptr, nullptr,          tokens, nullptr, y, scales,
                 x_scale, bias,           grouped, scale_count != 1, false, nullptr, false};
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

EXPORT int32_t trilobit_read(const uint8_t *from, int64_t bytes, int32_t set, int32_t threads) {
    const FloatKernels *floats = floats_of(set);
    if (!floats) return TRILOBIT_BAD_SET;
    if (bytes < 0) return TRILOBIT_BAD_SHAPE;
    const ReadCall call = {from, bytes};
    run_parallel(floats->read, &call, divide_up(bytes, READ_CHUNK), 1, threads);
    return TRILOBIT_OK;
}
