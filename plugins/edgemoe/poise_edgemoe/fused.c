/* What a layer does to one token: alone, norms and attention; as a whole, all but waiting for its experts. */
#include "layer.h"

enum { MOST_AT_ONCE = 64 }; /* experts of a token that need no one to list them */

/* Functions return 0, or 1 where there is no memory. */

int poise_attend(const attention *a, int threads, team run) { return attention_of_token(a, threads, run); }

/* Rows of x, normed. */
int poise_norm(const void *x, void *y, const float *weight, size_t rows, size_t width, float eps, int kind) {
    float *row = malloc(width * sizeof(float));
    if (!row) return 1;
    for (size_t r = 0; r < rows; r++) {
        widen(x, r * width, row, width, kind);
        norm(row, width, weight, width, eps);
        narrow(row, y, r * width, width, kind);
    }
    free(row);
    return 0;
}

/* What is before experts: `state`, `normed`, `experts` and `weights` are set. */
static int before_experts(const layer *l, const void *x, int kind) {
    const attention *a = &l->attention;
    const linear *in[] = {&l->q, &l->k, &l->v}, *out = &l->o;
    float *const made[] = {(float *)a->q, (float *)a->k, (float *)a->v};
    float *const back = l->normed;
    widen(x, 0, l->state, l->hidden, kind);
    memcpy(l->normed, l->state, l->hidden * sizeof(float));
    norm(l->normed, l->hidden, l->first_norm, l->hidden, l->first_eps);
    if (apply(l, in, 3, l->normed, made)) return 1;
    if (attention_of_token(a, threads_for(l, 2 * a->kv_heads * a->width * (a->at + 1)), l->run)) return 1;
    if (apply(l, &out, 1, a->out, &back)) return 1;
    for (size_t i = 0; i < l->hidden; i++) l->normed[i] = l->state[i] += l->normed[i];
    norm(l->normed, l->hidden, l->second_norm, l->hidden, l->second_eps);
    return route(l, l->normed, l->experts, l->weights);
}

/* Whom the router would choose if x were what enters its norm. */
int poise_route(const layer *l, const void *x, int kind, int32_t *experts, float *weights) {
    float *normed = malloc(l->hidden * sizeof(float));
    if (!normed) return 1;
    widen(x, 0, normed, l->hidden, kind);
    norm(normed, l->hidden, l->second_norm, l->hidden, l->second_eps);
    int failed = route(l, normed, experts, weights);
    free(normed);
    return failed;
}

static float silu(float g, float alpha) {
    float e = exponential(-fabsf(alpha * g));
    return g * (g >= 0 ? 1 / (1 + e) : e / (1 + e));
}

void poise_gated(const layer *l, const float *from, float *to, size_t n) {
    if (l->gate == 0)
        for (size_t i = 0; i < n; i++) to[i] = silu(from[i], 1) * from[n + i];
    else
        for (size_t i = 0; i < n; i++) {
            float g = from[2 * i], up = from[2 * i + 1], most = l->limit;
            g = g > most ? most : g;
            up = up > most ? most : up < -most ? -most : up;
            to[i] = (up + 1) * silu(g, l->alpha);
        }
}

/* Outputs of experts of one shape, into rows of `every`, (any, hidden). */
int poise_outputs(const layer *l, const expert *const *all, const int32_t *rows, int count, float *every) {
    const size_t wide = all[0]->first->rows, inner = all[0]->second->columns, work = count * l->hidden;
    product *products = malloc(count * sizeof(product));
    float *first = malloc(count * (wide + inner) * sizeof(float)), *second = first + count * wide;
    int failed = !products || !first;
    for (int i = 0; i < count && !failed; i++)
        products[i] = (product){all[i]->first, l->normed, first + i * wide, 1, 0, 0};
    failed = failed || l->multiply(products, count, threads_for(l, work * wide), l->run);
    for (int i = 0; i < count && !failed; i++) {
        add_bias(first + i * wide, all[i]->first_bias, wide, all[i]->kind);
        poise_gated(l, first + i * wide, second + i * inner, inner);
        products[i] = (product){all[i]->second, second + i * inner, every + rows[i] * l->hidden, 1, 0, 0};
    }
    failed = failed || l->multiply(products, count, threads_for(l, work * inner), l->run);
    for (int i = 0; i < count && !failed; i++)
        add_bias(every + rows[i] * l->hidden, all[i]->second_bias, l->hidden, all[i]->kind);
    free(products);
    free(first);
    return failed;
}

/* What leaves the layer: its state and the weighted outputs of experts, added in their order. */
void poise_after(const layer *l, const float *every, const float *weights, int count, void *out, int kind) {
    float *sum = l->normed;
    memset(sum, 0, l->hidden * sizeof(float));
    for (int i = 0; i < count; i++)
        for (size_t c = 0; c < l->hidden; c++) sum[c] += weights[i] * every[i * l->hidden + c];
    for (size_t c = 0; c < l->hidden; c++) sum[c] += l->state[c];
    narrow(sum, out, 0, l->hidden, kind);
}

/* Outputs of all experts that are chosen, and their sum; 0 where one of them is not there. */
static int finished(const layer *l, void *out, int kind, int *failed) {
    const expert *all[MOST_AT_ONCE];
    int32_t rows[MOST_AT_ONCE];
    if (!l->there || l->chosen > MOST_AT_ONCE) return 0;
    for (size_t i = 0; i < l->chosen; i++) {
        if (!(all[i] = l->there[l->experts[i]])) return 0;
        rows[i] = (int32_t)i;
    }
    *failed = poise_outputs(l, all, rows, (int)l->chosen, l->every);
    poise_after(l, l->every, l->weights, (int)l->chosen, out, kind);
    return 1;
}

enum { WAITS = 0, NO_MEMORY = 1, DONE = 2 };

/* A token through a layer: DONE; or WAITS, where it has chosen experts that are not there, or nobody may look. */
int poise_layer(const layer *l, const void *x, void *out, int kind) {
    int failed = before_experts(l, x, kind);
    int done = !failed && finished(l, out, kind, &failed);
    return failed ? NO_MEMORY : done ? DONE : WAITS;
}

/* A token through some layers, in place, until one says something else than DONE: that, and how many are done. */
int poise_layers(const layer *const *all, int count, void *x, int kind, int *said) {
    int n = 0;
    for (*said = DONE; n < count; n++)
        if ((*said = poise_layer(all[n], x, x, kind)) != DONE) break;
    return n;
}

/* Who leaves a cache: of `resident` from `first` to `end`, none of them pinned, the one with the largest score; of
 * equal ones that whose `last` use is the oldest, then the first. -1: nobody, or all scores are minus infinity. */
long poise_victim(const double *scores, const uint8_t *resident, const int64_t *last, long first, long end,
                  const int32_t *pinned, long count) {
    long best = -1;
    for (long i = first; i < end; i++) {
        if (!resident[i] || !(scores[i] > -INFINITY)) continue;
        if (best >= 0 && (scores[i] < scores[best] || (scores[i] == scores[best] && last[i] >= last[best]))) continue;
        long n = 0;
        while (n < count && pinned[n] != i) n++;
        if (n == count) best = i;
    }
    return best;
}
