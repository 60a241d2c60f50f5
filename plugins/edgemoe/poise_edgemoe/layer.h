/* A layer with experts, as one token goes through it, its products and its routing.
 *
 * The layer is that of Mixtral: x += attention(norm(x)), x += experts(norm(x)).
 */
#include "attention.h"
#include "packed.h"

enum { GRAIN = 1 << 18 }; /* weights for each thread */

/* Rows that lie packed, or in full. */
typedef struct {
    const matrix *packed; /* or NULL */
    const void *full;
    const float *bias;    /* or NULL */
    size_t rows, columns;
    int kind;             /* of `full` */
} linear;

typedef struct {
    const matrix *first, *second;
    const void *first_bias, *second_bias; /* or NULL */
    int kind;                             /* of biases */
} expert;

typedef struct {
    multiplier multiply;
    team run;
    attention attention; /* q, k, v and out are float */
    linear q, k, v, o, router;
    const float *first_norm, *second_norm;
    float *state, *normed;       /* (hidden,) */
    float *every;                /* (chosen, hidden) */
    int32_t *experts;            /* (router.rows,), the first `chosen` are set, in ascending order */
    float *weights;              /* of them */
    const expert *const *there;  /* (router.rows,): experts that are in memory; NULL: nobody may look */
    size_t hidden, chosen;
    float first_eps, second_eps, alpha, limit;
    int threads, of_all;         /* of_all: a weight is the share among all experts, not those that are chosen */
    int gate;                    /* 0: silu(first half) * second half; 1: that of gpt-oss, of neighbours */
} layer;

static int threads_for(const layer *l, size_t work) {
    size_t most = work / GRAIN;
    return most < 1 ? 1 : most < (size_t)l->threads ? (int)most : l->threads;
}

/* ---------------------------------------------------------------- products */

typedef struct {
    const linear *w;
    const float *x;
    float *y;
    size_t next;
} rows_in_full;

static void take_rows(void *shared) {
    rows_in_full *all = shared;
    const linear *w = all->w;
    for (;;) {
        size_t at = __atomic_fetch_add(&all->next, 32, __ATOMIC_RELAXED), end = at + 32 < w->rows ? at + 32 : w->rows;
        if (at >= w->rows) return;
        for (size_t r = at; r < end; r++)
            all->y[r] = OF_KIND(w->kind, dot_kept, all->x, w->full, r * w->columns, w->columns);
    }
}

static void add_bias(float *y, const void *bias, size_t n, int kind) {
    for (size_t i = 0; bias && i < n; i++) y[i] += element(bias, i, kind);
}

/* y = W x + bias of some W; returns 0, or 1 where there is no memory. */
static int apply(const layer *l, const linear *const *all, int count, const float *x, float *const *ys) {
    product packed[4];
    size_t work = 0;
    int n = 0;
    for (int i = 0; i < count; i++) {
        const linear *w = all[i];
        if (w->packed) {
            packed[n++] = (product){w->packed, x, ys[i], 1, 0, 0};
            work += w->rows * w->columns;
            continue;
        }
        rows_in_full shared = {w, x, ys[i], 0};
        on_threads(take_rows, &shared, threads_for(l, w->rows * w->columns), l->run);
    }
    int failed = n ? l->multiply(packed, n, threads_for(l, work), l->run) : 0;
    for (int i = 0; i < count; i++) add_bias(ys[i], all[i]->bias, all[i]->rows, 0);
    return failed;
}

/* ---------------------------------------------------------------- routing */

/* The largest logits, the first of equals; what is no number is larger than all. */
static void largest(const float *logits, size_t n, size_t chosen, int32_t *experts) {
    for (size_t k = 0; k < chosen; k++) {
        int32_t best = -1;
        for (size_t e = 0; e < n; e++) {
            int taken = 0;
            for (size_t i = 0; i < k; i++) taken |= experts[i] == (int32_t)e;
            if (taken) continue;
            if (best < 0 || logits[e] > logits[best] || (logits[e] != logits[e] && logits[best] == logits[best]))
                best = (int32_t)e;
        }
        experts[k] = best;
    }
    for (size_t i = 1; i < chosen; i++)
        for (size_t j = i; j && experts[j] < experts[j - 1]; j--) {
            int32_t other = experts[j];
            experts[j] = experts[j - 1], experts[j - 1] = other;
        }
}

/* Experts of a normed state, and their weights. Returns 0, or 1 where there is no memory. */
static int route(const layer *l, const float *normed, int32_t *experts, float *weights) {
    const size_t n = l->router.rows;
    const linear *w = &l->router;
    float *logits = malloc(n * sizeof(float)), sum = 0, most;
    if (!logits) return 1;
    int failed = apply(l, &w, 1, normed, &logits);
    largest(logits, n, l->chosen, experts);
    most = logits[experts[0]];
    for (size_t e = 0; e < n; e++) most = logits[e] > most ? logits[e] : most;
    for (size_t k = 0; k < l->chosen; k++) weights[k] = exponential(logits[experts[k]] - most);
    for (size_t e = 0; l->of_all && e < n; e++) sum += exponential(logits[e] - most);
    for (size_t k = 0; !l->of_all && k < l->chosen; k++) sum += weights[k];
    for (size_t k = 0; k < l->chosen; k++) weights[k] /= sum;
    free(logits);
    return failed;
}
