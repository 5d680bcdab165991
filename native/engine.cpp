// A decoder step by step: what runs between the products is shared out by token, products by rows of their matrices,
// attention by rows and key heads, one token's by positions too. A layer is five joins of the threads where a call has one
// token:
//
//     norm, quantise │ q k v │ rotate, store │ attention │ quantise │ o │ add, norm, quantise │ gate, up, f │ quantise │ down
//
// Block norm and quantiser are one pass where a projection has no norm of its own, and its codes are shared by all that
// read them.
#include "session.h"
#include "spread.h"

#include <cmath>
#include <new>

namespace {

constexpr int64_t ROW_CHUNK = 16 << 10;  // numbers of a row job that a thread takes at once
constexpr int64_t BLOCK_QUERIES = 64;    // queries of a block of attention
constexpr int64_t EVEN_ITEMS = 8;        // pieces of work a thread that come out about even

// Run f(begin, end) over parts of 0 … count.
template <class F>
void parallel(int64_t count, int64_t grain, int threads, const F &f, bool streams = false) {
    auto run = [](const void *call, int64_t begin, int64_t end) { (*static_cast<const F *>(call))(begin, end); };
    run_parallel(run, &f, count, grain, threads, streams);
}

bool same_input(const trilobit_projection &a, const trilobit_projection &b) {
    return a.gain_count == 0 && b.gain_count == 0 && a.activations == b.activations && a.matrix.format == b.matrix.format &&
           a.matrix.group == b.matrix.group && a.matrix.columns == b.matrix.columns;
}

void add_row(float *x, const float *y, int64_t n) {
    for (int64_t k = 0; k < n; ++k) x[k] += y[k];
}

}  // namespace

struct trilobit_session : Memory {
    trilobit_graph graph;
    int64_t slots, capacity, most_tokens;
    CacheShape shape;
    uint8_t *cache = nullptr, *memory = nullptr;
    int64_t cache_bytes, memory_bytes;

    // For the duration of a call.
    const Kernels *kernels;
    const FloatKernels *floats;
    int threads;

    int64_t row_grain(int64_t width) const { return larger(1, ROW_CHUNK / width); }

    void rotate(float *head, const float *c, const float *s) const {
        const int64_t half = graph.head_size / 2;
        for (int64_t i = 0; i < half; ++i) {
            const float a = head[i], b = head[i + half];
            head[i] = a * c[i] - b * s[i];
            head[i + half] = b * c[i] + a * s[i];
        }
    }

    // y = a row [K], or what an RMSNorm makes of it in `to`, where there is a gain.
    const float *normalised(const float *row, const float *gain, int64_t count, float eps, int64_t n, float *to) const {
        if (count == 0) return row;
        const NormalizeCall call = {row, to, gain, n, count, eps};
        floats->normalize(&call, 0, 1);
        return to;
    }

    // A row [K] of token t as a projection's codes, after an RMSNorm where there is a gain.
    void quantise_row(const trilobit_projection &p, const float *row, const float *gain, int64_t gain_count, float eps,
                      int64_t t, const Quantised &to) const {
        const Geometry g = geometry(p);
        const int64_t n = g.columns, codes = code_rows(p);
        int8_t *at = to.codes + t * codes * n;
        float *own = scratch + t * n;
        if (p.activations == TRILOBIT_PER_TOKEN) {
            const QuantizeCall call = {row, false, n, gain, gain_count, eps, at, to.scales + t};
            kernels->quantize(&call, 0, 1);
        } else if (p.activations == TRILOBIT_PER_GROUP) {
            row = normalised(row, gain, gain_count, eps, n, own);
            float *scales = to.scales + t * g.segments;
            const int64_t whole = n / g.group, done = whole * g.group;
            const QuantizeCall groups = {row, false, g.group, nullptr, 0, 0, at, scales};
            const QuantizeCall rest = {row + done, false, n - done, nullptr, 0, 0, at + done, scales + whole};
            kernels->quantize(&groups, 0, whole);
            if (done < n) kernels->quantize(&rest, 0, 1);
        } else {
            row = normalised(row, gain, gain_count, eps, n, own);
            const QuantizeCall call = {row, false, n, nullptr, 0, 0, at, to.scales + 2 * t};
            kernels->quantize(&call, 0, 1);
            for (int64_t k = 0; k < n; ++k) own[k] = row[k] - static_cast<float>(at[k]) * to.scales[2 * t];
            const QuantizeCall left = {own, false, n, nullptr, 0, 0, at + n, to.scales + 2 * t + 1};
            kernels->quantize(&left, 0, 1);
        }
        const bool spread = g.padded_columns() != n;
        for (int64_t r = t * codes; r < (t + 1) * codes; ++r)
            spread_token(g, to.codes + r * n, spread ? to.spread + r * g.padded_columns() : nullptr, to.sums + r * g.segments);
    }

