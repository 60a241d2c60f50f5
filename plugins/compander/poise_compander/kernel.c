/* One optimizer step on companded weights in one pass over memory; `update.py` is the rule in words.
 *
 * Compiled without -ffast-math: NaN must come through, and a library linked with it would change how the
 * whole process rounds. Vector versions of the elementary functions are declared by hand instead.
 */
#include <math.h>
#include <stddef.h>

#pragma omp declare simd notinbranch
extern float atanf(float);
#pragma omp declare simd notinbranch
extern double atan(double);
#pragma omp declare simd notinbranch
extern float expf(float);
#pragma omp declare simd notinbranch
extern double exp(double);
#pragma omp declare simd notinbranch
extern float erff(float);
#pragma omp declare simd notinbranch
extern double erf(double);
#pragma omp declare simd notinbranch
extern float asinhf(float);
#pragma omp declare simd notinbranch
extern double asinh(double);
#pragma omp declare simd notinbranch
extern float tanhf(float);
#pragma omp declare simd notinbranch
extern double tanh(double);

enum { ARCTAN, ERF, ARSINH, TANH };
enum { ADAPTIVE = 1, DECOUPLED = 2, ON_V = 4, NESTEROV = 8, AMSGRAD = 16, FIRST = 32, MOMENTUM = 64,
       DECAY = 128 };

typedef struct {
    double a, b, a_next, b_next, lr, decay, scale, momentum, keep, beta1, beta2, eps, correct1, correct2;
} numbers;

#define ALWAYS static inline __attribute__((always_inline))

#define DEFINE(T, X, ATAN, EXP, ERF_, ASINH, TANH_, SQRT, FABS)                                            \
    ALWAYS T psi_##X(int f, T u) {                                                                         \
        return f == ARCTAN ? ATAN(u) : f == ERF ? ERF_(u) : f == ARSINH ? ASINH(u) : TANH_(u);             \
    }                                                                                                      \
    ALWAYS T slope_##X(int f, T u) {                                                                       \
        if (f == ARCTAN) return (T)1 / ((T)1 + u * u);                                                     \
        if (f == ERF) return (T)1.1283791670955126 * EXP(-u * u);                                          \
        if (f == ARSINH) return (T)1 / SQRT((T)1 + u * u);                                                 \
        T e = EXP((T)-2 * FABS(u)), s = (T)1 + e;                                                          \
        return (T)4 * e / (s * s);                                                                         \
    }                                                                                                      \
    ALWAYS void loop_##X(int f, int flags, size_t n, T *restrict W, T *restrict V, const T *restrict G,    \
                         T *restrict M, T *restrict S, T *restrict L, const numbers *k) {                  \
        const T ab = k->a / k->b, ib = 1 / k->b, an = k->a_next, ibn = 1 / k->b_next, lr = k->lr,          \
                decay = k->decay, scale = k->scale, mu = k->momentum, keep = k->keep, b1 = k->beta1,       \
                b2 = k->beta2, eps = k->eps, c1 = 1 / k->correct1, c2 = 1 / k->correct2;                   \
        const T o1 = 1 - k->beta1, o2 = 1 - k->beta2;                                                      \
        _Pragma("omp simd") for (size_t i = 0; i < n; i++) {                                               \
            T g = G[i] * scale, v = V[i], slope = ab * slope_##X(f, v * ib), move;                         \
            if (flags & ADAPTIVE) {                                                                        \
                if ((flags & DECAY) && !(flags & DECOUPLED)) g += decay * (flags & ON_V ? v / slope : W[i]); \
                T m = b1 * M[i] + o1 * g, s = b2 * S[i] + o2 * g * g;                                      \
                M[i] = m;                                                                                  \
                S[i] = s;                                                                                  \
                if (flags & AMSGRAD) L[i] = s = L[i] > s ? L[i] : s;                                       \
                move = slope * (m * c1 / (SQRT(s) * c2 + eps));                                            \
                if ((flags & DECAY) && (flags & DECOUPLED)) move += decay * (flags & ON_V ? v : slope * W[i]); \
            } else {                                                                                       \
                if ((flags & DECAY) && !(flags & ON_V)) g += decay * W[i];                                 \
                move = g * slope;                                                                          \
                if ((flags & DECAY) && (flags & ON_V)) move += decay * v;                                  \
                if (flags & MOMENTUM) {                                                                    \
                    T m = flags & FIRST ? move : mu * M[i] + keep * move;                                  \
                    M[i] = m;                                                                              \
                    move = flags & NESTEROV ? move + mu * m : m;                                           \
                }                                                                                          \
            }                                                                                              \
            v -= lr * move;                                                                                \
            V[i] = v;                                                                                      \
            W[i] = an * psi_##X(f, v * ibn);                                                               \
        }                                                                                                  \
    }

