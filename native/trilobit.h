/* C ABI of the native CPU kernels: ternary and int8 matrices times int8 activations, exact in int32.
 *
 *     y[t, o] = (Σ_k x[t, k] · code[o, k]) · (s_x[t] · s_w) + bias[o]
 *
 * Matrices are packed once (layout.h draws the bits) and only read afterwards; any number of rows and columns ≥ 1 fits,
 * padding lives inside the packed form. All arrays are contiguous, row-major, unaligned allowed. No function throws,
 * allocates what the caller must free, or keeps a pointer after it returns. Calls from several threads are safe.
 *
 * Every function that can fail returns 0 or a negative trilobit_status. Letters: O rows, K columns, T tokens, G groups.
 */
#ifndef TRILOBIT_H
#define TRILOBIT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TRILOBIT_ABI 3

enum trilobit_format {
    TRILOBIT_TWO_BIT = 0, /* ternary, four codes a byte */
    TRILOBIT_BASE3 = 1,   /* ternary, five codes a byte: 1.6 bits a weight */
    TRILOBIT_INT8 = 2     /* −128 … 127, a byte each */
};

enum trilobit_status {
    TRILOBIT_OK = 0,
    TRILOBIT_BAD_SHAPE = -1,  /* a size below 1, or more columns than int32 sums can hold */
    TRILOBIT_BAD_FORMAT = -2, /* no such format */
    TRILOBIT_BAD_SET = -3,    /* no such instruction set, or this processor lacks it */
    TRILOBIT_BAD_SCALE = -4,  /* as many scales as neither 1, O nor G·O */
    TRILOBIT_NO_MEMORY = -5
};

/* A packed matrix [rows, columns]. group: columns that share a scale, or 0 where the scale is per matrix or row. */
typedef struct {
    const uint8_t *packed;
    int64_t rows, columns, group;
    int32_t format;
} trilobit_matrix;

int32_t trilobit_abi(void);

/* Instruction sets are numbered 0 … count − 1, slowest first; −1 wherever a set is asked for means the best here. */
int32_t trilobit_set_count(void);
const char *trilobit_set_name(int32_t set);  /* NULL: no such number */
int32_t trilobit_set_runs_here(int32_t set); /* 1 or 0 */
int32_t trilobit_best_set(void);

/* Bytes of the packed form, or a negative status. */
int64_t trilobit_packed_bytes(int32_t format, int64_t rows, int64_t columns, int64_t group);

/* codes [O, K] int8 ↔ packed. Ternary codes other than −1, 0, 1 are the caller's mistake. */
int32_t trilobit_pack(int32_t format, int64_t rows, int64_t columns, int64_t group, const int8_t *codes, uint8_t *packed);
int32_t trilobit_unpack(const trilobit_matrix *matrix, int8_t *codes);

/* y[t, o] = Σ_k x[t, k] · code[o, k]: x [T, K], y [T, O]. */
int32_t trilobit_product(const trilobit_matrix *matrix, const int8_t *x, int64_t tokens, int32_t *y, int32_t set,
                         int32_t threads);

/* The product, scaled in fp32: rounded once to fp32, times (s_x·s_w) rounded, plus bias (NULL: none).
 * scales: 1 (matrix), O (row) or [G, O] (group; then each group's sum times its scale is added in the order of groups,
 * from 0, and the total multiplied by s_x). x_scale: [T]. y: [T, O]. */
int32_t trilobit_linear(const trilobit_matrix *matrix, const float *scales, int64_t scale_count, const int8_t *x,
                        const float *x_scale, int64_t tokens, const float *bias, float *y, int32_t set, int32_t threads);

/* Int8 codes [T, K] and scales [T] of x [T, K] (fp32, or bf16 where bf16 ≠ 0), after RMSNorm where gain_count ≠ 0:
 * v = x · 1/√(mean x² + eps) · gain (1 or K of them); absmax = max(max|v|, 1e-5);
 * code = round_half_even(v · (1/absmax · 127)); scale = absmax / 127. NaN reaches the scale. */
int32_t trilobit_quantize(const void *x, int32_t bf16, int64_t tokens, int64_t columns, const float *gain, int64_t gain_count,
                          float eps, int8_t *codes, float *scales, int32_t set, int32_t threads);

/* Look at every byte of a block of memory: what a matrix–vector product cannot be faster than. */
int32_t trilobit_read(const uint8_t *from, int64_t bytes, int32_t set, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