    struct Product {
        const trilobit_projection *projection;
        float *y;
    };

    // Token t of input [T, K], after a block norm or none, as the codes that each of up to three projections reads.
    void quantise_inputs(const Product *products, int count, const float *input, const float *norm, float eps,
                         int64_t t) const {
        const int64_t n = products[0].projection->matrix.columns;
        const float *row = input + t * n;
        bool own_norms = false;
        for (int i = 0; i < count; ++i) own_norms = own_norms || products[i].projection->gain_count;
        if (own_norms && norm) row = normalised(row, norm, n, eps, n, normed + t * n);
        for (int i = 0; i < count; ++i) {
            const trilobit_projection &p = *products[i].projection;
            if (i > 0 && same_input(*products[0].projection, p)) continue;
            if (own_norms) quantise_row(p, row, p.gain, p.gain_count, p.eps, t, quantised[i]);
            else quantise_row(p, row, norm, norm ? n : 0, eps, t, quantised[i]);
        }
    }

    // A matrix and its quantised input as work for the kernels, which is shared out in `items` of item_rows(rows) rows.
    Call call_of(const Product &product, const Quantised &q, int64_t tokens) const {
        const trilobit_projection &p = *product.projection;
        const Geometry g = geometry(p);
        return {g, p.matrix.packed, q.codes, g.padded_columns() != g.columns ? q.spread : q.codes, q.sums,
                tokens * code_rows(p), nullptr, product.y, p.half_scales ? nullptr : static_cast<const float *>(p.scales),
                q.scales, p.bias, p.matrix.group > 0, p.scale_count != 1, p.activations == TRILOBIT_PER_GROUP,
                p.half_scales ? static_cast<const uint16_t *>(p.scales) : nullptr, p.activations == TRILOBIT_INT16};
    }

    static bool is_gemv(const Call &call) { return call.tokens <= GEMV_TOKENS; }
    static int64_t item_rows(const Call &call) { return is_gemv(call) ? PANEL_ROWS : UNIT_PANELS * PANEL_ROWS; }
    static int64_t items(const Call &call) { return divide_up(call.shape.rows, item_rows(call)); }

    void run(const Call &call, int64_t begin, int64_t end) const {
        (is_gemv(call) ? kernels->gemv : kernels->gemm)(&call, begin, end);
    }

    // Items that a thread takes at once: chunks of weights for one token, less where some threads would have nothing.
    int64_t grain(const Call &call, int64_t count) const {
        const int64_t chunk = is_gemv(call) ? CHUNK_BYTES / call.shape.panel_bytes() : 1;
        return larger(1, smaller(chunk, divide_up(count, 2 * larger(1, threads))));
    }

    // y = W · x for up to three matrices that read the same tokens, as one piece of work.
    void multiply(const Product *products, int count, int64_t tokens) const {
        Call calls[MOST_PROJECTIONS];
        int64_t ends[MOST_PROJECTIONS], total = 0;
        for (int i = 0; i < count; ++i) {
            calls[i] = call_of(products[i], input_of(products, i), tokens);
            ends[i] = total += items(calls[i]);
        }
        parallel(total, grain(calls[0], total), threads, [&](int64_t begin, int64_t end) {
            int64_t start = 0;
            for (int i = 0; i < count; start = ends[i++]) {
                const int64_t b = larger(begin, start), e = smaller(end, ends[i]);
                if (b < e) run(calls[i], b - start, e - start);
            }
        }, is_gemv(calls[0]));
    }

