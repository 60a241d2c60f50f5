/* Rows of x times a packed matrix, its codes read as they lie: no weight is made in full.
 *
 * x is rounded to whole numbers of 16 bits, with a scale for each 4 to 16 columns, and taken apart into two bytes; sums
 * of (code times byte) are whole numbers, exact. So the one error is that of rounding x, 2^-16 of the largest of its
 * neighbours, beside that of adding floats.
 *
 * A vector of W bytes of codes is a block. A byte holds n = 8 / bits codes; those at shift k of all bytes are a vector
 * of their own, and x lies in the same order. A lane of 4 bytes sums 4 n neighbouring columns.
 */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
enum { W = 64 };
#define UNITS "AVX-512 VNNI"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
enum { W = 32 };
#if defined(__AVXVNNI__)
#define UNITS "AVX-VNNI"
#else
#define UNITS "AVX2"
#endif
#else
enum { W = 32 };
#define UNITS "portable"
#endif
#define RECORD(bits) (W * (2 * (8 / (bits)) + 1)) /* bytes of x for a block */
enum { LANES = W / 4, AT_ONCE = 4 /* rows of x */, LARGEST = 127 * 256 + 127, AHEAD = 2048 /* bytes */ };

typedef int32_t ints __attribute__((vector_size(W)));
typedef float floats __attribute__((vector_size(W)));

static inline ints load_ints(const void *p) {
    ints v;
    memcpy(&v, p, W);
    return v;
}

static inline floats load_floats(const float *p) {
    floats v;
    memcpy(&v, p, W);
    return v;
}

/* Add to each lane the products of its four codes, bytes without a sign, and four bytes with one. */
static inline ints dot(ints sum, ints codes, ints x, int bits) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    (void)bits;
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__)
    (void)bits;
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#elif defined(__AVX2__)
    /* pairs are summed in 16 bits, which products of 4 bits cannot fill: those of 8 are taken in halves */
    const __m256i ones = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16), nibble = _mm256_set1_epi8(15);
    __m256i c = (__m256i)codes, v = (__m256i)x;
    if (bits <= 4) return sum + (ints)_mm256_madd_epi16(_mm256_maddubs_epi16(c, v), ones);
    __m256i low = _mm256_and_si256(c, nibble), high = _mm256_and_si256(_mm256_srli_epi16(c, 4), nibble);
    return sum + (ints)_mm256_madd_epi16(_mm256_maddubs_epi16(low, v), ones)
               + (ints)_mm256_madd_epi16(_mm256_maddubs_epi16(high, v), sixteen);
#else
    (void)bits;
    uint8_t c[W];
    int8_t v[W];
    memcpy(c, &codes, W);
    memcpy(v, &x, W);
    for (int i = 0; i < W; i++) sum[i / 4] += c[i] * v[i];
    return sum;
#endif
}

/* Give lane l the number at l / lanes. */
static inline floats spread(const float *numbers, ints pattern) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (floats)_mm512_permutexvar_ps((__m512i)pattern, (__m512)load_floats(numbers));
#elif defined(__AVX2__)
    return (floats)_mm256_permutevar8x32_ps((__m256)load_floats(numbers), (__m256i)pattern);
#else
    floats v;
    for (int l = 0; l < LANES; l++) v[l] = numbers[pattern[l]];
    return v;
#endif
}

static inline float total(floats v) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sums[LANES];
    memcpy(sums, &v, W);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
#endif
}

/* What rows of a matrix, and rows of x made ready for it, have in common. */
typedef struct {
    int bits, n;           /* bits: 2, 4 or 8; others are spread to 8 first. n: codes in a byte */
    size_t blocks, width;  /* width: bytes of codes in a row */
    size_t groups, size;   /* size: bytes of a row of x */
    size_t step, over;     /* scales go on by step each block, or by one each `over` blocks */
    ints pattern;          /* which of a block's scales a lane has */
} form;

/* Returns 0 where groups do not fall on lanes and blocks. */
static int formed(const matrix *m, form *f) {
    f->bits = m->bits == 2 || m->bits == 4 ? m->bits : 8;
    f->n = 8 / f->bits;
    f->width = (m->columns * f->bits + 7) / 8;
    f->blocks = (f->width + W - 1) / W;
    f->groups = m->groups;
    f->size = f->blocks * RECORD(f->bits) + (f->groups * sizeof(float) + W - 1) / W * W;
    size_t columns = (size_t)W * f->n, of_block = m->groups == 1 ? 1 : m->group < columns ? columns / m->group : 1;
    f->step = m->groups > 1 && m->group <= columns ? of_block : 0;
    f->over = m->groups > 1 && m->group > columns ? m->group / columns : f->blocks;
    for (int l = 0; l < LANES; l++) f->pattern[l] = (int)(l * of_block / LANES);
    if (m->groups == 1) return 1;
    return m->group < columns ? of_block <= LANES && LANES % of_block == 0 && columns % m->group == 0
                              : m->group % columns == 0;
}

