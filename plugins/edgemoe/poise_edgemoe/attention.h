/* Norms, rotation by position, and attention of a token over kept keys and values.
 *
 * All is computed in float, whatever the type of what is read and written: 0 float, 1 bfloat16, 2 half.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "numbers.h"
#include "threads.h"

/* A call for a kind that is known when it is compiled. */
#define OF_KIND(kind, call, ...) \
    ((kind) == 0 ? call(__VA_ARGS__, 0) : (kind) == 1 ? call(__VA_ARGS__, 1) : call(__VA_ARGS__, 2))

static inline __attribute__((always_inline)) void widen_kind(const void *from, size_t at, float *to, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) to[i] = element(from, at + i, kind);
}

static inline __attribute__((always_inline)) void narrow_kind(const float *from, void *to, size_t at, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) put(to, at + i, from[i], kind);
}

static inline void widen(const void *from, size_t at, float *to, size_t n, int kind) {
    OF_KIND(kind, widen_kind, from, at, to, n);
}

static inline void narrow(const float *from, void *to, size_t at, size_t n, int kind) {
    OF_KIND(kind, narrow_kind, from, to, at, n);
}

static inline __attribute__((always_inline)) float dot_kept(const float *a, const void *p, size_t at, size_t n, int kind) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += a[i] * element(p, at + i, kind);
    return sum;
}

static inline __attribute__((always_inline)) void add_kept(
    float *sums, float share, const void *p, size_t at, size_t n, int kind
) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) sums[i] += share * element(p, at + i, kind);
}

static inline float dot(const float *a, const float *b, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* x = weight x / sqrt(mean of squares + eps), of each `width` numbers. */
static void norm(float *x, size_t n, const float *weight, size_t width, float eps) {
    for (size_t at = 0; weight && at < n; at += width) {
        float scale = 1 / sqrtf(dot(x + at, x + at, width) / (float)width + eps);
        for (size_t i = 0; i < width; i++) x[at + i] *= scale * weight[i];
    }
}

/* Rotate pairs (i, i + half) of a head. */
static void rotate(float *head, size_t width, const float *cosine, const float *sine) {
    for (size_t i = 0, h = width / 2; i < h; i++) {
        float a = head[i], b = head[i + h];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + h] = b * cosine[i] + a * sine[i];
    }
}

/* e^x for x <= 0, to 2e-7: what libm has is not made of vectors. */
static inline float exponential(float x) {
    float t = x * 1.44269504f, whole, part;
    t = t > -126 ? t : -126; /* of what is no number, too */
    whole = rintf(t);
    part = (t - whole) * 0.69314718f;
    float p = 1 + part * (1 + part * (0.5f + part * (0.16666667f + part * (0.041666667f + part * (0.0083333333f
              + part * 0.0013888889f)))));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float two;
    memcpy(&two, &bits, 4);
    return x == x ? p * two : x;
}

typedef struct {
    const void *q, *k, *v;             /* (rows, heads x width), (rows, kv_heads x width) */
    void *keys, *values, *out;         /* (rows, kv_heads, context, width); out like q */
    const float *q_norm, *k_norm;      /* or NULL */
    const void *cosine, *sine;         /* (rows, angle_stride), half of the width is read */
    const float *sinks;                /* (heads,), or NULL */
    size_t rows, heads, kv_heads, width, context, at, q_norm_width, k_norm_width, angle_stride;
    float scaling, q_eps, k_eps;
    int kind, kept_kind, angle_kind;   /* of q, k, v and out; of keys and values; of angles */
} attention;

typedef struct {
    const attention *a;
    const float *q; /* all queries, ready */
    size_t next;
    int failed;
} attending;