    // gate = f(W_gate · x) · (W_up · x): the same rows of both, then f while they are in the second-level cache.
    void multiply_gate(const Product *products, int64_t tokens) const {
        const Call both[] = {call_of(products[0], input_of(products, 0), tokens),
                             call_of(products[1], input_of(products, 1), tokens)};
        const int64_t rows = item_rows(both[0]), count = items(both[0]);
        parallel(count, grain(both[0], count), threads, [&](int64_t begin, int64_t end) {
            for (const Call &call : both) run(call, begin, end);
            const GateCall gating = {gate, up, graph.hidden, begin * rows, smaller(end * rows, graph.hidden),
                                     graph.gate == TRILOBIT_SQUARED_RELU};
            floats->gate(&gating, 0, tokens);
        }, is_gemv(both[0]));
    }

    const Quantised &input_of(const Product *products, int i) const {
        return quantised[same_input(*products[0].projection, *products[i].projection) ? 0 : i];
    }

    // Normalise and rotate the keys and queries of row t, and store its key and value.
    void store(int64_t l, int64_t t, int64_t slot, int64_t position) const {
        const trilobit_graph &g = graph;
        const trilobit_layer &layer = g.layer[l];
        const int64_t e = g.head_size, half = e / 2;
        const float *c = cosine + position * half, *s = sine + position * half;
        auto prepare = [&](float *head, const float *norm) {
            if (norm) {
                const NormalizeCall call = {head, head, norm, e, e, g.eps};
                floats->normalize(&call, 0, 1);
            }
            if (layer.rotary) rotate(head, c, s);
        };
        for (int64_t h = 0; h < g.heads; ++h) prepare(queries + (t * g.heads + h) * e, layer.q_norm);
        for (int64_t h = 0; h < g.kv_heads; ++h) {
            float *key = keys + (t * g.kv_heads + h) * e;
            const float *value = values + (t * g.kv_heads + h) * e;
            prepare(key, layer.k_norm);
            put_in_cache(shape, cache + shape.block_at(slot, position / TILE, l, h), position % TILE, key, value);
        }
    }

    void embed(int32_t id, float *to) const {
        const trilobit_graph &g = graph;
        if (g.embedding) {
            const uint16_t *row = static_cast<const uint16_t *>(g.embedding) + int64_t{id} * g.width;
            for (int64_t k = 0; k < g.width; ++k) {
                const uint32_t bits = static_cast<uint32_t>(row[k]) << 16;
                std::memcpy(to + k, &bits, sizeof bits);
            }
            return;
        }
        const trilobit_projection &p = g.embedding_matrix;
        const Geometry shape_of = geometry(p);
        for (int64_t k = 0; k < g.width; ++k) {
            const Place at = place(shape_of, id, k);
            const int code = code_at(shape_of.format, p.matrix.packed[at.byte], at.symbol);
            const int64_t scale = p.matrix.group > 0 ? k / shape_of.group * g.vocabulary + id : p.scale_count == 1 ? 0 : id;
            to[k] = static_cast<float>(code) * static_cast<const float *>(p.scales)[scale];
        }
    }

    int split_into_blocks(const int32_t *slot, int64_t tokens) {
        const int64_t most = larger(1, BLOCK_QUERIES / (graph.heads / graph.kv_heads));
        int count = 0;
        for (int64_t t = 0; t < tokens; ++t)
            if (t == 0 || slot[t] != slot[t - 1] || t - blocks[count - 1] == most) blocks[count++] = static_cast<int32_t>(t);
        blocks[count] = static_cast<int32_t>(tokens);
        return count;
    }

