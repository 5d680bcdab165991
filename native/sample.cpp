// Choosing a token from its logits. Only what can be chosen is sorted: first the tokens within reach of the largest logit,
// then, for top-k, so many of them, and for top-p as many as it takes.
#include "engine.h"

#include "memory.h"

#include <algorithm>
#include <cmath>

namespace {

struct Candidate {
    float logit;
    int32_t token;
    double weight;
};

bool likelier(const Candidate &a, const Candidate &b) { return a.logit != b.logit ? a.logit > b.logit : a.token < b.token; }

// Steele, Lea & Flood's SplitMix64 (2014), as a number in [0, 1).
double uniform(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
}

// Sort the likeliest of n candidates to the front until their weights reach `enough`; returns how many that takes.
int64_t most_likely(Candidate *all, int64_t n, double enough) {
    double sum = 0;
    for (int64_t sorted = 0, step = 64; sorted < n; step *= 4) {
        const int64_t end = std::min(n, sorted + step);
        std::nth_element(all + sorted, all + end - 1, all + n, likelier);
        std::sort(all + sorted, all + end, likelier);
        for (; sorted < end; ++sorted) {
            sum += all[sorted].weight;
            if (sum >= enough) return sorted + 1;
        }
    }
    return n;
}

double weigh(Candidate *all, int64_t n, float largest, float temperature) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += all[i].weight = std::exp(static_cast<double>(all[i].logit - largest) / temperature);
    return total;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t trilobit_sample(const float *logits, int64_t vocabulary,
                                                                         const trilobit_sampling *sampling,
                                                                         const int32_t *history, int64_t count,
                                                                         uint64_t *state) {
    const Array<float> own(vocabulary);
    const Array<Candidate> candidates(vocabulary);
    float *scores = own.items;
    Candidate *all = candidates.items;
    if (!scores || !all) return TRILOBIT_NO_MEMORY;
    float largest = -INFINITY;
    for (int64_t v = 0; v < vocabulary; ++v)
        if (!(logits[v] < INFINITY)) return TRILOBIT_BAD_SCALE;
    std::copy(logits, logits + vocabulary, scores);
    if (sampling->repetition_penalty != 1)
        for (int64_t i = 0; i < count; ++i) {
            if (history[i] < 0 || history[i] >= vocabulary) return TRILOBIT_BAD_SHAPE;
            const float logit = logits[history[i]];  // a token that comes twice is penalised once
            scores[history[i]] = logit > 0 ? logit / sampling->repetition_penalty : logit * sampling->repetition_penalty;
        }
    int32_t best = 0;
    for (int64_t v = 0; v < vocabulary; ++v)
        if (scores[v] > largest) largest = scores[best = static_cast<int32_t>(v)];
    if (sampling->temperature <= 0 || largest == -INFINITY) return best;

    // What is less likely than e⁻⁴⁰ of the likeliest token has no weight that a double sum of all would notice.
    int64_t n = 0;
    for (int64_t v = 0; v < vocabulary; ++v)
        if (scores[v] > largest - 40 * sampling->temperature) all[n++] = {scores[v], static_cast<int32_t>(v), 0};
    if (sampling->top_k > 0 && sampling->top_k < n) {
        std::nth_element(all, all + sampling->top_k - 1, all + n, likelier);
        n = sampling->top_k;
    }
    double total = weigh(all, n, largest, sampling->temperature);
    if (sampling->top_p < 1) n = most_likely(all, n, sampling->top_p * total);
    if (sampling->min_p > 0)
        n = std::partition(all, all + n, [&](const Candidate &c) { return c.weight >= sampling->min_p; }) - all;
    total = 0;
    for (int64_t i = 0; i < n; ++i) total += all[i].weight;
    double left = uniform(state) * total;
    for (int64_t i = 0; i < n; ++i)
        if ((left -= all[i].weight) < 0) return all[i].token;
    return best;
}
