// The naive reference: one code at a time from its byte, int64 sums, the definition written out. Also what runs where
// nothing faster does.
#include "kernels.h"

#include <cmath>
#include <cstring>

namespace {

int64_t dot(const Call &c, int64_t t, int64_t o, int64_t begin, int64_t end) {
    int64_t sum = 0;
    for (int64_t k = begin; k < end; ++k) {
        const Place at = place(c.shape, o, k);
        sum += code_at(c.shape.format, c.packed[at.byte], at.symbol) * c.x[t * c.shape.columns + k];
    }
    return sum;
}

void output(const Call &c, int64_t t, int64_t o) {
    const Geometry &g = c.shape;
    if (c.integers) {
        c.integers[t * g.rows + o] = static_cast<int32_t>(dot(c, t, o, 0, g.columns));
        return;
    }
    float y;
    if (!c.grouped) {
        const float scale = c.x_scale[t] * c.scales[c.per_row ? o : 0];
        y = static_cast<float>(dot(c, t, o, 0, g.columns)) * scale;
    } else {
        y = 0;
        for (int64_t s = 0; s < g.segments; ++s) {
            const int64_t begin = s * g.group;
            const float x_scale = c.x_grouped ? c.x_scale[t * g.segments + s] : 1;
            const int64_t at = s * g.rows + o;
            const float scale = (c.half_scales ? from_half(c.half_scales[at]) : c.scales[at]) * x_scale;
            y = y + static_cast<float>(dot(c, t, o, begin, begin + g.columns_of(s))) * scale;
        }
        if (!c.x_grouped) y = y * c.x_scale[t];
    }
    const bool second = c.pairs && t % 2;
    float &to = c.y[(c.pairs ? t / 2 : t) * g.rows + o];
    y = second ? to + y : y;
    to = c.bias && !second ? y + c.bias[o] : y;
}

void rows(const void *call, int64_t begin, int64_t end) {
    const Call &c = *static_cast<const Call *>(call);
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t o = begin; o < smaller(end, c.shape.rows); ++o) output(c, t, o);
}

void gemv(const void *call, int64_t begin, int64_t end) { rows(call, begin * PANEL_ROWS, end * PANEL_ROWS); }

void gemm(const void *call, int64_t begin, int64_t end) {
    rows(call, begin * UNIT_PANELS * PANEL_ROWS, end * UNIT_PANELS * PANEL_ROWS);
}

float value(const QuantizeCall &c, int64_t index) {
    if (!c.bf16) return static_cast<const float *>(c.x)[index];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(c.x)[index]) << 16;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

void quantize(const void *call, int64_t begin, int64_t end) {
    const QuantizeCall &c = *static_cast<const QuantizeCall *>(call);
    const int64_t n = c.columns;
    for (int64_t t = begin; t < end; ++t) {
        float inverse = 1;
        if (c.gain_count) {
            double squares = 0;
            for (int64_t k = 0; k < n; ++k) squares += static_cast<double>(value(c, t * n + k)) * value(c, t * n + k);
            inverse = 1 / std::sqrt(static_cast<float>(squares / static_cast<double>(n)) + c.eps);
        }
        auto normed = [&](int64_t k) {
            const float v = value(c, t * n + k);
            return c.gain_count ? v * inverse * c.gain[c.gain_count == 1 ? 0 : k] : v;
        };
        float absmax = 1e-5f;
        for (int64_t k = 0; k < n; ++k) {
            const float a = std::fabs(normed(k));
            if (a > absmax || a != a) absmax = a;  // once NaN, it stays
        }
        const float reciprocal = 1 / absmax, factor = reciprocal * 127;
        for (int64_t k = 0; k < n; ++k) {
            const float code = std::nearbyint(normed(k) * factor);
            c.codes[t * n + k] = code != code ? 0 : static_cast<int8_t>(code < -128 ? -128 : code > 127 ? 127 : code);
        }
        c.scales[t] = absmax / 127;
    }
}

}  // namespace

const Kernels KERNELS_SCALAR = {gemv, gemm, quantize};
