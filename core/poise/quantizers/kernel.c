/* Rows of a packed matrix in full, bit for bit what torch makes of them, and its products, without such rows. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "numbers.h"
#include "packed.h"

static inline float number(const void *p, size_t i, int wide) {
    return wide ? ((const float *)p)[i] : (float)((const half *)p)[i];
}

static void unpack(const uint8_t *from, uint8_t *to, size_t columns, int bits) {
    if (bits == 8) memcpy(to, from, columns);
    else if (bits == 4)
        for (size_t c = 0; c < columns / 2; c++) to[2 * c] = from[c] & 15, to[2 * c + 1] = from[c] >> 4;
    else if (bits == 2)
        for (size_t c = 0; c < columns / 4; c++)
            for (int k = 0; k < 4; k++) to[4 * c + k] = (from[c] >> 2 * k) & 3;
    size_t done = bits == 8 ? columns : bits == 4 ? columns / 2 * 2 : bits == 2 ? columns / 4 * 4 : 0;
#if defined(__AVX512VBMI__) /* eight codes of b bits are b bytes: to each eight bytes theirs, shifted apart */
    if (done < columns && bits != 4 && bits != 2) {
        uint8_t from_byte[64], shifts[64];
        for (int i = 0; i < 64; i++) from_byte[i] = (uint8_t)(i / 8 * bits + i % 8), shifts[i] = (uint8_t)(i % 8 * bits);
        const __m512i where = _mm512_loadu_si512(from_byte), by = _mm512_loadu_si512(shifts);
        const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
        for (; done / 8 * bits + 64 <= (columns * bits + 7) / 8; done += 64) {
            __m512i bytes = _mm512_permutexvar_epi8(where, _mm512_loadu_si512(from + done / 8 * bits));
            _mm512_storeu_si512(to + done, _mm512_and_si512(_mm512_multishift_epi64_epi8(by, bytes), mask));
        }
    }
#endif
    for (; done / 8 * bits + 8 <= (columns * bits + 7) / 8 && done + 8 <= columns; done += 8) {
        uint64_t word;
        memcpy(&word, from + done / 8 * bits, 8);
        for (int k = 0; k < 8; k++) to[done + k] = (uint8_t)((word >> k * bits) & ((1u << bits) - 1));
    }
    for (; done < columns; done++) {
        size_t at = done * bits, byte = at / 8, shift = at % 8;
        unsigned word = from[byte];
        if (shift + bits > 8) word |= (unsigned)from[byte + 1] << 8;
        to[done] = (uint8_t)((word >> shift) & ((1u << bits) - 1));
    }
}

/* The sum must be rounded after the product, as torch does it: no fused operation here. */
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
static void row_in_full(const matrix *m, size_t r, uint8_t *codes, float *out) {
#ifdef __clang__
#pragma clang fp contract(off)
#endif
    const int offset = m->low ? 0 : 1 << (m->bits - 1);
    unpack(m->codes + r * m->width, codes, m->columns, m->bits);
    for (size_t g = 0; g < m->groups; g++) {
        size_t from = g * m->group, to = from + m->group < m->columns ? from + m->group : m->columns;
        float s = number(m->scale, r * m->stride + g, m->wide);
        if (m->low) {
            float l = number(m->low, r * m->stride + g, m->wide);
            for (size_t c = from; c < to; c++) out[c] = (float)codes[c] * s + l;
        } else
            for (size_t c = from; c < to; c++) out[c] = (float)(codes[c] - offset) * s;
    }
}
#pragma GCC pop_options

enum { ROWS = 32 }; /* that a thread takes at a time */

typedef struct {
    const matrix *m;
    void *out; /* (rows, columns) of the kind */
    size_t next;
    int kind, failed; /* 0 float, 1 bfloat16, 2 half */
} work;

/* Threads take rows until none is left. */
static void take(void *shared) {
    work *w = shared;
    const matrix *m = w->m;
    uint8_t *codes = malloc(m->columns);
    float *row = malloc(m->columns * sizeof(float));
    if (!codes || !row) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
    while (!__atomic_load_n(&w->failed, __ATOMIC_RELAXED)) {
        size_t at = __atomic_fetch_add(&w->next, ROWS, __ATOMIC_RELAXED), end = at + ROWS;
        if (at >= m->rows) break;
        for (size_t r = at; r < (end < m->rows ? end : m->rows); r++) {
            row_in_full(m, r, codes, w->kind ? row : (float *)w->out + r * m->columns);
            void *out = (uint16_t *)w->out + r * m->columns;
            if (w->kind == 1)
                for (size_t c = 0; c < m->columns; c++) put(out, c, row[c], 1);
            if (w->kind == 2)
                for (size_t c = 0; c < m->columns; c++) put(out, c, row[c], 2);
        }
    }
    free(codes);
    free(row);
}

/* Returns 0, or 1 where there is no memory. */
int poise_rows(const matrix *m, void *out, int kind, int threads, team run) {
    work all = {m, out, 0, kind, 0};
    on_threads(take, &all, threads, run);
    return all.failed;
}

#include "products.h"

const char *poise_units(void) { return UNITS; }

/* Returns whether there are products of a matrix. */
int poise_multiplies(const matrix *m) {
    form f;
    return formed(m, &f);
}

/* Returns 0, or 1 where there is no memory. */
int poise_products(const product *products, int count, int threads, team run) {
    prepared *all = aligned_alloc(64, (count * sizeof(prepared) + 63) / 64 * 64);
    if (!all) return 1;
    multiplication w = {all, count, 0, 0, 0};
    memset(all, 0, count * sizeof(prepared));
    for (int i = 0; i < count; i++) {
        all[i].of = products + i;
        all[i].tiles_before = w.tiles;
        w.tiles += (products[i].m->rows + TILE - 1) / TILE;
        formed(products[i].m, &all[i].f);
        w.failed |= ready(all + i, i ? all + i - 1 : NULL);
    }
    on_threads(multiply, &w, threads, run);
    for (int i = 0; i < count; i++)
        if (all[i].own) free(all[i].ready);
    free(all);
    return w.failed;
}
