// Random small decoders through the C ABI: every instruction set, one thread and three, prompts whole and in pieces, sampling,
// refusals. sanitize.sh runs it under ASan, UBSan and TSan; what the caller owns is allocated to the byte, and in an ASan build
// the session's own arrays have red zones. What the numbers should be is tests/kernels/test_engine.py's. Arguments: seconds,
// seed.
#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

namespace {

std::mt19937_64 random_bits;

int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(high - low + 1));
}

bool flip() { return between(0, 1) == 1; }
float number(float low, float high) { return low + (high - low) * static_cast<float>(between(0, 1 << 20)) / (1 << 20); }

// A decoder and everything that it points to; deques do not move what they hold.
struct Model {
    trilobit_graph graph{};
    std::deque<std::vector<float>> floats;
    std::deque<std::vector<uint8_t>> bytes;
    std::vector<trilobit_layer> layers;
    std::vector<uint16_t> embedding, halves;

    const float *values(int64_t count, float low, float high) {
        std::vector<float> &v = floats.emplace_back(static_cast<size_t>(count));
        for (float &x : v) x = number(low, high);
        return v.data();
    }

    trilobit_projection projection(int64_t rows, int64_t columns, int32_t format, int64_t group, int32_t activations) {
        std::vector<int8_t> codes(static_cast<size_t>(rows * columns));
        const int64_t most = format == TRILOBIT_INT8 ? 127 : 1;
        for (int8_t &code : codes) code = static_cast<int8_t>(between(-most, most));
        const int64_t size = trilobit_packed_bytes(format, rows, columns, group);
        std::vector<uint8_t> &packed = bytes.emplace_back(static_cast<size_t>(size));
        trilobit_pack(format, rows, columns, group, codes.data(), packed.data());
        trilobit_projection p{};
        p.matrix = {packed.data(), rows, columns, group, format};
        p.scale_count = group > 0 ? (columns + group - 1) / group * rows : flip() ? 1 : rows;
        const float unit = 1 / (static_cast<float>(most) * std::sqrt(static_cast<float>(columns)));
        p.scales = values(p.scale_count, unit, 2 * unit);
        if (flip()) p.bias = values(rows, -0.3f, 0.3f);
        p.gain_count = between(0, 2) ? 0 : flip() ? 1 : columns;
        if (p.gain_count) p.gain = values(p.gain_count, 0.5f, 1.5f);
        p.eps = 1e-6f;
        p.activations = activations;
        return p;
    }

