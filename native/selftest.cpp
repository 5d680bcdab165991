// Random shapes through the C ABI, against loops written out here; sanitize.sh runs it under ASan and UBSan. Every array is
// an allocation of exactly its size, so that a read or write past an end is seen. Arguments: seconds, seed.
#include "trilobit.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

std::mt19937_64 random_bits;

int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(high - low + 1));
}

void require(bool right, const char *what, const char *set, const trilobit_matrix &m, int64_t tokens) {
    if (right) return;
    std::fprintf(stderr, "%s wrong: set %s, format %d, rows %lld, columns %lld, group %lld, tokens %lld\n", what, set, m.format,
                 static_cast<long long>(m.rows), static_cast<long long>(m.columns), static_cast<long long>(m.group),
                 static_cast<long long>(tokens));
    std::exit(1);
}

template <class T>
bool same(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Problem {
    trilobit_matrix matrix{};
    int64_t tokens, groups;
    std::vector<int8_t> codes, x;
    std::vector<uint8_t> packed;
    std::vector<float> scales, x_scale, bias;

    Problem() {
        trilobit_matrix &m = matrix;
        m.format = static_cast<int32_t>(between(0, 2));
        m.rows = between(1, 100);
        m.columns = between(0, 1) ? between(1, 100) : between(1, 1500);
        const int64_t sizes[] = {0, 0, 7, 16, 64, 128, 256};
        m.group = sizes[between(0, 6)];
        tokens = between(0, 9) ? between(1, 20) : between(240, 260);
        groups = m.group ? (m.columns + m.group - 1) / m.group : 0;
        const int low = m.format == TRILOBIT_INT8 ? -128 : -1, high = m.format == TRILOBIT_INT8 ? 127 : 1;
        for (int64_t i = 0; i < m.rows * m.columns; ++i) codes.push_back(static_cast<int8_t>(between(low, high)));
        const bool extreme = between(0, 4) == 0;
        for (int64_t i = 0; i < tokens * m.columns; ++i) x.push_back(static_cast<int8_t>(extreme ? -128 : between(-128, 127)));
        const int64_t count = groups ? groups * m.rows : between(0, 1) ? m.rows : 1;
        for (int64_t i = 0; i < count; ++i) scales.push_back(number());
        for (int64_t t = 0; t < tokens; ++t) x_scale.push_back(number());
        if (between(0, 1))
            for (int64_t o = 0; o < m.rows; ++o) bias.push_back(number() - 1);
        packed.resize(static_cast<size_t>(trilobit_packed_bytes(m.format, m.rows, m.columns, m.group)));
        m.packed = packed.data();
    }

    static float number() { return static_cast<float>(between(1, 1 << 24)) / (1 << 23); }

    int64_t sum(int64_t t, int64_t o, int64_t begin, int64_t end) const {
        int64_t total = 0;
        for (int64_t k = begin; k < end && k < matrix.columns; ++k)
            total += x[t * matrix.columns + k] * codes[o * matrix.columns + k];
        return total;
    }

    float output(int64_t t, int64_t o) const {
        float y = 0;
        if (groups) {
            for (int64_t g = 0; g < groups; ++g) {
                const float part =
                    static_cast<float>(sum(t, o, g * matrix.group, (g + 1) * matrix.group)) * scales[g * matrix.rows + o];
                y = y + part;
            }
            y = y * x_scale[t];
        } else {
            const float scale = x_scale[t] * scales[scales.size() == 1 ? 0 : o];
            y = static_cast<float>(sum(t, o, 0, matrix.columns)) * scale;
        }
        return bias.empty() ? y : y + bias[o];
    }
};

void check_products(const Problem &p) {
    const trilobit_matrix &m = p.matrix;
    std::vector<int32_t> integers;
    std::vector<float> outputs;
    for (int64_t t = 0; t < p.tokens; ++t)
        for (int64_t o = 0; o < m.rows; ++o) {
            integers.push_back(static_cast<int32_t>(p.sum(t, o, 0, m.columns)));
            outputs.push_back(p.output(t, o));
        }
    for (int32_t set = 0; set < trilobit_set_count(); ++set) {
        if (!trilobit_set_runs_here(set)) continue;
        const char *name = trilobit_set_name(set);
        const int32_t threads = static_cast<int32_t>(between(1, 3));
        std::vector<int32_t> y(integers.size());
        int32_t status = trilobit_product(&m, p.x.data(), p.tokens, y.data(), set, threads);
        require(status == 0 && same(y, integers), "product", name, m, p.tokens);
        std::vector<float> z(outputs.size());
        status = trilobit_linear(&m, p.scales.data(), static_cast<int64_t>(p.scales.size()), p.x.data(), p.x_scale.data(),
                                 p.tokens, p.bias.empty() ? nullptr : p.bias.data(), z.data(), set, threads);
        require(status == 0 && same(z, outputs), "linear", name, m, p.tokens);
    }
}

void check_quantize(const Problem &p) {
    const int64_t n = p.matrix.columns, tokens = p.tokens;
    std::vector<float> x;
    std::vector<uint16_t> halves;
    for (int64_t i = 0; i < tokens * n; ++i) {
        const float v = static_cast<float>(p.x[static_cast<size_t>(i)]) * p.x_scale[static_cast<size_t>(i / n)];
        uint32_t bits;
        std::memcpy(&bits, &v, sizeof v);
        x.push_back(v);
        halves.push_back(static_cast<uint16_t>(bits >> 16));
    }
    int64_t damaged = -1;  // a token with a value that is not finite: its scale is not finite either, its codes are anything
    if (between(0, 3) == 0) {
        const float values[] = {NAN, INFINITY, -INFINITY};
        const float bad = values[between(0, 2)];
        uint32_t bits;
        std::memcpy(&bits, &bad, sizeof bad);
        const int64_t at = between(0, tokens * n - 1);
        x[static_cast<size_t>(at)] = bad;
        halves[static_cast<size_t>(at)] = static_cast<uint16_t>(bits >> 16);
        damaged = at / n;
    }
    std::vector<float> gain(static_cast<size_t>(between(0, 1) ? n : 1), 0.75f);
    for (int norm = 0; norm < 2; ++norm)
        for (int bf16 = 0; bf16 < 2; ++bf16) {
            std::vector<int8_t> expected, codes(x.size());
            std::vector<float> expected_scales, scales(static_cast<size_t>(tokens));
            const void *input = bf16 ? static_cast<const void *>(halves.data()) : x.data();
            for (int32_t set = 0; set < trilobit_set_count(); ++set) {
                if (!trilobit_set_runs_here(set)) continue;
                const int32_t status =
                    trilobit_quantize(input, bf16, tokens, n, gain.data(), norm ? static_cast<int64_t>(gain.size()) : 0, 1e-6f,
                                      codes.data(), scales.data(), set, static_cast<int32_t>(between(1, 3)));
                bool right = status == 0;
                if (set == 0) {
                    expected = codes;
                    expected_scales = scales;
                }
                for (int64_t i = 0; i < tokens * n; ++i) {
                    const size_t at = static_cast<size_t>(i);
                    right = right && (i / n == damaged || std::abs(codes[at] - expected[at]) <= norm);
                }
                for (int64_t t = 0; t < tokens; ++t) {
                    const float scale = scales[static_cast<size_t>(t)], wanted = expected_scales[static_cast<size_t>(t)];
                    const bool alike = scale == wanted || std::fabs(scale - wanted) <= norm * 1e-6f * wanted;
                    right = right && (t == damaged ? !std::isfinite(scale) && std::isnan(scale) == std::isnan(wanted) : alike);
                }
                require(right, "quantize", trilobit_set_name(set), p.matrix, tokens);
            }
        }
}

std::vector<uint16_t> halves(int64_t count, std::vector<float> &wide) {
    std::vector<uint16_t> found;
    for (int64_t i = 0; i < count; ++i) {
        const float v = Problem::number() - 1;
        uint32_t bits;
        std::memcpy(&bits, &v, sizeof v);
        found.push_back(static_cast<uint16_t>(bits >> 16));
        bits &= 0xffff0000u;
        float rounded;
        std::memcpy(&rounded, &bits, sizeof rounded);
        wide.push_back(rounded);
    }
    return found;
}

// A·B of bf16 matrices, or A·Aᵀ, stored either way, plus multiples of what has the result's shape.
void check_bf16() {
    if (!trilobit_bf16_runs_here()) return;
    const int64_t count = between(1, 3), rows = between(1, 120), inner = between(1, 120);
    const bool symmetric = between(0, 1), a_transposed = between(0, 1), b_transposed = symmetric ? !a_transposed : between(0, 1);
    const int64_t columns = symmetric ? rows : between(1, 120);
    std::vector<float> a_wide, b_wide;
    const std::vector<uint16_t> a = halves(count * rows * inner, a_wide);
    const std::vector<uint16_t> b = symmetric ? std::vector<uint16_t>() : halves(count * inner * columns, b_wide);
    const uint16_t *b_data = symmetric ? a.data() : b.data();
    const std::vector<float> &right = symmetric ? a_wide : b_wide;
    const float beta = inner == columns && !a_transposed && !symmetric ? 0.5f : 0;
    const float gamma = inner == rows && !b_transposed && !symmetric ? -0.25f : 0;
    std::vector<uint16_t> c(static_cast<size_t>(count * rows * columns));
    bool fine = trilobit_bf16_product(a.data(), a_transposed, b_data, b_transposed, c.data(), count, rows, inner, columns,
                                      symmetric, 0.75f, beta, gamma, 2, static_cast<int32_t>(between(1, 3))) == 0;
    for (int64_t m = 0; m < count; ++m)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                const auto left_at = [&](int64_t k) {
                    return a_wide[static_cast<size_t>(m * rows * inner + (a_transposed ? k * rows + i : i * inner + k))];
                };
                const auto right_at = [&](int64_t k) {
                    return right[static_cast<size_t>(m * columns * inner + (b_transposed ? j * inner + k : k * columns + j))];
                };
                double sum = i == j ? 2 : 0, size = 2;
                for (int64_t k = 0; k < inner; ++k) {
                    sum += 0.75 * left_at(k) * right_at(k);
                    size += std::fabs(left_at(k) * right_at(k));
                }
                if (beta != 0) sum += beta * left_at(j);
                if (gamma != 0) sum += gamma * right_at(i);
                const uint32_t bits = static_cast<uint32_t>(c[static_cast<size_t>((m * rows + i) * columns + j)]) << 16;
                float found;
                std::memcpy(&found, &bits, sizeof found);
                fine = fine && std::fabs(found - sum) <= std::fabs(sum) / 250 + 1e-6 * size;
            }
    require(fine, "bf16 product", symmetric ? "symmetric" : "whole", {nullptr, rows, columns, inner, 0}, count);
}

