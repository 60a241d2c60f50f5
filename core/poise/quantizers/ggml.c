/* Rows of x times matrices of ggml's blocks, and such rows in full, by functions of ggml's library that are handed in.
 *
 * A row of x is divided by a power of two, so that its largest number lies between 1 and 2, and rounded by ggml to 8
 * bits: scales of float16 could not hold what is far larger or smaller.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "numbers.h"
#include "threads.h"

typedef void (*rounding)(const float *, void *, int64_t);
typedef void (*row_product)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
typedef void (*rows_product)(int, float *, size_t, const void *, const void *, int, int);

typedef struct {
    const uint8_t *blocks;
    rounding round;         /* x to 8 bits */
    row_product one;        /* of a row of blocks and one of x */
    rows_product several;   /* of TOGETHER interleaved rows and one of x, or NULL */
    size_t rows, columns;   /* columns: of x; there may be more in blocks, which are zero */
    size_t whole, width;    /* columns of whole blocks, and their bytes */
    size_t rounded;         /* bytes of a row of x in 8 bits */
} matrix;

typedef struct {
    const matrix *m;
    const void *x; /* (rows, columns) */
    void *y;       /* (rows, m->rows) */
    size_t rows;
    int kind; /* of x and y */
} product;

typedef struct {
    const product *of;
    uint8_t *ready; /* rows of x in 8 bits */
    float *scale;   /* of each; NaN for a row that is not finite */
    size_t tiles_before;
    int own; /* whether `ready` and `scale` are its own, not those of the product before */
} prepared;

typedef struct {
    prepared *all;
    size_t count, tiles, next;
} multiplication;

enum { TILE = 32 /* rows of a matrix that a thread takes at a time */, TOGETHER = 8 };

/* Round one row of x, which `row` has room for in full; return its scale. */
static float make_ready(const product *p, size_t t, float *row, uint8_t *to) {
    const matrix *m = p->m;
    float largest = 0;
    int odd = 0, power = 0;
    for (size_t c = 0; c < m->columns; c++) {
        row[c] = element(p->x, t * m->columns + c, p->kind);
        float size = fabsf(row[c]);
        odd |= !(size <= 3.4e38f);
        if (size > largest) largest = size;
    }
    frexpf(odd ? 1 : largest, &power);
    power -= 1; /* 2^128 is no float, and 2^149 none: hence two factors, too */
    const float some = ldexpf(1, -power / 2), rest = ldexpf(1, -power - -power / 2);
    for (size_t c = 0; c < m->columns; c++) row[c] = odd ? 0 : row[c] * some * rest;
    memset(row + m->columns, 0, (m->whole - m->columns) * sizeof(float));
    m->round(row, to, (int64_t)m->whole);
    return odd ? NAN : ldexpf(1, power);
}

static int same_x(const product *p, const product *q) {
    return p->x == q->x && p->kind == q->kind && p->rows == q->rows && p->m->columns == q->m->columns
        && p->m->whole == q->m->whole && p->m->round == q->m->round;
}

/* Returns 0, or 1 where there is no memory. */
static int ready(prepared *one, const prepared *before) {
    const product *p = one->of;
    if (before && same_x(before->of, p)) {
        one->ready = before->ready, one->scale = before->scale;
        return 0;
    }
    float *row = malloc(p->m->whole * sizeof(float));
    one->ready = malloc(p->rows * p->m->rounded + 1); /* of no rows, too */
    one->scale = malloc(p->rows * sizeof(float) + 1);
    one->own = 1;
    int failed = !row || !one->ready || !one->scale;
    for (size_t t = 0; t < p->rows && !failed; t++)
        one->scale[t] = make_ready(p, t, row, one->ready + t * p->m->rounded);
    free(row);
    return failed;
}

/* Rows of one matrix, from `at` on, times all rows of x. */
static void tile(const prepared *one, size_t at) {
    const product *p = one->of;
    const matrix *m = p->m;
    const size_t end = at + TILE < m->rows ? at + TILE : m->rows;
    const int n = (int)m->whole;
    float y[TILE];
    for (size_t t = 0; t < p->rows; t++) {
        const uint8_t *x = one->ready + t * m->rounded;
        if (m->several) m->several(n, y, TILE, m->blocks + at * m->width, x, 1, (int)(end - at));
        else
            for (size_t r = at; r < end; r++) m->one(n, y + r - at, 0, m->blocks + r * m->width, 0, x, 0, 1);
        for (size_t r = at; r < end; r++) put(p->y, t * m->rows + r, y[r - at] * one->scale[t], p->kind);
    }
}

static void multiply(void *shared) {
    multiplication *w = shared;
    for (;;) {
        size_t n = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED), i = w->count;
        if (n >= w->tiles) break;
        while (w->all[--i].tiles_before > n) {}
        tile(w->all + i, (n - w->all[i].tiles_before) * TILE);
    }
}

typedef void (*widening)(const void *, float *, int64_t);

typedef struct {
    const uint8_t *blocks;
    widening widen;
    void *out; /* (rows, columns) */
    size_t rows, columns, whole, width, next;
    int kind, failed;
} full;

static void take(void *shared) {
    full *w = shared;
    float *row = malloc(w->whole * sizeof(float));
    if (!row) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
    while (!__atomic_load_n(&w->failed, __ATOMIC_RELAXED)) {
        size_t at = __atomic_fetch_add(&w->next, TILE, __ATOMIC_RELAXED), end = at + TILE;
        if (at >= w->rows) break;
        for (size_t r = at; r < (end < w->rows ? end : w->rows); r++) {
            w->widen(w->blocks + r * w->width, row, (int64_t)w->whole);
            if (w->kind == 0) memcpy((float *)w->out + r * w->columns, row, w->columns * sizeof(float));
            else for (size_t c = 0; c < w->columns; c++) put(w->out, r * w->columns + c, row[c], w->kind);
        }
    }
    free(row);
}

/* Returns 0, or 1 where there is no memory. */
int poise_ggml_rows(full *w, int threads, team run) {
    on_threads(take, w, threads, run);
    return w->failed;
}

/* Returns 0, or 1 where there is no memory. */
int poise_ggml_products(const product *products, int count, int threads, team run) {
    prepared *all = calloc((size_t)count, sizeof(prepared));
    if (!all) return 1;
    multiplication w = {all, (size_t)count, 0, 0};
    int failed = 0;
    for (int i = 0; i < count; i++) {
        all[i].of = products + i;
        all[i].tiles_before = w.tiles;
        w.tiles += (products[i].m->rows + TILE - 1) / TILE;
        failed |= ready(all + i, i ? all + i - 1 : NULL);
    }
    if (!failed) on_threads(multiply, &w, threads, run);
    for (int i = 0; i < count; i++)
        if (all[i].own) free(all[i].ready), free(all[i].scale);
    free(all);
    return failed;
}
