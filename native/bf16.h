// Products of bf16 matrices, added up in fp32 and rounded once. Of those known to be symmetric one triangle is computed, the
// other is its mirror image.
//
//     C = α·A·B + β·A + γ·B + δ·I      A [R, K], B [K, M], C [R, M]
//
// Before that B is packed into panels of 48 columns, [pairs of K][48][2], and A into strips of 8 rows, [pairs][8][2]: vdpbf16ps
// takes a vector of pairs from one operand and a pair, broadcast, from the other. Both are read from end to end. What lies past
// an edge is zeros.
#pragma once

#include "layout.h"

namespace {

constexpr int64_t PANEL_WIDTH = 48, STRIP_WIDTH = 8;

struct Bf16Call {
    int64_t count, rows, inner, columns;  // R, K, M of `count` products
    const uint16_t *a, *b;
    bool a_transposed, b_transposed;  // as stored: [K, R], [M, K]
    bool symmetric;
    float alpha, beta, gamma, delta;
    uint16_t *c;
    uint32_t *strips, *panels;  // A's and B's

    int64_t pairs() const { return divide_up(inner, 2); }
    int64_t block_words() const { return PANEL_WIDTH * pairs(); }  // of a panel, or of as many rows of A in strips
    int64_t blocks_of_a() const { return divide_up(rows, PANEL_WIDTH); }
    int64_t blocks_of_b() const { return divide_up(columns, PANEL_WIDTH); }
    // A is the transpose of B: packed together.
    bool one_operand() const { return a == b && a_transposed != b_transposed && rows == columns; }
};

}  // namespace

struct Bf16Kernels {
    void (*pack)(const void *call, int64_t begin, int64_t end);      // blocks of B, then of A unless they are one operand
    void (*multiply)(const void *call, int64_t begin, int64_t end);  // panels of C
};

extern const Bf16Kernels BF16_AVX512;

// dispatch.cpp: null where this processor has none.
const Bf16Kernels *bf16_kernels();
