// Attention over the cache, in the compiler's own vectors: floats.cpp compiles it for several processors.
//
// Attention is computed for a block of rows of one sequence and the query heads that share a key head, tile by tile of
// positions with a running maximum (Milakov & Gimelshein, 2018; Dao et al., arXiv 2205.14135), so that keys and values are
// widened once for all of them. Threads can share the positions of one token, a span each (Flash-Decoding, Dao et al., 2023).
// Scores and the weighted sum of values are the same product, C[m] += Σ_k A[m, k] · B[k], B in two vectors: scores with A = q
// and B = keys (a lane is a position), sums with A = softmax and B = values.
#pragma once

#include "floats.h"
#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

static_assert(LANE_COUNT == LANES);
constexpr int64_t MOST_QUERIES = 64;
#if defined(__AVX512F__)
constexpr int MICRO_QUERIES = 8;  // 16 accumulators of 32 registers
#else
constexpr int MICRO_QUERIES = 3;
#endif

template <class T>
inline Floats widen(const T *from) {
#if defined(__AVX512F__)  // one instruction each; gcc takes a vector apart and puts it together again
    if constexpr (sizeof(T) == 2) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    } else {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
#else
    if constexpr (sizeof(T) == 2) {
        return (Floats)(__builtin_convertvector(load_lanes<Halves>(from, LANES), Words) << 16);
    } else {
        return __builtin_convertvector(__builtin_convertvector(load_lanes<Bytes>(from, LANES), Ints), Floats);
    }
#endif
}

inline Floats load(const float *from) { return load_lanes<Floats>(from, LANES); }
inline void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline Floats broadcast(float value) { return Floats{} + value; }

inline float largest_lane(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
    return lanes[0];
}

// e^x = 2^n · e^r, |r| ≤ ln 2 / 2, by a polynomial of degree 6 (Cephes' expf): 2 ulp between −87 and 88, where it is clamped.
// NaN stays NaN.
inline Floats exponential(Floats x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    x = x > 88.0f ? broadcast(88.0f) : x;
    const Floats shifted = x * 1.44269504f + 12582912.0f;
    const Floats n = shifted - 12582912.0f;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    const Ints power = ((Ints)shifted << 23) + (127 << 23);  // the low bits of `shifted` are n
    return p * (Floats)power;
}