    // Spans up to the furthest position, where key heads alone are too few to share attention out evenly; else 0.
    int64_t spans_to_share(int64_t tokens, const int32_t *position, int block_count) const {
        if (threads < 2 || tokens > SPLIT_TOKENS || block_count * graph.kv_heads >= EVEN_ITEMS * threads) return 0;
        int64_t furthest = 0;
        for (int64_t t = 0; t < tokens; ++t) furthest = larger(furthest, position[t]);
        return furthest < SPAN ? 0 : furthest / SPAN + 1;
    }

    void run_layer(int64_t l, int64_t tokens, const int32_t *slot, const int32_t *position, int block_count, int64_t spans) {
        const trilobit_graph &g = graph;
        const trilobit_layer &layer = g.layer[l];
        const int64_t inner = g.heads * g.head_size;
        const Product qkv[] = {{&layer.q, queries}, {&layer.k, keys}, {&layer.v, values}};
        const Product o[] = {{&layer.o, branch}}, down[] = {{&layer.down, branch}};
        const Product gate_up[] = {{&layer.gate, gate}, {&layer.up, up}};

        parallel(tokens, row_grain(g.width), threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                if (l > 0) add_row(x + t * g.width, branch + t * g.width, g.width);
                quantise_inputs(qkv, 3, x, layer.attention_norm, g.eps, t);
            }
        });
        multiply(qkv, 3, tokens);
        parallel(tokens, row_grain(inner), threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) store(l, t, slot[t], position[t]);
        });
        const AttendCall attend = {shape,  cache,   l,            queries,           attended, slot, position,
                                   blocks, g.heads, layer.window, g.attention_scale, spans,    parts};
        const int64_t items = block_count * g.kv_heads;
        if (spans) run_parallel(floats->attend_spans, &attend, items * spans, 1, threads);
        else run_parallel(floats->attend, &attend, items, 1, threads);
        parallel(tokens, row_grain(inner), threads, [&](int64_t begin, int64_t end) {
            if (spans) floats->combine(&attend, begin, end);
            for (int64_t t = begin; t < end; ++t) quantise_inputs(o, 1, attended, nullptr, 0, t);
        });
        multiply(o, 1, tokens);
        parallel(tokens, row_grain(g.width), threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                add_row(x + t * g.width, branch + t * g.width, g.width);
                quantise_inputs(gate_up, 2, x, layer.mlp_norm, g.eps, t);
            }
        });
        multiply_gate(gate_up, tokens);
        parallel(tokens, row_grain(g.hidden), threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) quantise_inputs(down, 1, gate, nullptr, 0, t);
        });
        multiply(down, 1, tokens);
    }

    void run_head(int64_t count, const int32_t *rows, float *to) const {
        const trilobit_graph &g = graph;
        for (int64_t first = 0; first < count; first += HEAD_ROWS) {
            const int64_t some = smaller(HEAD_ROWS, count - first);
            const Product head[] = {{&g.head, to + first * g.vocabulary}};
            for (int64_t i = 0; i < some; ++i) {
                const int64_t t = rows[first + i];
                std::memcpy(last + i * g.width, x + t * g.width, sizeof(float) * static_cast<size_t>(g.width));
                add_row(last + i * g.width, branch + t * g.width, g.width);
                quantise_inputs(head, 1, last, g.final_norm, g.eps, i);
            }
            multiply(head, 1, some);
        }
    }
};

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT trilobit_session *trilobit_session_new(const trilobit_graph *graph, int64_t slots, int64_t capacity, int32_t cache,
                                              int64_t most_tokens, int32_t *status) {
    const bool sizes = slots >= 1 && slots < 1 << 16 && capacity >= 1 && capacity < 1 << 24 && most_tokens >= 1 &&
                       most_tokens < 1 << 16 && (cache == TRILOBIT_CACHE_BF16 || cache == TRILOBIT_CACHE_INT8);
    if (!sizes || !right_graph(*graph)) return *status = TRILOBIT_BAD_SHAPE, nullptr;
    void *place = std::malloc(sizeof(trilobit_session));
    if (!place) return *status = TRILOBIT_NO_MEMORY, nullptr;
    trilobit_session *s = new (place) trilobit_session;
    s->graph = *graph;
    s->slots = slots;
    s->most_tokens = most_tokens;
    s->capacity = capacity;
    s->shape = {divide_up(capacity, TILE), graph->layers, graph->head_size, padded_head(*graph),
                graph->kv_heads, cache == TRILOBIT_CACHE_INT8 ? 1 : 2};
    Arena arena;
    s->lay_out(arena, *graph, capacity, most_tokens);
    s->memory_bytes = arena.used;
    const double tiles = static_cast<double>(slots) * static_cast<double>(s->shape.tiles);
    const double blocks = tiles * static_cast<double>(s->shape.layers) * static_cast<double>(s->shape.kv_heads);
    if (blocks * static_cast<double>(s->shape.block_bytes()) + static_cast<double>(arena.used) > machine_memory()) {
        trilobit_session_free(s);
        return *status = TRILOBIT_NO_MEMORY, nullptr;
    }
    s->cache_bytes = slots * s->shape.slot_bytes();
    s->cache = map_memory(s->cache_bytes);
    s->memory = arena.base = map_memory(s->memory_bytes);
    if (!s->cache || !s->memory) {
        trilobit_session_free(s);
        return *status = TRILOBIT_NO_MEMORY, nullptr;
    }
    ask_for_huge_pages(s->cache, s->cache_bytes);
    ask_for_huge_pages(s->memory, s->memory_bytes);
    arena.used = 0;
    s->lay_out(arena, *graph, capacity, most_tokens);
    const int64_t half = graph->head_size / 2;
    for (int64_t p = 0; p < capacity; ++p)
        for (int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(p) * graph->frequencies[i];  // rounded as in transformers
            s->cosine[p * half + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * graph->rotary_scale;
            s->sine[p * half + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * graph->rotary_scale;
        }
    *status = TRILOBIT_OK;
    return s;
}

EXPORT void trilobit_session_free(trilobit_session *session) {
    if (!session) return;
    if (session->cache) unmap_memory(session->cache, session->cache_bytes);
    if (session->memory) unmap_memory(session->memory, session->memory_bytes);
    std::free(session);
}

EXPORT int64_t trilobit_session_bytes(const trilobit_session *session) { return session->cache_bytes + session->memory_bytes; }

EXPORT int32_t trilobit_forward(trilobit_session *session, int64_t tokens, const int32_t *ids, const int32_t *slots,
                                const int32_t *positions, int64_t count, const int32_t *rows, float *logits, int32_t set,
                                int32_t threads) {
    trilobit_session &s = *session;
    const trilobit_graph &g = s.graph;
    s.kernels = kernels_of(set);
    s.floats = floats_of(set);
    s.threads = threads;
    if (!s.kernels) return TRILOBIT_BAD_SET;
    bool right = tokens >= 1 && tokens <= s.most_tokens && count >= 0 && count <= tokens;
    for (int64_t t = 0; right && t < tokens; ++t)
        right = ids[t] >= 0 && ids[t] < g.vocabulary && slots[t] >= 0 && slots[t] < s.slots && positions[t] >= 0 &&
                positions[t] < s.capacity;
    for (int64_t i = 0; right && i < count; ++i) right = rows[i] >= 0 && rows[i] < tokens;
    if (!right) return TRILOBIT_BAD_SHAPE;
    const int block_count = s.split_into_blocks(slots, tokens);
    for (int64_t t = 0; t < tokens; ++t) s.embed(ids[t], s.x + t * g.width);
    const int64_t spans = s.spans_to_share(tokens, positions, block_count);
    for (int64_t l = 0; l < g.layers; ++l) s.run_layer(l, tokens, slots, positions, block_count, spans);
    s.run_head(count, rows, logits);
    return TRILOBIT_OK;
}
