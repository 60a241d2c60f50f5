/* Packed matrices, and the call that multiplies them (quantizers/kernel.c). For C that poise.native builds. */
#ifndef POISE_PACKED_H
#define POISE_PACKED_H
#include <stddef.h>
#include <stdint.h>
#include "threads.h"

/* A code of `bits` bits stands for scale * (code - offset) + low, with scale and low of its group of columns. In a
 * row codes follow each other from the lowest bit of the first byte. */
typedef struct {
    const uint8_t *codes;
    const void *scale, *low;           /* low: NULL in the symmetric scheme, whose offset is 2^(bits - 1) */
    size_t rows, columns, width;       /* width: bytes of a row */
    size_t group, groups, stride;      /* columns of a group, groups of a row, numbers from row to row */
    int bits, wide;                    /* wide: scale and low are float, not half */
} matrix;

/* One matrix, and rows of x that it is multiplied with; what one call takes is spread over threads as a whole. */
typedef struct {
    const matrix *m;
    const void *x; /* (rows, columns) */
    void *y;       /* (rows, m->rows) */
    size_t rows;
    int x_kind, y_kind; /* 0 float, 1 bfloat16, 2 half */
} product;

/* Makes all products; returns 0, or 1 where there is no memory. */
typedef int (*multiplier)(const product *, int count, int threads, team run);
#endif