inline void prefetch(const uint8_t *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// c[m][0 … 31] += Σ_k a[m][k] · (b0[k], b1[k]), or = where fresh.
template <class T>
struct Outer {
    const float *a;
    int64_t a_stride;
    const T *b0, *b1;
    int64_t b_stride, n;
    float *c;
    int64_t c_stride;
    bool fresh;

    template <int M>
    void micro(int64_t first) const {
        const float *rows = a + first * a_stride;
        float *to = c + first * c_stride;
        Floats s0[M], s1[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            s0[m] = fresh ? Floats{} : load(to + m * c_stride);
            s1[m] = fresh ? Floats{} : load(to + m * c_stride + LANES);
        }
        for (int64_t k = 0; k < n; ++k) {
            const Floats v0 = widen(b0 + k * b_stride), v1 = widen(b1 + k * b_stride);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const float x = rows[m * a_stride + k];
                s0[m] += x * v0;
                s1[m] += x * v1;
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            store(to + m * c_stride, s0[m]);
            store(to + m * c_stride + LANES, s1[m]);
        }
    }

    void run(int64_t count) const {
        int64_t m = 0;
        for (; m + MICRO_QUERIES <= count; m += MICRO_QUERIES) micro<MICRO_QUERIES>(m);
        switch (count - m) {
            case 7: return micro<7>(m);
            case 6: return micro<6>(m);
            case 5: return micro<5>(m);
            case 4: return micro<4>(m);
            case 3: return micro<3>(m);
            case 2: return micro<2>(m);
            case 1: return micro<1>(m);
            default: return;
        }
    }
};

// Up to MOST_QUERIES queries of one slot and key head. Query m: row `row` + (begin + m) / group, query head
// (begin + m) % group of the key head.
struct Queries {
    alignas(64) float q[MOST_QUERIES * MOST_HEAD_SIZE];
    int32_t from[MOST_QUERIES], to[MOST_QUERIES];  // positions seen
    int64_t row, head, group, begin, count;
    int64_t first_seen = INT64_MAX, end_seen = 0;

    Queries(const AttendCall &c, int64_t row_, int64_t head_, int64_t begin_, int64_t count_)
        : row(row_), head(head_), group(c.heads / c.shape.kv_heads), begin(begin_), count(count_) {
        const CacheShape &s = c.shape;
        for (int64_t m = 0; m < count; ++m) {
            const float *x = c.q + place(c, m) * s.head_size;
            float *scaled = q + m * s.padded_head;
            for (int64_t d = 0; d < s.head_size; ++d) scaled[d] = x[d] * c.scale;
            for (int64_t d = s.head_size; d < s.padded_head; ++d) scaled[d] = 0;
            to[m] = c.positions[row_of(m)];
            from[m] = first_position(c, to[m]);
            first_seen = smaller(first_seen, from[m]);
            end_seen = larger(end_seen, to[m] + 1);
        }
    }

    static int32_t first_position(const AttendCall &c, int32_t position) {
        return c.window > 0 ? static_cast<int32_t>(larger(0, position - c.window + 1)) : 0;
    }
    int64_t row_of(int64_t m) const { return row + (begin + m) / group; }
    int64_t place(const AttendCall &c, int64_t m) const { return row_of(m) * c.heads + head * group + (begin + m) % group; }
};

// What the positions of a span give each of some queries; out: [count, padded head size].
struct Part {
    alignas(64) float out[MOST_QUERIES * MOST_HEAD_SIZE];
    float largest[MOST_QUERIES], total[MOST_QUERIES];
};

// ask_until: where the next tile that this thread will read may lie, as far as to be asked for.
template <class T>
void attend_span(const AttendCall &c, const Queries &of, int64_t span, int64_t ask_until, Part &part) {
    alignas(64) float scores[MOST_QUERIES * TILE];
    float *out = part.out, *largest = part.largest, *total = part.total;
    const CacheShape &s = c.shape;
    const int64_t width = s.padded_head, count = of.count;
    const int64_t begin = larger(of.first_seen, span * SPAN) / TILE * TILE, end = smaller(of.end_seen, (span + 1) * SPAN);
    for (int64_t m = 0; m < count; ++m) {
        largest[m] = -__builtin_inff();
        total[m] = 0;
    }
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(count * width));

    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t seen = smaller(TILE, end - start);
        const uint8_t *block = c.cache + s.block_at(c.slots[of.row], start / TILE, c.layer, of.head);
        if (start == begin) prefetch(block, s.block_bytes());
        if (start + TILE < ask_until) prefetch(block + s.tile_bytes(), s.block_bytes());
        const T *keys = reinterpret_cast<const T *>(block), *values = reinterpret_cast<const T *>(block + s.half_bytes());
        const float *key_scales = reinterpret_cast<const float *>(block + 2 * s.half_bytes());
        for (int64_t p = 0; p < seen; p += 2 * LANES) {
            const T *pair = keys + p * width;
            Outer<T>{of.q, width, pair, pair + LANES * width, LANES, width, scores + p, TILE, true}.run(count);
        }
        const int64_t vectors = divide_up(seen, 2 * LANES) * 2;
        for (int64_t m = 0; m < count; ++m) {
            float *row_scores = scores + m * TILE;
            Floats high = broadcast(-__builtin_inff());
            for (int64_t v = 0; v < vectors; ++v) {
                Floats score = load(row_scores + v * LANES);
                if constexpr (sizeof(T) == 1) score *= load(key_scales + v * LANES);
                const Ints position = lane + static_cast<int32_t>(start + v * LANES);
                score = (position < of.from[m]) | (position > of.to[m]) ? broadcast(-__builtin_inff()) : score;
                store(row_scores + v * LANES, score);
                high = score > high ? score : high;
            }
            const float tile_largest = largest_lane(high);
            if (tile_largest > largest[m]) {
                if (total[m] != 0) {
                    const float shrink = exponential(broadcast(largest[m] - tile_largest))[0];
                    total[m] *= shrink;
                    for (int64_t d = 0; d < width; d += LANES) store(out + m * width + d, load(out + m * width + d) * shrink);
                }
                largest[m] = tile_largest;
            }
            // Nothing seen yet: 0 · −∞ would be NaN. (NaN scores are never the largest, but reach the sum.)
            const float shift = largest[m] == -__builtin_inff() ? 0 : largest[m];
            Floats sum = {};
            for (int64_t v = 0; v < vectors; ++v) {
                const Floats score = load(row_scores + v * LANES);
                Floats weight = exponential(score - shift);
                weight = score == -__builtin_inff() ? Floats{} : weight;
                sum += weight;
                if constexpr (sizeof(T) == 1) weight *= load(key_scales + TILE + v * LANES);
                store(row_scores + v * LANES, weight);
            }
            total[m] += sum_lanes(sum);
        }
        for (int64_t d = 0; d < width; d += 2 * LANES)
            Outer<T>{scores, TILE, values + d, values + d + LANES, width, seen, out + d, width, false}.run(count);
    }
}