/* Make a row of x ready: for each block n vectors of high bytes, n of low ones and scales; then sums over groups. */
static void make_ready(const matrix *m, const form *f, const float *x, uint8_t *to) {
    const int n = f->n, lane = 4 * n;
    float *sums = (float *)(to + f->blocks * RECORD(f->bits));
    memset(to, 0, f->size);
    for (size_t at = 0; at < m->columns; at += lane) {
        uint8_t *record = to + at / lane / LANES * RECORD(f->bits);
        size_t l = at / lane % LANES, count = m->columns - at < (size_t)lane ? m->columns - at : (size_t)lane;
        float largest = 0, scale, back;
        int sum = 0, odd = 0;
        for (size_t i = 0; i < count; i++) {
            float size = __builtin_fabsf(x[at + i]);
            if (size > largest) largest = size;
            odd |= !(size <= 3.4e38f);
        }
        scale = odd ? __builtin_nanf("") : largest < 1e-30f ? 0 : largest / LARGEST;
        back = odd || largest < 1e-30f ? 0 : LARGEST / largest;
        for (size_t i = 0; i < count && back; i++) {
            int v = (int)__builtin_rintf(x[at + i] * back), high = (v + 128) >> 8;
            size_t place = i % n * W + 4 * l + i / n;
            record[place] = (uint8_t)high;
            record[n * W + place] = (uint8_t)(v - high * 256);
            sum += v;
        }
        memcpy(record + 2 * n * W + 4 * l, &scale, 4);
        sums[m->groups == 1 ? 0 : at / m->group] += scale * (float)sum;
    }
}

/* A row of codes: where its bytes, scales and minima are; without minima all codes are too large by an offset. */
typedef struct {
    const uint8_t *codes;
    const float *scale, *low;
    float offset;
} line;

/* A block of codes times some rows of x, which are `size` bytes apart. */
static inline __attribute__((always_inline)) void block(
    ints v, floats of_lane, const uint8_t *x, size_t size, floats *sum, const int bits, const int count
) {
    const int n = 8 / bits;
    ints code[4];
    for (int k = 0; k < n; k++) code[k] = bits == 8 ? v : (v >> k * bits) & 0x01010101 * ((1 << bits) - 1);
    for (int t = 0; t < count; t++, x += size) {
        ints high = {0}, low = {0};
        for (int k = 0; k < n; k++) {
            high = dot(high, code[k], load_ints(x + k * W), bits);
            low = dot(low, code[k], load_ints(x + (n + k) * W), bits);
        }
        floats both = __builtin_convertvector((high << 8) + low, floats);
        sum[t] += both * (of_lane * load_floats((const float *)(x + 2 * n * W)));
    }
}

/* One row of codes times some rows of x. */
static inline __attribute__((always_inline)) void times(
    const form *f, const line *l, const uint8_t *x, float *y, const int bits, const int count
) {
    const size_t record = RECORD(bits), whole = f->width / W, step = f->step, size = f->size;
    const uint8_t *codes = l->codes, *at = x;
    const float *scale = l->scale;
    const ints pattern = f->pattern;
    floats sum[AT_ONCE];
    for (int t = 0; t < count; t++) sum[t] = (floats){0};
    for (size_t b = 0, left = f->over; b < whole; b++, codes += W, at += record) {
        __builtin_prefetch(codes + AHEAD); /* beyond a page the processor does not look by itself */
        block(load_ints(codes), spread(scale, pattern), at, size, sum, bits, count);
        scale += step;
        if (!--left) scale++, left = f->over;
    }
    if (whole < f->blocks) {
        ints v = {0};
        memcpy(&v, codes, f->width % W);
        block(v, spread(scale, pattern), at, size, sum, bits, count);
    }
    for (int t = 0; t < count; t++) {
        const float *sums = (const float *)(x + t * size + f->blocks * record);
        const float *added = l->low ? l->low : l->scale;
        floats rest = {0};
        for (size_t g = 0; g < f->groups; g += LANES) rest += load_floats(added + g) * load_floats(sums + g);
        y[t] = total(l->low ? sum[t] + rest : sum[t] - l->offset * rest);
    }
}

#define COUNTS(bits) \
    switch (count) { \
    case 1: times(f, l, x, y, bits, 1); break; \
    case 2: times(f, l, x, y, bits, 2); break; \
    case 3: times(f, l, x, y, bits, 3); break; \
    default: times(f, l, x, y, bits, AT_ONCE); \
    }