/* Queries of all rows normed and rotated; keys and values of the token put where they are kept. */
static void take_in(const attention *a, float *q, float *scratch) {
    const size_t wide = a->heads * a->width, narrower = a->kv_heads * a->width, half_of_it = a->width / 2;
    float *cosine = scratch + narrower, *sine = cosine + half_of_it;
    for (size_t r = 0; r < a->rows; r++) {
        widen(a->cosine, r * a->angle_stride, cosine, half_of_it, a->angle_kind);
        widen(a->sine, r * a->angle_stride, sine, half_of_it, a->angle_kind);
        float *mine = q + r * wide;
        widen(a->q, r * wide, mine, wide, a->kind);
        norm(mine, wide, a->q_norm, a->q_norm_width, a->q_eps);
        for (size_t h = 0; h < a->heads; h++) rotate(mine + h * a->width, a->width, cosine, sine);
        widen(a->k, r * narrower, scratch, narrower, a->kind);
        norm(scratch, narrower, a->k_norm, a->k_norm_width, a->k_eps);
        for (size_t h = 0; h < a->kv_heads; h++) {
            size_t place = ((r * a->kv_heads + h) * a->context + a->at) * a->width;
            rotate(scratch + h * a->width, a->width, cosine, sine);
            narrow(scratch + h * a->width, a->keys, place, a->width, a->kept_kind);
        }
        widen(a->v, r * narrower, scratch, narrower, a->kind);
        for (size_t h = 0; h < a->kv_heads; h++)
            narrow(scratch + h * a->width, a->values, ((r * a->kv_heads + h) * a->context + a->at) * a->width,
                   a->width, a->kept_kind);
    }
}

/* All query heads of one head of keys and values. */
static void attend(const attention *a, const float *q, size_t pair, float *scores, float *sums) {
    const size_t group = a->heads / a->kv_heads, n = a->at + 1, first = pair * a->context * a->width;
    const size_t row = pair / a->kv_heads, head = pair % a->kv_heads * group;
    q += (row * a->heads + head) * a->width;
    for (size_t t = 0; t < n; t++)
        for (size_t g = 0; g < group; g++)
            scores[g * n + t] = OF_KIND(a->kept_kind, dot_kept, q + g * a->width, a->keys, first + t * a->width, a->width) * a->scaling;
    for (size_t g = 0; g < group; g++) {
        float *s = scores + g * n, largest = a->sinks ? a->sinks[head + g] : s[0], total;
        for (size_t t = 0; t < n; t++) largest = s[t] > largest ? s[t] : largest;
        for (size_t t = 0; t < n; t++) s[t] = exponential(s[t] - largest);
        total = a->sinks ? exponential(a->sinks[head + g] - largest) : 0;
        for (size_t t = 0; t < n; t++) total += s[t];
        for (size_t t = 0; t < n; t++) s[t] /= total;
    }
    memset(sums, 0, group * a->width * sizeof(float));
    for (size_t t = 0; t < n; t++)
        for (size_t g = 0; g < group; g++)
            OF_KIND(a->kept_kind, add_kept, sums + g * a->width, scores[g * n + t], a->values, first + t * a->width, a->width);
    narrow(sums, a->out, (row * a->heads + head) * a->width, group * a->width, a->kind);
}

static void take(void *shared) {
    attending *w = shared;
    const attention *a = w->a;
    const size_t group = a->heads / a->kv_heads;
    float *room = malloc((a->at + 1 + a->width) * group * sizeof(float));
    if (!room) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
    while (!__atomic_load_n(&w->failed, __ATOMIC_RELAXED)) {
        size_t pair = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
        if (pair >= a->rows * a->kv_heads) break;
        attend(a, w->q, pair, room, room + (a->at + 1) * group);
    }
    free(room);
}

/* Returns 0, or 1 where there is no memory. */
static int attention_of_token(const attention *a, int threads, team run) {
    float *q = malloc((a->rows * a->heads + a->kv_heads + 1) * a->width * sizeof(float));
    if (!q) return 1;
    take_in(a, q, q + a->rows * a->heads * a->width);
    attending w = {a, q, 0, 0};
    on_threads(take, &w, threads, run);
    free(q);
    return w.failed;
}