    explicit Model(bool small = false) {
        trilobit_graph &g = graph;
        g.kv_heads = between(1, 3);
        g.heads = g.kv_heads * (small || between(0, 9) ? between(1, 4) : between(60, 70));
        g.head_size = 2 * (small || between(0, 9) || g.heads > 12 ? between(1, 12) : between(100, 128));
        g.width = between(1, 70);
        g.hidden = between(1, 90);
        g.vocabulary = between(1, 70);
        g.layers = small ? 1 : between(1, 2);
        g.eps = 1e-5f;
        g.attention_scale = 1 / std::sqrt(static_cast<float>(g.head_size));
        g.rotary_scale = 1;
        g.frequencies = values(g.head_size / 2, 0.0001f, 1);
        g.gate = flip() ? TRILOBIT_SILU : TRILOBIT_SQUARED_RELU;
        g.final_norm = values(g.width, 0.5f, 1.5f);
        const int64_t groups[] = {0, 0, 16, 64};
        const int64_t group = groups[between(0, 3)], queries = g.heads * g.head_size, keys = g.kv_heads * g.head_size;
        const int32_t format = flip() ? TRILOBIT_TWO_BIT : TRILOBIT_BASE3;
        const int32_t activations = group && flip() ? TRILOBIT_PER_GROUP : TRILOBIT_PER_TOKEN;
        auto ternary = [&](int64_t rows, int64_t columns) { return projection(rows, columns, format, group, activations); };
        for (int64_t l = 0; l < g.layers; ++l) {
            trilobit_layer layer{};
            layer.attention_norm = values(g.width, 0.5f, 1.5f);
            layer.mlp_norm = values(g.width, 0.5f, 1.5f);
            if (flip()) layer.q_norm = values(g.head_size, 0.5f, 1.5f);
            if (flip()) layer.k_norm = values(g.head_size, 0.5f, 1.5f);
            layer.q = ternary(queries, g.width);
            layer.k = ternary(keys, g.width);
            layer.v = ternary(keys, g.width);
            layer.o = ternary(g.width, queries);
            layer.gate = ternary(g.hidden, g.width);
            layer.up = ternary(g.hidden, g.width);
            layer.down = ternary(g.width, g.hidden);
            layer.window = flip() ? 0 : between(1, small ? 700 : 80);
            layer.rotary = flip();
            layers.push_back(layer);
        }
        g.layer = layers.data();
        if (flip()) {
            for (int64_t i = 0; i < g.vocabulary * g.width; ++i) {
                const float x = number(-1, 1);
                uint32_t bits;
                std::memcpy(&bits, &x, sizeof bits);
                embedding.push_back(static_cast<uint16_t>(bits >> 16));
            }
            g.embedding = embedding.data();
        } else {
            g.embedding_matrix = ternary(g.vocabulary, g.width);
        }
        const int64_t head_group = flip() ? 0 : 64;
        g.head = flip() ? ternary(g.vocabulary, g.width)
                        : projection(g.vocabulary, g.width, TRILOBIT_INT8, head_group, TRILOBIT_INT16);
        if (g.head.matrix.group && flip()) {
            for (int64_t i = 0; i < g.head.scale_count; ++i) halves.push_back(static_cast<uint16_t>(between(0x1c00, 0x2400)));
            g.head.scales = halves.data();  // 0.004 to 0.016
            g.head.half_scales = 1;
        }
    }
};

void require(bool right, const char *what, const Model &m, const char *set) {
    if (right) return;
    const trilobit_graph &g = m.graph;
    auto n = [](int64_t v) { return static_cast<long long>(v); };
    std::fprintf(stderr, "%s wrong: set %s, width %lld, hidden %lld, heads %lld / %lld × %lld, vocabulary %lld, group %lld\n",
                 what, set, n(g.width), n(g.hidden), n(g.heads), n(g.kv_heads), n(g.head_size), n(g.vocabulary),
                 n(g.layer[0].q.matrix.group));
    std::exit(1);
}

// A text for each slot, and how it is cut into calls.
struct Work {
    int64_t slots, capacity, most, each;
    int32_t cache = flip() ? TRILOBIT_CACHE_BF16 : TRILOBIT_CACHE_INT8;
    std::vector<int32_t> ids;  // [slots, capacity]

    Work(const Model &m, int64_t slots_, int64_t capacity_)
        : slots(slots_), capacity(capacity_), most(between(1, capacity)), each(between(1, most)) {
        for (int64_t i = 0; i < slots * capacity; ++i) ids.push_back(static_cast<int32_t>(between(0, m.graph.vocabulary - 1)));
    }

    // Logits [slots, capacity, V], `step` tokens of a slot at a time, several slots in a call where they fit.
    std::vector<float> run(const Model &m, int64_t step, int32_t set, int32_t threads, const char *name) const {
        int32_t status = 1;
        trilobit_session *session = trilobit_session_new(&m.graph, slots, capacity, cache, most, &status);
        require(session && status == TRILOBIT_OK && trilobit_session_bytes(session) > 0, "session", m, name);
        const int64_t v = m.graph.vocabulary;
        std::vector<float> all(static_cast<size_t>(slots * capacity * v), NAN);
        for (int64_t start = 0; start < capacity; start += step)
            for (int64_t first = 0; first < slots;) {
                const int64_t tokens = std::min(step, capacity - start);
                const int64_t together = std::max<int64_t>(1, std::min(slots - first, most / tokens));
                std::vector<int32_t> tokens_ids, slot, position, rows;
                for (int64_t s = first; s < first + together; ++s)
                    for (int64_t p = start; p < start + tokens; ++p) {
                        rows.push_back(static_cast<int32_t>(rows.size()));
                        tokens_ids.push_back(ids[static_cast<size_t>(s * capacity + p)]);
                        slot.push_back(static_cast<int32_t>(s));
                        position.push_back(static_cast<int32_t>(p));
                    }
                const int64_t count = static_cast<int64_t>(rows.size());
                std::vector<float> logits(static_cast<size_t>(count * v));
                status = trilobit_forward(session, count, tokens_ids.data(), slot.data(), position.data(), count, rows.data(),
                                          logits.data(), set, threads);
                require(status == TRILOBIT_OK, "forward", m, name);
                for (int64_t s = 0; s < together; ++s)
                    std::memcpy(all.data() + ((first + s) * capacity + start) * v, logits.data() + s * tokens * v,
                                static_cast<size_t>(tokens * v) * sizeof(float));
                first += together;
            }
        trilobit_session_free(session);
        return all;
    }
};

