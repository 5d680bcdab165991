// What a session holds: a graph whose parts fit together, and the memory between its products.
#pragma once

#include "engine.h"
#include "floats.h"
#include "kernels.h"
#include "memory.h"

namespace {

constexpr int64_t HEAD_ROWS = 16;  // logits are computed for so many tokens at once
constexpr int64_t MOST_PROJECTIONS = 3;
constexpr int64_t SPLIT_TOKENS = 4;  // calls of so many tokens share attention out by span too

// Memory handed out in pieces of whole cache lines; without a base, only counted.
struct Arena {
    uint8_t *base = nullptr;
    int64_t used = 0;

    template <class T>
    T *take(int64_t count) {
        T *piece = base ? reinterpret_cast<T *>(base + used) : nullptr;
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), room = divide_up(bytes, 64) * 64 + RED_ZONE;
        if (base) forbid(base + used + bytes, room - bytes);
        used += room;
        return piece;
    }
};

Geometry geometry(const trilobit_projection &p) {
    return {static_cast<Format>(p.matrix.format), p.matrix.rows, p.matrix.columns, p.matrix.group};
}

int64_t padded_head(const trilobit_graph &g) { return divide_up(g.head_size, HEAD_STEP) * HEAD_STEP; }

// Rows of codes that one token of a projection has: two for 16 bits.
int64_t code_rows(const trilobit_projection &p) { return p.activations == TRILOBIT_INT16 ? 2 : 1; }

// Quantised activations of up to some number of tokens, as products read them.
struct Quantised {
    int8_t *codes, *spread;  // [rows, K], [rows, padded columns]
    int32_t *sums;           // [rows, segments]
    float *scales;           // [rows], or [rows, segments]
};

struct Sizes {
    int64_t columns = 0, padded = 0, segments = 0;

    void cover(const trilobit_projection &p) {
        const Geometry g = geometry(p);
        columns = larger(columns, g.columns);
        padded = larger(padded, g.padded_columns());
        segments = larger(segments, g.segments);
    }
};

bool right_shape(const trilobit_projection &p, int64_t rows, int64_t columns) {
    const trilobit_matrix &m = p.matrix;
    if (!m.packed || !p.scales || m.rows != rows || m.columns != columns) return false;
    if (check(m.format, rows, columns, m.group) != TRILOBIT_OK) return false;
    const Geometry g = geometry(p);
    const bool scales = m.group > 0 ? p.scale_count == g.segments * rows : p.scale_count == 1 || p.scale_count == rows;
    const bool halves = p.half_scales == 0 || (p.half_scales == 1 && m.group > 0);
    const bool gain = p.gain_count == 0 || (p.gain && (p.gain_count == 1 || p.gain_count == columns));
    const bool activations = p.activations == TRILOBIT_PER_TOKEN || p.activations == TRILOBIT_INT16 ||
                             (p.activations == TRILOBIT_PER_GROUP && m.group > 0);
    return scales && halves && gain && activations;
}

template <class Visit>
void for_each_projection(const trilobit_graph &g, Visit visit) {
    for (int64_t l = 0; l < g.layers; ++l) {
        const trilobit_layer &a = g.layer[l];
        const int64_t queries = g.heads * g.head_size, keys = g.kv_heads * g.head_size;
        visit(a.q, queries, g.width);
        visit(a.k, keys, g.width);
        visit(a.v, keys, g.width);
        visit(a.o, g.width, queries);
        visit(a.gate, g.hidden, g.width);
        visit(a.up, g.hidden, g.width);
        visit(a.down, g.width, g.hidden);
    }
    visit(g.head, g.vocabulary, g.width);
}

bool right_graph(const trilobit_graph &g) {
    const int64_t sizes[] = {g.width, g.hidden, g.heads, g.kv_heads, g.head_size, g.layers, g.vocabulary};
    for (const int64_t size : sizes)
        if (size < 1 || size >= 1 << 24) return false;
    if (g.heads % g.kv_heads || g.heads * g.head_size >= 1 << 24) return false;
    if (g.head_size % 2 || g.head_size > MOST_HEAD_SIZE) return false;
    if (g.gate != TRILOBIT_SILU && g.gate != TRILOBIT_SQUARED_RELU) return false;
    if (!g.layer || !g.final_norm || !g.frequencies) return false;
    bool right = g.embedding || (right_shape(g.embedding_matrix, g.vocabulary, g.width) && !g.embedding_matrix.half_scales);
    for (int64_t l = 0; l < g.layers; ++l)
        right = right && g.layer[l].attention_norm && g.layer[l].mlp_norm && g.layer[l].window >= 0;
    if (right)
        for_each_projection(g, [&](const trilobit_projection &p, int64_t rows, int64_t columns) {
            const bool of_head = p.activations == TRILOBIT_INT16 || p.half_scales;
            right = right && right_shape(p, rows, columns) && (!of_head || &p == &g.head);
        });
    return right;
}

// The arrays of a session, for calls of up to T tokens.
struct Memory {
    float *cosine, *sine;                                    // [positions, E/2]
    float *x, *normed, *queries, *keys, *values, *attended;  // [T, …]
    float *gate, *up, *branch;
    float *parts;     // AttendCall::parts of SPLIT_TOKENS tokens
    int32_t *blocks;  // [T + 1]
    Quantised quantised[MOST_PROJECTIONS];
    float *scratch;  // as normed
    float *last;     // [HEAD_ROWS, D]: what the head reads

    void lay_out(Arena &a, const trilobit_graph &g, int64_t capacity, int64_t t) {
        const int64_t half = g.head_size / 2;
        cosine = a.take<float>(capacity * half);
        sine = a.take<float>(capacity * half);
        x = a.take<float>(t * g.width);
        const int64_t widest = larger(larger(g.width, g.hidden), g.heads * g.head_size);
        normed = a.take<float>(t * widest);
        scratch = a.take<float>(t * widest);
        queries = a.take<float>(t * g.heads * g.head_size);
        keys = a.take<float>(t * g.kv_heads * g.head_size);
        values = a.take<float>(t * g.kv_heads * g.head_size);
        attended = a.take<float>(t * g.heads * g.head_size);
        const int64_t spans = divide_up(capacity, SPAN), split = spans > 1 ? smaller(t, SPLIT_TOKENS) * g.heads * spans : 0;
        parts = a.take<float>(split * part_floats(padded_head(g)));
        gate = a.take<float>(t * g.hidden);
        up = a.take<float>(t * g.hidden);
        branch = a.take<float>(t * g.width);
        blocks = a.take<int32_t>(t + 1);
        Sizes sizes;
        for_each_projection(g, [&](const trilobit_projection &p, int64_t, int64_t) { sizes.cover(p); });
        const int64_t rows = larger(t, 2 * HEAD_ROWS);
        for (Quantised &q : quantised) {
            q.codes = a.take<int8_t>(rows * sizes.columns);
            q.spread = a.take<int8_t>(rows * sizes.padded);
            q.sums = a.take<int32_t>(rows * sizes.segments);
            q.scales = a.take<float>(rows * sizes.segments);
        }
        last = a.take<float>(HEAD_ROWS * g.width);
    }
};

}  // namespace
