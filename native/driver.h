// Loops that every vector instruction set shares. The set itself is a struct with
//
//     dot<F>(stream, x, tiles, sums)       sums[32] += Σ symbol · x of one panel, for one token
//     unpack<F>(stream, tiles, symbols)    a panel as one symbol a byte: for each four columns 2 × 64 bytes, like int8
//     micro<wide>(panels, count, x, stride, tokens, steps, fresh, sums)
//                                          sums[t][64] = or (not fresh) += Σ symbol · x over 4·steps columns of one or two
//                                          panels and up to MICRO_TOKENS tokens; wide: symbols are full bytes, else at most 2
//     FEW_TOKENS, few<F>(stream, x, stride, tokens, tiles, sums)      sums[t][32] = Σ symbol · x of one panel, for up to so many
//                                          tokens, unpacked in registers; 0: the set has none
//     symbol_offset(F)                     what its symbols are above the codes
//
// matrix–vector: one pass over the stream, everything else in registers.
// matrix–matrix: a block of columns of two panels is unpacked once into a tile that stays in the first-level cache, and
// multiplied by all tokens, six at a time; a token block's int32 sums stay in the second-level cache. A few tokens do not
// repay the tile: where the set can, they meet the symbols in registers.
#pragma once

#include "kernels.h"
#include "quantize.h"

#include <cstring>

namespace {

constexpr int MICRO_TOKENS = 6;
constexpr int TOKEN_BLOCK = 192;
constexpr int UNIT_ROWS = UNIT_PANELS * PANEL_ROWS;
// Tiles between drains of a dot's accumulators: two_bit's last one holds up to 64 · 2 · 128 · 4 a tile.
constexpr int64_t DOT_TILES = 4096;
constexpr int64_t PAIR_TILES = 32;  // 4 to 16 KB

constexpr int64_t block_tiles(Format f) { return 320 / tile_columns(f); }

// `count` in blocks of at most `most`, as equal as multiples of `step` allow: the size of one.
constexpr int64_t even_share(int64_t count, int64_t most, int64_t step) {
    return divide_up(divide_up(count, divide_up(count, most)), step) * step;
}

// Symbol sums of `n` rows and one token become outputs, segment by segment. totals: room for them; with groups, it collects the
// scaled sums of the segments so far.
struct Output {
    const Call &c;
    int64_t row;
    int n, offset;

    Output(const Call &call, int64_t row_, int rows, int symbol_offset)
        : c(call), row(row_), n(static_cast<int>(smaller(rows, call.shape.rows - row_))), offset(symbol_offset) {}

    void segment(int64_t t, int64_t s, const int32_t *__restrict sums, float *__restrict totals) const {
        const uint32_t shift = static_cast<uint32_t>(c.sums[t * c.shape.segments + s]) * static_cast<uint32_t>(offset);
        auto code_sum = [&](int r) { return static_cast<int32_t>(static_cast<uint32_t>(sums[r]) - shift); };
        const int rows = n;
        if (c.integers) {
            int32_t *__restrict y = c.integers + t * c.shape.rows + row;
            for (int r = 0; r < rows; ++r) y[r] = s == 0 ? code_sum(r) : y[r] + code_sum(r);
            return;
        }
        const float x_scale = c.x_scale[c.x_grouped ? t * c.shape.segments + s : t];
        if (c.grouped) {
            const int64_t first = s * c.shape.rows + row;
            const float each = c.x_grouped ? x_scale : 1;  // times 1 is exact
            if (c.half_scales) {
                const uint16_t *__restrict scales = c.half_scales + first;
                for (int r = 0; r < rows; ++r)
                    totals[r] = totals[r] + static_cast<float>(code_sum(r)) * (from_half(scales[r]) * each);
            } else {
                const float *__restrict scales = c.scales + first;
                for (int r = 0; r < rows; ++r) totals[r] = totals[r] + static_cast<float>(code_sum(r)) * (scales[r] * each);
            }
            if (s + 1 < c.shape.segments) return;
            const float all = c.x_grouped ? 1 : x_scale;
            for (int r = 0; r < rows; ++r) totals[r] = totals[r] * all;
        } else if (c.per_row) {
            const float *__restrict scales = c.scales + row;
            for (int r = 0; r < rows; ++r) totals[r] = static_cast<float>(code_sum(r)) * (x_scale * scales[r]);
        } else {
            const float scale = x_scale * c.scales[0];
            for (int r = 0; r < rows; ++r) totals[r] = static_cast<float>(code_sum(r)) * scale;
        }
        const bool second = c.pairs && t % 2;
        float *__restrict y = c.y + (c.pairs ? t / 2 : t) * c.shape.rows + row;
        if (second) {
            for (int r = 0; r < rows; ++r) y[r] = y[r] + totals[r];
        } else if (c.bias) {
            const float *__restrict bias = c.bias + row;
            for (int r = 0; r < rows; ++r) y[r] = totals[r] + bias[r];
        } else {
            std::memcpy(y, totals, sizeof(float) * static_cast<size_t>(rows));
        }
    }
};

// Into the second-level cache: the first is full of what has been unpacked. May lie past the end.
inline void prefetch_block(const uint8_t *stream, int64_t from, int64_t bytes) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(stream) + static_cast<uintptr_t>(from);
    for (int64_t i = 0; i < bytes; i += VECTOR_BYTES)
        __builtin_prefetch(reinterpret_cast<const void *>(start + static_cast<uintptr_t>(i)), 0, 2);
}

