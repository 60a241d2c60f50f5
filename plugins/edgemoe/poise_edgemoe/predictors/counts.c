/* What `blocks.Usual`, `blocks.Factored` and `routing.FromRouting` do for one layer of a token, in one call each:
 * numbers of Python lie far apart, and weights have passed through the processor's caches. */
#include <math.h>
#include <stdint.h>

enum { BEFORE = 3, SOURCES = BEFORE + 1, RATES = 4 };

struct counts {
    double *k, *counts, *tokens, *rate; /* (layers), (layers, experts), (layers), (layers, RATES, experts) */
    float *both, *visits;               /* (SOURCES, layers, experts, experts), (SOURCES, layers, experts); or none */
    int32_t *used, *sizes;              /* (layers, experts), (layers): of the last token of each */
    int64_t layers, experts;
    double smoothed, slow, kept[RATES];
};

/* The layer that a source of layer n is: 1 to BEFORE layers before, or itself. */
static int64_t source(const struct counts *c, int64_t n, int s) {
    int64_t back = s < BEFORE ? s + 1 : 0;
    return ((n - back) % c->layers + c->layers) % c->layers;
}

void poise_note(struct counts *c, int64_t n, const int32_t *experts, int64_t count) {
    const int64_t E = c->experts;
    for (int s = 0; c->both && s < SOURCES; s++) {
        const int64_t m = source(c, n, s);
        for (int32_t i = 0; i < c->sizes[m]; i++) {
            const int64_t row = (s * c->layers + n) * E + c->used[m * E + i];
            c->visits[row] += 1;
            for (int64_t j = 0; j < count; j++) c->both[row * E + experts[j]] += 1;
        }
    }
    c->tokens[n] += 1;
    c->sizes[n] = (int32_t)count;
    for (int64_t j = 0; j < count; j++) {
        c->counts[n * E + experts[j]] += 1;
        c->used[n * E + j] = experts[j];
    }
    for (int h = 0; h < RATES; h++) {
        double *rate = c->rate + (n * RATES + h) * E;
        for (int64_t j = 0; j < count; j++) rate[experts[j]] += 1 - c->kept[h];
        for (int64_t e = 0; e < E; e++) rate[e] *= c->kept[h];
    }
}

/* The value at z of a curve through `knots` points whose x rise, level beyond them. */
static double at(double z, const double *x, const double *y, int64_t knots) {
    if (!(z > x[0])) return y[0];
    if (z >= x[knots - 1]) return y[knots - 1];
    int64_t low = 0, high = knots - 1;
    while (high - low > 1) {
        const int64_t mid = (low + high) / 2;
        if (x[mid] <= z) low = mid;
        else high = mid;
    }
    return y[low] + (y[high] - y[low]) * ((z - x[low]) / (x[high] - x[low]));
}

/* Logarithms of products of P(e | e') / P(e) over experts e' of each source, weighted, on top of z. */
static void add_factored(const struct counts *c, int64_t n, int64_t ahead, const double *w, const double *p, double *z,
                         double *product) {
    const int64_t E = c->experts;
    for (int s = 0; s < SOURCES; s++) {
        const int64_t m = source(c, n, s);
        if ((s < BEFORE && s + 1 < ahead) || c->sizes[m] == 0) continue;
        for (int64_t e = 0; e < E; e++) product[e] = 1;
        for (int32_t i = 0; i < c->sizes[m]; i++) {
            const int64_t row = (s * c->layers + n) * E + c->used[m * E + i];
            const double each = 1 / (c->visits[row] + c->smoothed);
            const float *both = c->both + row * E;
            for (int64_t e = 0; e < E; e++) product[e] *= (both[e] / p[e] + c->smoothed) * each;
        }
        for (int64_t e = 0; e < E; e++) z[e] += w[s] * log(product[e]);
    }
}

/* Chances of the experts of layer n, `ahead` layers before it runs. Weights are of 1, the share, the rates; then of the
 * sources, if `factored`; then of what the router has named: `looked` experts, the likeliest first.
 * `room` holds 3 x experts. Returns how many have at least `least`: their numbers and chances. */
int64_t poise_chances(const struct counts *c, int64_t n, int64_t ahead, const double *w, int64_t factored, int64_t looked,
                      const int32_t *named, const double *x, const double *y, int64_t knots, double least, double *room,
                      int32_t *experts, double *chances) {
    const int64_t E = c->experts;
    double *p = room, *z = room + E, *product = room + 2 * E;
    const double alike = c->smoothed * c->k[n] / E, tokens = c->tokens[n] + c->smoothed;
    for (int64_t e = 0; e < E; e++) {
        p[e] = (c->counts[n * E + e] + alike) / tokens;
        z[e] = w[0] + w[1] * log(p[e]);
    }
    for (int h = 0; h < RATES; h++) {
        const double *rate = c->rate + (n * RATES + h) * E;
        for (int64_t e = 0; e < E; e++) z[e] += w[2 + h] * log(rate[e] + c->slow);
    }
    w += 2 + RATES;
    if (factored) {
        add_factored(c, n, ahead, w, p, z, product);
        w += SOURCES;
    }
    for (int64_t i = 0; i < looked; i++) z[named[i]] += w[0] + w[1] / (double)(i + 1);
    int64_t found = 0;
    for (int64_t e = 0; e < E; e++) {
        const double chance = at(z[e], x, y, knots);
        if (!(chance >= least)) continue;
        experts[found] = (int32_t)e;
        chances[found++] = chance;
    }
    return found;
}
