// The packed layouts. All three interleave two blocks of 16 rows into one sequential stream, a panel of 32 rows:
//
//     panel p   rows 32p … 32p + 31, one after another; rows past O hold code 0
//     tile      two_bit 16 columns, base3 20, int8 16; columns past K, or past the end of their group, hold code 0
//     in a tile, 64-byte vectors: lane r (4 bytes) belongs to row r of a block, byte j of a lane to column ≡ j mod 4
//
//     two_bit   vector: bits 7 6 | 5 4 | 3 2 | 1 0      block 0's vector, then block 1's: 128 bytes a tile
//               column:  12 + j   8 + j  4 + j   j      symbol = code + 1
//     base3     byte = Σ_i 3^i · (code of column 4i + j, plus 1), i = 0 … 4, at most 242; 128 bytes a tile
//     int8      byte = code + 128; for each four columns block 0's vector, then block 1's: 512 bytes a tile
//
// One broadcast dword of activations, x[4i … 4i + 3], thus meets bit pair (trit, vector) i of every lane: no horizontal
// sums. Groups are padded to whole tiles, so that a tile has one scale. Kernels multiply symbols, not codes, and
// subtract offset · Σx.
//
// Everything here has internal linkage: the files that include it are compiled for different processors, and a linker
// that merged their copies could keep one that this processor cannot run.
#pragma once

#include "trilobit.h"

#include <cstdint>

namespace {

enum class Format : int32_t { two_bit = TRILOBIT_TWO_BIT, base3 = TRILOBIT_BASE3, int8 = TRILOBIT_INT8 };

constexpr int BLOCK_ROWS = 16;
constexpr int PANEL_ROWS = 32;
constexpr int VECTOR_BYTES = 64;
constexpr int PAIR_BYTES = 2 * VECTOR_BYTES;

constexpr int tile_columns(Format f) { return f == Format::base3 ? 20 : 16; }
constexpr int tile_bytes(Format f) { return f == Format::int8 ? 4 * PAIR_BYTES : PAIR_BYTES; }
constexpr int symbol_offset(Format f) { return f == Format::int8 ? 128 : 1; }
constexpr int64_t max_columns(Format f) { return f == Format::int8 ? (1 << 17) - 1 : (1 << 24) - 1; }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Where the columns of a panel lie: segments are groups, or the whole row where there are none.
struct Geometry {
    Format format;
    int64_t rows, columns, group;
    int64_t segments, segment_tiles, tiles;  // tiles of all but the last segment; of the whole panel

    constexpr Geometry() : Geometry(Format::two_bit, 1, 1, 0) {}
    constexpr Geometry(Format f, int64_t rows_, int64_t columns_, int64_t group_)
        : format(f),
          rows(rows_),
          columns(columns_),
          group(group_ > 0 && group_ < columns_ ? group_ : columns_),
          segments(divide_up(columns, group)),
          segment_tiles(divide_up(group, tile_columns(f))),
          tiles((segments - 1) * segment_tiles + divide_up(columns - (segments - 1) * group, tile_columns(f))) {}

    constexpr int64_t panels() const { return divide_up(rows, PANEL_ROWS); }
    constexpr int64_t panel_bytes() const { return tiles * tile_bytes(format); }
    constexpr int64_t padded_columns() const { return tiles * tile_columns(format); }
    constexpr int64_t tiles_of(int64_t segment) const {
        return segment + 1 < segments ? segment_tiles : tiles - segment * segment_tiles;
    }
    constexpr int64_t columns_of(int64_t segment) const { return smaller(group, columns - segment * group); }
};

// The byte that holds column k of row o, and which of its symbols it is.
struct Place {
    int64_t byte;
    int symbol;
};

constexpr Place place(const Geometry &g, int64_t o, int64_t k) {
    const int64_t segment = k / g.group, within = k % g.group, width = tile_columns(g.format);
    const int64_t tile = segment * g.segment_tiles + within / width;
    const int column = static_cast<int>(within % width), row = static_cast<int>(o % PANEL_ROWS);
    const int64_t start = o / PANEL_ROWS * g.panel_bytes() + tile * tile_bytes(g.format);
    const int64_t vector = g.format == Format::int8 ? column / 4 * PAIR_BYTES : 0;
    return {start + vector + row / BLOCK_ROWS * VECTOR_BYTES + row % BLOCK_ROWS * 4 + column % 4, column / 4};
}

constexpr int POWERS_OF_3[5] = {1, 3, 9, 27, 81};

constexpr int code_at(Format f, uint8_t byte, int symbol) {
    if (f == Format::int8) return byte - 128;
    return (f == Format::two_bit ? byte >> (2 * symbol) & 3 : byte / POWERS_OF_3[symbol] % 3) - 1;
}

}  // namespace