static void row_times(const form *f, const line *l, const uint8_t *x, float *y, int count) {
    if (f->bits == 4) { COUNTS(4) }
    else if (f->bits == 2) { COUNTS(2) }
    else { COUNTS(8) }
}

/* Convert the scales, or minima, of a row. */
static void widened(const matrix *m, const void *from, size_t r, float *to) {
    from = (const char *)from + r * m->stride * (m->wide ? 4 : 2);
    if (m->wide) memcpy(to, from, m->groups * sizeof(float));
    else {
        size_t g = 0;
#if defined(__F16C__)
#if defined(__AVX512F__)
        for (; g + 16 <= m->groups; g += 16)
            _mm512_storeu_ps(to + g, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const half *)from + g))));
#endif
        for (; g + 8 <= m->groups; g += 8)
            _mm256_storeu_ps(to + g, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const half *)from + g))));
#endif
        for (; g < m->groups; g++) to[g] = (float)((const half *)from)[g];
    }
}

typedef struct {
    const product *of;
    form f;
    uint8_t *ready;
    size_t tiles_before;
    int own; /* whether `ready` is its own, not that of the product before */
} prepared;

typedef struct {
    prepared *all;
    size_t count, tiles, next;
    int failed;
} multiplication;

enum { TILE = 32 }; /* rows of a matrix that a thread takes at a time */

static int same_x(const prepared *a, const prepared *b) {
    const product *p = a->of, *q = b->of;
    return p->x == q->x && p->x_kind == q->x_kind && p->rows == q->rows && p->m->columns == q->m->columns
        && p->m->group == q->m->group && a->f.bits == b->f.bits && a->f.groups == b->f.groups;
}

/* Returns 0, or 1 where there is no memory. */
static int ready(prepared *one, const prepared *before) {
    const product *p = one->of;
    if (before && same_x(before, one)) {
        one->ready = before->ready;
        return 0;
    }
    float *row = malloc(p->m->columns * sizeof(float));
    one->ready = aligned_alloc(64, (p->rows * one->f.size + 64) / 64 * 64); /* of no rows, too */
    one->own = 1;
    if (row && one->ready)
        for (size_t t = 0; t < p->rows; t++) {
            for (size_t c = 0; c < p->m->columns; c++) row[c] = element(p->x, t * p->m->columns + c, p->x_kind);
            make_ready(p->m, &one->f, row, one->ready + t * one->f.size);
        }
    int failed = !row || !one->ready;
    free(row);
    return failed;
}

/* Rows of one matrix, from `at` on, times all rows of x. */
static void tile(const prepared *one, size_t at, float *scale, float *low, uint8_t *spread_codes) {
    const product *p = one->of;
    const matrix *m = p->m;
    const form *f = &one->f;
    const size_t end = at + TILE < m->rows ? at + TILE : m->rows;
    const float offset = (float)(1 << (m->bits - 1));
    memset(scale + m->groups, 0, LANES * sizeof(float)); /* of another matrix before */
    memset(low + m->groups, 0, LANES * sizeof(float));
    for (size_t t = 0; t < p->rows; t += AT_ONCE) {
        const int count = p->rows - t < AT_ONCE ? (int)(p->rows - t) : AT_ONCE;
        const uint8_t *x = one->ready + t * f->size;
        for (size_t r = at; r < end; r++) {
            line l = {m->codes + r * m->width, scale, m->low ? low : NULL, offset};
            float y[AT_ONCE];
            if (f->bits != m->bits) unpack(l.codes, spread_codes, m->columns, m->bits), l.codes = spread_codes;
            widened(m, m->scale, r, scale);
            if (m->low) widened(m, m->low, r, low);
            row_times(f, &l, x, y, count);
            for (int i = 0; i < count; i++) put(p->y, (t + i) * m->rows + r, y[i], p->y_kind);
        }
    }
}

static void multiply(void *shared) {
    multiplication *w = shared;
    size_t groups = 0, columns = 0;
    for (size_t i = 0; i < w->count; i++) {
        const matrix *m = w->all[i].of->m;
        if (m->groups > groups) groups = m->groups;
        if (m->columns > columns) columns = m->columns;
    }
    float *scale = calloc(2 * (groups + LANES), sizeof(float));
    uint8_t *codes = calloc(columns + W, 1);
    if (!scale || !codes) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
    while (!__atomic_load_n(&w->failed, __ATOMIC_RELAXED)) {
        size_t n = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED), i = w->count;
        if (n >= w->tiles) break;
        while (w->all[--i].tiles_before > n) {}
        tile(w->all + i, (n - w->all[i].tiles_before) * TILE, scale, scale + groups + LANES, codes);
    }
    free(scale);
    free(codes);
}