template <class Set, Format F>
void gemv_panels(const Call &c, int64_t begin, int64_t end) {
    const Geometry &g = c.shape;
    const int64_t width = g.padded_columns();
    const uint8_t *stream = c.packed + begin * g.panel_bytes();
    for (int64_t panel = begin; panel < end; ++panel) {
        const Output out(c, panel * PANEL_ROWS, PANEL_ROWS, Set::symbol_offset(F));
        alignas(64) int32_t sums[GEMV_TOKENS][PANEL_ROWS];
        alignas(64) float totals[GEMV_TOKENS][PANEL_ROWS] = {};
        const int8_t *x = c.spread;
        for (int64_t s = 0; s < g.segments; ++s) {
            std::memset(sums, 0, sizeof sums);
            for (int64_t left = g.tiles_of(s); left > 0;) {  // a second token's weights come from the first-level cache
                const int64_t tiles = smaller(left, c.tokens == 1 ? DOT_TILES : PAIR_TILES);
                for (int64_t t = 0; t < c.tokens; ++t) Set::template dot<F>(stream, x + t * width, tiles, sums[t]);
                stream += tiles * tile_bytes(F);
                x += tiles * tile_columns(F);
                left -= tiles;
            }
            if (c.grouped) {  // a panel's scales lie far apart: ask for the next one's
                const uintptr_t next = static_cast<uintptr_t>(s * g.rows + out.row + PANEL_ROWS);
                const uintptr_t scales = c.half_scales ? reinterpret_cast<uintptr_t>(c.half_scales) + 2 * next
                                                       : reinterpret_cast<uintptr_t>(c.scales) + 4 * next;
                for (uintptr_t i = 0; i < (c.half_scales ? 2 : 4) * PANEL_ROWS; i += 64)
                    __builtin_prefetch(reinterpret_cast<const void *>(scales + i));
            }
            for (int64_t t = 0; t < c.tokens; ++t) out.segment(t, s, sums[t], totals[t]);
        }
    }
}

template <class Set, Format F>
void few_panels(const Call &c, int64_t begin, int64_t end) {
    const Geometry &g = c.shape;
    alignas(64) int32_t sums[Set::FEW_TOKENS][PANEL_ROWS];
    alignas(64) float totals[Set::FEW_TOKENS][PANEL_ROWS];
    const int64_t width = g.padded_columns();
    const uint8_t *stream = c.packed + begin * g.panel_bytes();
    for (int64_t panel = begin; panel < end; ++panel) {
        const Output out(c, panel * PANEL_ROWS, PANEL_ROWS, Set::symbol_offset(F));
        const int8_t *x = c.spread;
        if (c.grouped) std::memset(totals, 0, sizeof totals);
        for (int64_t s = 0; s < g.segments; ++s) {
            const int64_t tiles = g.tiles_of(s);
            Set::template few<F>(stream, x, width, static_cast<int>(c.tokens), tiles, sums[0]);
            stream += tiles * tile_bytes(F);
            x += tiles * tile_columns(F);
            for (int64_t t = 0; t < c.tokens; ++t) out.segment(t, s, sums[t], totals[t]);
        }
    }
}