// What some positions gave a query += what those after them did. Not inlined, so that it is rounded in one way everywhere.
__attribute__((noinline)) void add_part(float &largest, float &total, float *out, float next_largest, float next_total,
                                        const float *next, int64_t width) {
    if (next_total == 0) return;  // nothing seen
    if (total == 0) {
        largest = next_largest;
        total = next_total;
        std::memcpy(out, next, sizeof(float) * static_cast<size_t>(width));
    } else if (next_largest > largest) {
        const float shrink = exponential(broadcast(largest - next_largest))[0];
        largest = next_largest;
        total = total * shrink + next_total;
        for (int64_t d = 0; d < width; d += LANES) store(out + d, load(out + d) * shrink + load(next + d));
    } else {
        const float shrink = exponential(broadcast(next_largest - largest))[0];
        total += next_total * shrink;
        for (int64_t d = 0; d < width; d += LANES) store(out + d, load(out + d) + load(next + d) * shrink);
    }
}

void finish(const AttendCall &c, int64_t place, const float *out, float total) {
    float *y = c.out + place * c.shape.head_size;
    for (int64_t d = 0; d < c.shape.head_size; ++d) y[d] = out[d] / total;
}

template <class T>
void attend_queries(const AttendCall &c, const Queries &of) {
    Part all, next;
    const int64_t width = c.shape.padded_head, first = of.first_seen / SPAN;
    attend_span<T>(c, of, first, of.end_seen, all);
    for (int64_t span = first + 1; span * SPAN < of.end_seen; ++span) {
        attend_span<T>(c, of, span, of.end_seen, next);
        for (int64_t m = 0; m < of.count; ++m)
            add_part(all.largest[m], all.total[m], all.out + m * width, next.largest[m], next.total[m], next.out + m * width,
                     width);
    }
    for (int64_t m = 0; m < of.count; ++m) finish(c, of.place(c, m), all.out + m * width, all.total[m]);
}

// visit(queries) for those of a block of rows and a key head, as many at once as there is room for.
template <class Visit>
void for_queries(const AttendCall &c, int64_t item, Visit visit) {
    const int64_t block = item / c.shape.kv_heads, head = item % c.shape.kv_heads, row = c.blocks[block];
    const int64_t queries = (c.blocks[block + 1] - row) * (c.heads / c.shape.kv_heads);
    for (int64_t done = 0; done < queries; done += MOST_QUERIES)
        visit(Queries(c, row, head, done, smaller(MOST_QUERIES, queries - done)));
}

void attend(const void *call, int64_t begin, int64_t end) {
    const AttendCall &c = *static_cast<const AttendCall *>(call);
    for (int64_t item = begin; item < end; ++item)
        for_queries(c, item, [&](const Queries &of) {
            if (c.shape.element_bytes == 1) attend_queries<int8_t>(c, of);
            else attend_queries<uint16_t>(c, of);
        });
}

void attend_spans(const void *call, int64_t begin, int64_t end) {
    const AttendCall &c = *static_cast<const AttendCall *>(call);
    const int64_t width = c.shape.padded_head;
    for (int64_t item = begin; item < end; ++item)
        for_queries(c, item / c.spans, [&](const Queries &of) {
            const int64_t span = item % c.spans, stop = smaller(of.end_seen, (span + 1) * SPAN);
            if (stop <= span * SPAN || (span + 1) * SPAN <= of.first_seen) return;
            Part part;
            if (c.shape.element_bytes == 1) attend_span<int8_t>(c, of, span, stop, part);
            else attend_span<uint16_t>(c, of, span, stop, part);
            for (int64_t m = 0; m < of.count; ++m) {
                float *to = c.parts + (of.place(c, m) * c.spans + span) * part_floats(width);
                std::memcpy(to, part.out + m * width, sizeof(float) * static_cast<size_t>(width));
                to[width] = part.largest[m];
                to[width + 1] = part.total[m];
            }
        });
}

void combine(const void *call, int64_t begin, int64_t end) {
    const AttendCall &c = *static_cast<const AttendCall *>(call);
    const int64_t width = c.shape.padded_head;
    for (int64_t r = begin; r < end; ++r) {
        const int64_t first = Queries::first_position(c, c.positions[r]) / SPAN, last = c.positions[r] / SPAN;
        for (int64_t place = r * c.heads; place < (r + 1) * c.heads; ++place) {
            alignas(64) float out[MOST_HEAD_SIZE];
            float largest = 0, total = 0;
            for (int64_t span = first; span <= last; ++span) {
                const float *part = c.parts + (place * c.spans + span) * part_floats(width);
                add_part(largest, total, out, part[width], part[width + 1], part, width);
            }
            finish(c, place, out, total);
        }
    }
}

}  // namespace
