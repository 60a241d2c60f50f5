/* Numbers of three kinds, 0 float, 1 bfloat16, 2 half, read as float and written rounded. For C that poise.native builds. */
#ifndef POISE_NUMBERS_H
#define POISE_NUMBERS_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef _Float16 half;

/* In a loop over numbers of one kind it becomes part of a vector. */
static inline float element(const void *p, size_t i, int kind) {
    if (kind == 0) return ((const float *)p)[i];
    if (kind == 2) return (float)((const half *)p)[i];
    uint32_t u = (uint32_t)((const uint16_t *)p)[i] << 16;
    float v;
    memcpy(&v, &u, 4);
    return v;
}

/* To nearest, ties to even; what is no number stays none, whatever bits it has. */
static inline uint16_t as_bfloat(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return v != v ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline void put(void *p, size_t i, float v, int kind) {
    if (kind == 0) ((float *)p)[i] = v;
    else if (kind == 1) ((uint16_t *)p)[i] = as_bfloat(v);
    else ((half *)p)[i] = (half)v;
}
#endif