double mean_distance(const std::vector<float> &a, const std::vector<float> &b) {
    double distance = 0, size = 1e-9;
    for (size_t i = 0; i < a.size(); ++i) {
        distance += std::fabs(static_cast<double>(a[i]) - b[i]);
        size += std::fabs(static_cast<double>(b[i]));
    }
    return distance / size;
}

struct Distances {
    double sum = 0;
    int count = 0;
};

void check_forward(const Model &m, Distances &distances) {
    const Work work(m, between(1, 3), between(0, 2) ? between(1, 20) : between(60, 80));
    std::vector<float> first;
    for (int32_t set = 0; set < trilobit_set_count(); ++set) {
        if (!trilobit_set_runs_here(set)) continue;
        const char *name = trilobit_set_name(set);
        const std::vector<float> y = work.run(m, work.most, set, 1, name);
        for (const float logit : y) require(std::isfinite(logit), "finite", m, name);
        auto same = [&](const std::vector<float> &z) { return std::memcmp(y.data(), z.data(), y.size() * sizeof(float)) == 0; };
        require(same(work.run(m, work.most, set, 3, name)), "three threads", m, name);
        require(same(work.run(m, work.each, set, 3, name)), "pieces", m, name);
        if (first.empty()) {
            first = y;
            continue;
        }
        distances.sum += mean_distance(y, first);
        ++distances.count;
    }
}

// A text of several spans of positions, which threads share where a call has few tokens: the same bits however it is cut.
void check_long() {
    const Model m(true);
    const Work work(m, 1, between(513, 1300));
    const std::vector<float> y = work.run(m, work.most, -1, 1, "best");
    for (const int64_t step : {4, 2, 1}) {
        const std::vector<float> z = work.run(m, std::min<int64_t>(step, work.most), -1, 3, "best");
        require(std::memcmp(y.data(), z.data(), y.size() * sizeof(float)) == 0, "long", m, "best");
    }
}

void check_sample(const Model &m) {
    const int64_t v = m.graph.vocabulary;
    std::vector<float> logits(static_cast<size_t>(v));
    for (float &x : logits) x = between(0, 9) ? number(-5, 5) : -INFINITY;
    logits[static_cast<size_t>(between(0, v - 1))] = 1;
    std::vector<int32_t> history(static_cast<size_t>(between(0, 20)));
    for (int32_t &id : history) id = static_cast<int32_t>(between(0, v - 1));
    const trilobit_sampling s = {flip() ? 0 : number(0.01f, 3), between(0, v + 2), number(0.01f, 1), number(0, 1),
                                 flip() ? 1 : number(0.5f, 2)};
    uint64_t state = random_bits(), again = state;
    const int64_t count = static_cast<int64_t>(history.size());
    const int32_t token = trilobit_sample(logits.data(), v, &s, history.data(), count, &state);
    require(token >= 0 && token < v && logits[static_cast<size_t>(token)] != -INFINITY, "sample", m, "none");
    require(trilobit_sample(logits.data(), v, &s, history.data(), count, &again) == token && again == state, "seed", m, "none");
    logits[static_cast<size_t>(between(0, v - 1))] = flip() ? NAN : INFINITY;
    require(trilobit_sample(logits.data(), v, &s, history.data(), count, &state) == TRILOBIT_BAD_SCALE, "NaN", m, "none");
}