void check_refusals(const Problem &p) {
    trilobit_matrix m = p.matrix;
    int32_t y = 0;
    bool right = trilobit_product(&m, p.x.data(), 1, &y, 99, 1) == TRILOBIT_BAD_SET;
    right = right && trilobit_linear(&m, p.scales.data(), -1, p.x.data(), p.x_scale.data(), 1, nullptr, nullptr, -1, 1) ==
                         TRILOBIT_BAD_SCALE;
    m.format = 3;
    right = right && trilobit_product(&m, p.x.data(), 1, &y, -1, 1) == TRILOBIT_BAD_FORMAT;
    right = right && trilobit_packed_bytes(0, 0, 5, 0) == TRILOBIT_BAD_SHAPE &&
            trilobit_packed_bytes(2, 1, 1 << 17, 0) == TRILOBIT_BAD_SHAPE;
    require(right, "refusal", "none", p.matrix, 1);
}

}  // namespace

int main(int argc, char **argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
    random_bits.seed(argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1);
    const auto start = std::chrono::steady_clock::now();
    int problems = 0;
    for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++problems) {
        Problem p;
        const trilobit_matrix &m = p.matrix;
        require(trilobit_pack(m.format, m.rows, m.columns, m.group, p.codes.data(), p.packed.data()) == 0, "pack", "none", m,
                0);
        std::vector<int8_t> back(p.codes.size());
        require(trilobit_unpack(&m, back.data()) == 0 && same(back, p.codes), "unpack", "none", m, 0);
        check_products(p);
        check_quantize(p);
        check_bf16();
        check_refusals(p);
    }
    std::printf("%d random problems right, instruction sets:", problems);
    for (int32_t set = 0; set < trilobit_set_count(); ++set)
        if (trilobit_set_runs_here(set)) std::printf(" %s", trilobit_set_name(set));
    std::printf("\n");
}
