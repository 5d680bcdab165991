// The entry points of bf16 products: check, find memory, share out the panels.
#include "bf16.h"

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t trilobit_bf16_runs_here(void) { return bf16_kernels() != nullptr; }

EXPORT int32_t trilobit_bf16_product(const uint16_t *a, int32_t a_transposed, const uint16_t *b, int32_t b_transposed,
                                     uint16_t *c, int64_t count, int64_t rows, int64_t inner, int64_t columns,
                                     int32_t symmetric, float alpha, float beta, float gamma, float delta, int32_t threads) {
    const Bf16Kernels *kernels = bf16_kernels();
    if (!kernels) return TRILOBIT_BAD_SET;
    const auto size = [](int64_t n) { return n >= 1 && n <= INT32_MAX; };
    if (count < 0 || !size(rows) || !size(inner) || !size(columns)) return TRILOBIT_BAD_SHAPE;
    if (symmetric && rows != columns) return TRILOBIT_BAD_SHAPE;
    if (beta != 0 && (inner != columns || (a_transposed && !symmetric))) return TRILOBIT_BAD_SHAPE;
    if (gamma != 0 && (inner != rows || (b_transposed && !symmetric))) return TRILOBIT_BAD_SHAPE;
    Bf16Call call = {count, rows, inner, columns, a, b, a_transposed != 0, b_transposed != 0, symmetric != 0,
                     alpha, beta, gamma, delta,   c, nullptr, nullptr};
    const int64_t of_a = count * call.blocks_of_a(), of_b = count * call.blocks_of_b();
    const size_t words = static_cast<size_t>((of_a + of_b) * call.block_words());
    call.strips = static_cast<uint32_t *>(thread_scratch(words * sizeof(uint32_t)));
    if (!call.strips) return TRILOBIT_NO_MEMORY;
    call.panels = call.strips + of_a * call.block_words();
    run_parallel(kernels->pack, &call, call.one_operand() ? of_b : of_b + of_a, 1, threads);
    run_parallel(kernels->multiply, &call, of_b, 1, threads);
    return TRILOBIT_OK;
}