void check_refusals(const Model &m) {
    int32_t status = 0;
    auto refused = [&](const trilobit_graph &g, int64_t slots, int64_t capacity, int32_t cache, int64_t most) {
        status = 0;
        trilobit_session *s = trilobit_session_new(&g, slots, capacity, cache, most, &status);
        const bool right = !s && status < 0;
        trilobit_session_free(s);
        return right;
    };
    bool right = refused(m.graph, 0, 9, 0, 1) && refused(m.graph, 1, 0, 0, 1) && refused(m.graph, 1, 9, 2, 1) &&
                 refused(m.graph, 1, 9, 0, 0) && refused(m.graph, 1, int64_t{1} << 40, 0, 1) &&
                 refused(m.graph, 65535, (1 << 24) - 1, 0, 65535);
    trilobit_graph g = m.graph;
    g.heads += 1;
    right = right && refused(g, 1, 9, 0, 1);
    g = m.graph;
    g.head_size += 1;
    right = right && refused(g, 1, 9, 0, 1);
    g = m.graph;
    g.vocabulary += 1;
    right = right && refused(g, 1, 9, 0, 1);
    g = m.graph;
    g.head.scale_count = g.head.scale_count + g.vocabulary + 1;
    right = right && refused(g, 1, 9, 0, 1);
    require(right, "refused sessions", m, "none");

    trilobit_session *s = trilobit_session_new(&m.graph, 2, 9, 0, 3, &status);
    const int32_t v = static_cast<int32_t>(m.graph.vocabulary);
    std::vector<float> logits(static_cast<size_t>(v));
    auto run = [&](int64_t tokens, int32_t id, int32_t slot, int32_t position, int32_t row, int32_t set) {
        std::vector<int32_t> ids(static_cast<size_t>(tokens), id), slots(ids.size(), slot), positions(ids.size(), position);
        return trilobit_forward(s, tokens, ids.data(), slots.data(), positions.data(), 1, &row, logits.data(), set, 1);
    };
    right = run(1, 0, 1, 8, 0, -1) == TRILOBIT_OK && run(0, 0, 0, 0, 0, -1) == TRILOBIT_BAD_SHAPE &&
            run(4, 0, 0, 0, 0, -1) == TRILOBIT_BAD_SHAPE && run(1, v, 0, 0, 0, -1) == TRILOBIT_BAD_SHAPE &&
            run(1, -1, 0, 0, 0, -1) == TRILOBIT_BAD_SHAPE && run(1, 0, 2, 0, 0, -1) == TRILOBIT_BAD_SHAPE &&
            run(1, 0, -1, 0, 0, -1) == TRILOBIT_BAD_SHAPE && run(1, 0, 0, 9, 0, -1) == TRILOBIT_BAD_SHAPE &&
            run(1, 0, 0, -1, 0, -1) == TRILOBIT_BAD_SHAPE && run(1, 0, 0, 0, 1, -1) == TRILOBIT_BAD_SHAPE &&
            run(1, 0, 0, 0, -1, -1) == TRILOBIT_BAD_SHAPE && run(1, 0, 0, 0, 0, 99) == TRILOBIT_BAD_SET;
    trilobit_session_free(s);
    require(right, "refused calls", m, "none");
}

}  // namespace

int main(int argc, char **argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
    random_bits.seed(argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1);
    const auto start = std::chrono::steady_clock::now();
    int models = 0;
    Distances distances;
    for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++models) {
        const Model m;
        check_forward(m, distances);
        check_sample(m);
        check_refusals(m);
    }
    for (int i = 0; i < 2; ++i) check_long();
    const double mean = distances.sum / std::max(1, distances.count);
    if (mean > 0.02) return std::fprintf(stderr, "instruction sets differ by %.4f of the logits\n", mean), 1;
    std::printf("%d random decoders alike to %.1e of the logits, instruction sets:", models, mean);
    for (int32_t set = 0; set < trilobit_set_count(); ++set)
        if (trilobit_set_runs_here(set)) std::printf(" %s", trilobit_set_name(set));
    std::printf("\n");
}