template <class Set, Format F>
void gemm_units(const Call &c, int64_t begin, int64_t end) {
    if constexpr (Set::FEW_TOKENS > 0 && F != Format::int8) {
        if (c.tokens <= Set::FEW_TOKENS)
            return few_panels<Set, F>(c, UNIT_PANELS * begin, smaller(UNIT_PANELS * end, c.shape.panels()));
    }
    constexpr int64_t BLOCK = block_tiles(F), STEPS = tile_columns(F) / 4;  // a step: four columns
    alignas(64) uint8_t unpacked[F == Format::int8 ? 1 : UNIT_PANELS][F == Format::int8 ? 1 : BLOCK * STEPS * PAIR_BYTES];
    alignas(64) int32_t sums[TOKEN_BLOCK][UNIT_ROWS];
    alignas(64) float totals[TOKEN_BLOCK][UNIT_ROWS];
    const Geometry &g = c.shape;
    const int64_t width = g.padded_columns(), token_block = even_share(c.tokens, TOKEN_BLOCK, MICRO_TOKENS);
    for (int64_t unit = begin; unit < end; ++unit) {
        const Output out(c, unit * UNIT_ROWS, UNIT_ROWS, Set::symbol_offset(F));
        const int panels = static_cast<int>(smaller(UNIT_PANELS, g.panels() - unit * UNIT_PANELS));
        const uint8_t *stream = c.packed + unit * UNIT_PANELS * g.panel_bytes();
        for (int64_t first = 0; first < c.tokens; first += token_block) {
            const int tokens = static_cast<int>(smaller(token_block, c.tokens - first));
            if (c.grouped) std::memset(totals, 0, sizeof totals[0] * static_cast<size_t>(tokens));
            for (int64_t s = 0; s < g.segments; ++s) {
                const int64_t share = even_share(g.tiles_of(s), BLOCK, 1);
                for (int64_t done = 0, tiles; done < g.tiles_of(s); done += tiles) {
                    tiles = smaller(share, g.tiles_of(s) - done);
                    const int64_t tile = s * g.segment_tiles + done;
                    const uint8_t *symbols[UNIT_PANELS] = {nullptr, nullptr};
                    for (int p = 0; p < panels; ++p) {
                        const uint8_t *packed = stream + p * g.panel_bytes() + tile * tile_bytes(F);
                        if constexpr (F == Format::int8) {
                            symbols[p] = packed;
                        } else {
                            Set::template unpack<F>(packed, tiles, unpacked[p]);
                            symbols[p] = unpacked[p];
                        }
                    }
                    const int8_t *x = c.spread + first * width + tile * tile_columns(F);
                    // What is unpacked next comes while the tokens are multiplied, a part with every six of them.
                    const bool last = s + 1 == g.segments && done + tiles == g.tiles_of(s);
                    const int64_t block = tiles * tile_bytes(F);
                    const int64_t jump = (tile + tiles) * tile_bytes(F) + (last ? UNIT_PANELS * g.panel_bytes() - g.panel_bytes() : 0);
                    const int64_t part = divide_up(divide_up(block, divide_up(tokens, MICRO_TOKENS)), VECTOR_BYTES) * VECTOR_BYTES;
                    for (int t = 0; t < tokens; t += MICRO_TOKENS) {
                        if (F != Format::int8)
                            for (int p = 0; p < panels; ++p)
                                prefetch_block(stream + p * g.panel_bytes(), jump + t / MICRO_TOKENS * part, part);
                        Set::template micro<F == Format::int8>(symbols, panels, x + t * width, width,
                                                               static_cast<int>(smaller(MICRO_TOKENS, tokens - t)),
                                                               tiles * STEPS, done == 0, sums[t]);
                    }
                }
                for (int t = 0; t < tokens; ++t) out.segment(first + t, s, sums[t], totals[t]);
            }
        }
    }
}

template <class Set>
void gemv(const void *call, int64_t begin, int64_t end) {
    const Call &c = *static_cast<const Call *>(call);
    switch (c.shape.format) {
        case Format::two_bit: return gemv_panels<Set, Format::two_bit>(c, begin, end);
        case Format::base3: return gemv_panels<Set, Format::base3>(c, begin, end);
        case Format::int8: return gemv_panels<Set, Format::int8>(c, begin, end);
    }
}

template <class Set>
void gemm(const void *call, int64_t begin, int64_t end) {
    const Call &c = *static_cast<const Call *>(call);
    switch (c.shape.format) {
        case Format::two_bit: return gemm_units<Set, Format::two_bit>(c, begin, end);
        case Format::base3: return gemm_units<Set, Format::base3>(c, begin, end);
        case Format::int8: return gemm_units<Set, Format::int8>(c, begin, end);
    }
}

// Dispatch a run-time number of tokens 1 … 6 to a compile-time one: every loop over accumulators has to unroll.
template <template <int> class F, class... A>
void with_tokens(int tokens, A... arguments) {
    switch (tokens) {
        case 1: return F<1>::run(arguments...);
        case 2: return F<2>::run(arguments...);
        case 3: return F<3>::run(arguments...);
        case 4: return F<4>::run(arguments...);
        case 5: return F<5>::run(arguments...);
        default: return F<6>::run(arguments...);
    }
}

inline int32_t four_activations(const int8_t *x) {
    int32_t v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

// Inlined into a loop over tokens, a dot product loses its accumulators to the stack.
#define NOT_INLINED __attribute__((noinline))

constexpr uint64_t PREFETCH_BYTES = 8192;

inline const char *ahead(const uint8_t *stream) {  // may lie past the end: an address to prefetch, never a pointer to read
    return reinterpret_cast<const char *>(reinterpret_cast<uintptr_t>(stream) + PREFETCH_BYTES);
}

// 1/d modulo 2³²: multiplying by it divides a multiple of d exactly, also where the multiple has wrapped.
constexpr int32_t INVERSE_OF_3 = static_cast<int32_t>(0xAAAAAAABu);
constexpr int32_t INVERSE_OF_9 = static_cast<int32_t>(0x38E38E39u);
constexpr int32_t INVERSE_OF_27 = static_cast<int32_t>(0x684BDA13u);
constexpr int32_t INVERSE_OF_81 = static_cast<int32_t>(0x781948B1u);

}  // namespace
