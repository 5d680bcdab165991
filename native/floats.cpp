// Attention over the cache, the gate of an MLP, and RMSNorm, in the compiler's own vectors: compiled for several processors.
//
// Attention is computed for a block of rows of one sequence and the query heads that share a key head, tile by tile of
// positions with a running maximum (Milakov & Gimelshein, 2018; Dao et al., arXiv 2205.14135), so that keys and values are
// widened once for all of them. Scores and the weighted sum of values are the same product, C[m] += Σ_k A[m, k] · B[k], B in
// two vectors: scores with A = q and B = keys (a lane is a position), sums with A = softmax and B = values.
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

// Up to MOST_QUERIES queries of one slot and key head. Query m: row first + m / group, query head m % group of the key head.
template <class T>
void attend_queries(const AttendCall &c, int64_t row, int64_t head, int64_t begin, int64_t count) {
    alignas(64) float q[MOST_QUERIES * MOST_HEAD_SIZE], out[MOST_QUERIES * MOST_HEAD_SIZE], scores[MOST_QUERIES * TILE];
    float largest[MOST_QUERIES], total[MOST_QUERIES];
    int32_t from[MOST_QUERIES], to[MOST_QUERIES];  // positions seen
    const CacheShape &s = c.shape;
    const int64_t group = c.heads / s.kv_heads, width = s.padded_head;

    int64_t first_seen = INT64_MAX, end_seen = 0;
    for (int64_t m = 0; m < count; ++m) {
        const int64_t r = row + (begin + m) / group, h = head * group + (begin + m) % group;
        const float *x = c.q + (r * c.heads + h) * s.head_size;
        for (int64_t d = 0; d < s.head_size; ++d) q[m * width + d] = x[d] * c.scale;
        for (int64_t d = s.head_size; d < width; ++d) q[m * width + d] = 0;
        to[m] = c.positions[r];
        from[m] = c.window > 0 ? static_cast<int32_t>(larger(0, to[m] - c.window + 1)) : 0;
        first_seen = smaller(first_seen, from[m]);
        end_seen = larger(end_seen, to[m] + 1);
        largest[m] = -__builtin_inff();
        total[m] = 0;
    }
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(count * width));

    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t start = first_seen / TILE * TILE; start < end_seen; start += TILE) {
        const int64_t seen = smaller(TILE, end_seen - start);
        const uint8_t *block = c.cache + s.block_at(c.slots[row], start / TILE, c.layer, head);
        if (start == first_seen / TILE * TILE) prefetch(block, s.block_bytes());
        if (start + TILE < end_seen) prefetch(block + s.tile_bytes(), s.block_bytes());
        const T *keys = reinterpret_cast<const T *>(block), *values = reinterpret_cast<const T *>(block + s.half_bytes());
        const float *key_scales = reinterpret_cast<const float *>(block + 2 * s.half_bytes());
        for (int64_t p = 0; p < seen; p += 2 * LANES) {
            const T *pair = keys + p * width;
            Outer<T>{q, width, pair, pair + LANES * width, LANES, width, scores + p, TILE, true}.run(count);
        }
        const int64_t vectors = divide_up(seen, 2 * LANES) * 2;
        for (int64_t m = 0; m < count; ++m) {
            float *row_scores = scores + m * TILE;
            Floats high = broadcast(-__builtin_inff());
            for (int64_t v = 0; v < vectors; ++v) {
                Floats score = load(row_scores + v * LANES);
                if constexpr (sizeof(T) == 1) score *= load(key_scales + v * LANES);
                const Ints position = lane + static_cast<int32_t>(start + v * LANES);
                score = (position < from[m]) | (position > to[m]) ? broadcast(-__builtin_inff()) : score;
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
    for (int64_t m = 0; m < count; ++m) {
        const int64_t r = row + (begin + m) / group, h = head * group + (begin + m) % group;
        float *y = c.out + (r * c.heads + h) * s.head_size;
        for (int64_t d = 0; d < s.head_size; ++d) y[d] = out[m * width + d] / total[m];
    }
}

void attend(const void *call, int64_t begin, int64_t end) {
    const AttendCall &c = *static_cast<const AttendCall *>(call);
    const int64_t group = c.heads / c.shape.kv_heads;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item / c.shape.kv_heads, head = item % c.shape.kv_heads, row = c.blocks[block];
        const int64_t queries = (c.blocks[block + 1] - row) * group;
        for (int64_t done = 0; done < queries; done += MOST_QUERIES) {
            const int64_t count = smaller(MOST_QUERIES, queries - done);
            if (c.shape.element_bytes == 1) attend_queries<int8_t>(c, row, head, done, count);
            else attend_queries<uint16_t>(c, row, head, done, count);
        }
    }
}

// visit(first column, columns): whole vectors, whose length is then a constant, and what is left.
template <class Visit>
inline void by_vector(int64_t begin, int64_t end, Visit visit) {
    int64_t k = begin;
    for (; k + LANES <= end; k += LANES) visit(k, LANES);
    if (k < end) visit(k, end - k);
}

void gate(const void *call, int64_t begin, int64_t end) {
    const GateCall &c = *static_cast<const GateCall *>(call);
    for (int64_t t = begin; t < end; ++t) {
        float *row = c.gate + t * c.columns;
        const float *up = c.up + t * c.columns;
        by_vector(c.begin, c.end, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            const Floats x = load_lanes<Floats>(row + k, n), positive = x < 0.0f ? Floats{} : x;
            const Floats f = c.squared_relu ? positive * positive : x / (1.0f + exponential(-x));
            const Floats y = f * load_lanes<Floats>(up + k, n);
            std::memcpy(row + k, &y, static_cast<size_t>(n) * sizeof(float));
        });
    }
}

void normalize(const void *call, int64_t begin, int64_t end) {
    const NormalizeCall &c = *static_cast<const NormalizeCall *>(call);
    for (int64_t t = begin; t < end; ++t) {
        const float *x = c.x + t * c.columns;
        float *to = c.y + t * c.columns;
        const float inverse = inverse_rms<false>(x, 0, c.columns, c.eps);
        by_vector(0, c.columns, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            const Floats gains = c.gain_count == 1 ? broadcast(c.gain[0]) : load_lanes<Floats>(c.gain + k, n);
            const Floats y = (load_lanes<Floats>(x + k, n) * inverse) * gains;
            std::memcpy(to + k, &y, static_cast<size_t>(n) * sizeof(float));
        });
    }
}

void read(const void *call, int64_t begin, int64_t end) {
    const ReadCall &c = *static_cast<const ReadCall *>(call);
    Ints sums[4] = {};
    const uint8_t *from = c.from + begin * READ_CHUNK, *stop = c.from + smaller(end * READ_CHUNK, c.bytes);
    for (; from + 4 * 64 <= stop; from += 4 * 64)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(from) + 8192 + 64 * i));
            sums[i] += load_lanes<Ints>(reinterpret_cast<const int32_t *>(from) + i * LANES, LANES);
        }
    const Ints all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    asm volatile("" ::"m"(all));  // so that the sums are wanted
}

}  // namespace

#if defined(__AVX512F__)
const FloatKernels FLOATS_AVX512 = {attend, gate, normalize, read};
#elif defined(__AVX2__)
const FloatKernels FLOATS_AVX2 = {attend, gate, normalize, read};
#else
const FloatKernels FLOATS_BASE = {attend, gate, normalize, read};
#endif
