/* C ABI of the engine: a whole decoder, one call a step, on the products of trilobit.h.
 *
 * A graph is a Llama-like decoder (RMSNorm, grouped-query attention with rotary positions, gated MLP) whose projections are
 * packed matrices. It is described by pointers that the caller owns and keeps for as long as a session uses them. A session
 * holds the cache of keys and values: `slots` sequences of up to `capacity` positions each.
 *
 * Letters: T tokens of a call, D width, F hidden width of the MLP, H query heads, E head size, V vocabulary.
 */
#ifndef TRILOBIT_ENGINE_H
#define TRILOBIT_ENGINE_H

#include "trilobit.h"

#ifdef __cplusplus
extern "C" {
#endif

enum trilobit_activations {
    TRILOBIT_PER_TOKEN = 0, /* int8, a scale for each token */
    TRILOBIT_PER_GROUP = 1, /* int8, a scale for each token and group of the matrix */
    TRILOBIT_INT16 = 2      /* two int8 codes, the second of what the first left: 16 bits, at twice the work */
};

/* y = W · Q(norm(x)) + b. gain: of an RMSNorm of its own, [columns] or one number; gain_count 0: none. */
typedef struct {
    trilobit_matrix matrix;
    const void *scales;  /* fp32, or fp16 */
    int64_t scale_count; /* as in trilobit_linear */
    const float *bias;   /* [rows] or NULL */
    const float *gain;
    int64_t gain_count;
    float eps;
    int32_t activations;
    int32_t half_scales; /* whether they are fp16: only of a head with groups */
} trilobit_projection;

typedef struct {
    const float *attention_norm, *mlp_norm; /* [D] */
    const float *q_norm, *k_norm;           /* [E], or NULL: none */
    trilobit_projection q, k, v, o, gate, up, down;
    int64_t window;  /* latest positions that are attended to; 0: all */
    int32_t rotary;  /* 0: no positions in this layer */
} trilobit_layer;

enum trilobit_gate { TRILOBIT_SILU = 0, TRILOBIT_SQUARED_RELU = 1 };

typedef struct {
    int64_t width, hidden, heads, kv_heads, head_size, layers, vocabulary;
    float eps;                /* of the block norms and of q_norm and k_norm */
    float attention_scale;    /* of scores, 1/√E as a rule */
    float rotary_scale;       /* of cosine and sine */
    const float *frequencies; /* [E/2] radians a position */
    int32_t gate;
    const trilobit_layer *layer; /* [layers] */
    const float *final_norm;     /* [D] */
    const void *embedding;       /* [V, D] bf16, or NULL: rows of embedding_matrix */
    trilobit_projection embedding_matrix;
    trilobit_projection head; /* [V, D] */
} trilobit_graph;

typedef struct trilobit_session trilobit_session;

enum trilobit_cache { TRILOBIT_CACHE_BF16 = 0, TRILOBIT_CACHE_INT8 = 1 };

/* A session for calls of up to `most_tokens` tokens. NULL, and *status negative, where the graph's shapes do not fit
 * together or there is no memory. */
trilobit_session *trilobit_session_new(const trilobit_graph *graph, int64_t slots, int64_t capacity, int32_t cache,
                                       int64_t most_tokens, int32_t *status);
void trilobit_session_free(trilobit_session *session);
int64_t trilobit_session_bytes(const trilobit_session *session); /* of cache and working memory */

/* Run T tokens: ids [T], each with its slot and position. Keys and values of all of them are stored before any attends, so
 * that tokens of one sequence may come together (a prompt), and tokens of several sequences too (batched decoding). A token
 * sees the positions of its slot up to its own; those must have been run, in this call or before. rows: which tokens, [count],
 * get logits [count, V] fp32. */
int32_t trilobit_forward(trilobit_session *session, int64_t tokens, const int32_t *ids, const int32_t *slots,
                         const int32_t *positions, int64_t count, const int32_t *rows, float *logits, int32_t set,
                         int32_t threads);

typedef struct {
    float temperature; /* 0: the likeliest token */
    int64_t top_k;     /* 0: all */
    float top_p;       /* 1: all */
    float min_p;       /* 0: all */
    float repetition_penalty; /* 1: none */
} trilobit_sampling;

/* A token sampled from logits [V], which are left as they are; penalised are the `count` tokens of `history`. In this order:
 * penalty (a positive logit is divided by it, a negative one multiplied), temperature, top-k, top-p, min-p. state: of the
 * random numbers, any start; advanced by each call at a temperature above 0. Negative: the logits hold NaN or +∞. */
int32_t trilobit_sample(const float *logits, int64_t vocabulary, const trilobit_sampling *sampling, const int32_t *history,
                        int64_t count, uint64_t *state);

#ifdef __cplusplus
}
#endif
#endif