DEFINE(float, f, atanf, expf, erff, asinhf, tanhf, sqrtf, fabsf)
DEFINE(double, d, atan, exp, erf, asinh, tanh, sqrt, fabs)

/* Flags are constants inside each case, so that the loop has no branches. */
#define CASE(X, F, FLAGS) case FLAGS: loop_##X(F, FLAGS, n, W, V, G, M, S, L, k); return 0;
#define SGD(X, F, D) CASE(X, F, D) CASE(X, F, D | MOMENTUM) CASE(X, F, D | MOMENTUM | FIRST)               \
    CASE(X, F, D | MOMENTUM | NESTEROV) CASE(X, F, D | MOMENTUM | NESTEROV | FIRST)
#define ADAM(X, F, D) CASE(X, F, D | ADAPTIVE) CASE(X, F, D | ADAPTIVE | AMSGRAD)
#define ALL(X, F)                                                                                          \
    switch (flags) {                                                                                       \
        SGD(X, F, 0) SGD(X, F, DECAY) SGD(X, F, DECAY | ON_V)                                              \
        ADAM(X, F, 0) ADAM(X, F, DECAY) ADAM(X, F, DECAY | ON_V)                                           \
        ADAM(X, F, DECAY | DECOUPLED) ADAM(X, F, DECAY | DECOUPLED | ON_V)                                 \
    }                                                                                                      \
    return 1;
#define STEP(T, X)                                                                                         \
    __attribute__((noinline)) static int arctan_##X(int flags, size_t n, T *W, T *V, const T *G, T *M, T *S, T *L,        \
                          const numbers *k) { ALL(X, ARCTAN) }                                             \
    __attribute__((noinline)) static int erf_##X(int flags, size_t n, T *W, T *V, const T *G, T *M, T *S, T *L,           \
                       const numbers *k) { ALL(X, ERF) }                                                   \
    __attribute__((noinline)) static int arsinh_##X(int flags, size_t n, T *W, T *V, const T *G, T *M, T *S, T *L,        \
                          const numbers *k) { ALL(X, ARSINH) }                                             \
    __attribute__((noinline)) static int tanh_##X(int flags, size_t n, T *W, T *V, const T *G, T *M, T *S, T *L,          \
                        const numbers *k) { ALL(X, TANH) }                                                 \
    int poise_step_##X(int f, int flags, size_t n, T *W, T *V, const T *G, T *M, T *S, T *L,               \
                       const numbers *k) {                                                                 \
        if (f == ARCTAN) return arctan_##X(flags, n, W, V, G, M, S, L, k);                                 \
        if (f == ERF) return erf_##X(flags, n, W, V, G, M, S, L, k);                                       \
        if (f == ARSINH) return arsinh_##X(flags, n, W, V, G, M, S, L, k);                                 \
        return f == TANH ? tanh_##X(flags, n, W, V, G, M, S, L, k) : 1;                                    \
    }

STEP(float, f)
STEP(double, d)
