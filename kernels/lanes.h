/* Vectors of numbers, and what else the C libraries of the kernels have in common.
 *
 * A library is one file that includes this one, knows nothing of torch, and gets a call as numbers of eight bytes.
 * `setup.py` compiles it for any processor, and again for each instruction set, after which its functions are named
 * then: compilers lower comparisons of vectors before they clone a function for another set, lane by lane.
 * `neighborhood/native.c` has vectors of its own, and includes itself for each set.
 */
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inline functions alone */
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 32") for (int i = 0; i < n; i++) /* unrolled */
/* As wide as a register: of wider ones compilers take much apart, lane by lane, or keep them in memory. */
#if defined(__AVX512F__)
#define LANES 16
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define LANES 8
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#endif
#ifndef VECTORS
#define VECTORS 2 /* of queries, which are computed together; one where a row ends */
#endif
#define BLOCK (LANES * VECTORS)
#define DIMS (LANES / 2) /* channels whose sums are computed together: with two vectors of each, what registers hold */
#define LINE 64 /* bytes of a line of a cache */
#define LOG2E 1.44269504088896340736f

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define JOIN(name, isa) name##_##isa
#define NAME(name, isa) JOIN(name, isa)
#ifdef ISA
#define EXPORTED(name) EXPORT int NAME(name, ISA)
#else
#define EXPORTED(name) EXPORT int name
#endif

typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float F __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define MIX_LANES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t N __attribute__((vector_size(16)));
#define MIX(a, b, ...) __builtin_shuffle(a, b, (N){__VA_ARGS__})
#define MIX_LANES(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

INLINE V all(float x) { return (V){0} + x; }
INLINE V load(const float *x) { return *(const V *)x; }
INLINE void store(float *x, V v) { *(V *)x = v; }
INLINE V pick(I mask, V x, V other) { return (V)((mask & (I)x) | (~mask & (I)other)); }

/* The larger of two; x if it is NaN. */
INLINE V larger(V than, V x) {
#if LANES == 16
    return (V)_mm512_max_ps((__m512)than, (__m512)x);
#elif defined(__AVX__)
    return (V)_mm256_max_ps((__m256)than, (__m256)x);
#else
    return pick((I)(than > x), than, x);
#endif
}

/* 2 ** x to 1.2e-7 for x below 128, 0 for -inf, NaN for NaN; the polynomials are the minimax ones of degree 6. */
INLINE V power_of_2(V x) {
#if LANES == 16
    V r = (V)_mm512_reduce_ps((__m512)x, 0x01), y = all(0.00021702254889532924f);
    y = y * r + 0.0012439688434824347f;
    y = y * r + 0.009678840637207031f;
    y = y * r + 0.055483341217041016f;
    y = y * r + 0.24022983014583588f;
    y = y * r + 0.6931470036506653f;
    y = y * r + 1.0f;
    return (V)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
    x = larger(all(-127.0f), x); /* whose power of two is 0 */
    V n = x + all(0x1.8p23f + 127);
    V power = (V)((U)n << 23); /* the low bits of n hold the nearest integer, and an exponent's bias */
    n -= all(0x1.8p23f + 127);
    V r = x - n, y = all(0.00015345810970757157f);
    y = y * r + 0.0013399930903688073f;
    y = y * r + 0.009618489071726799f;
    y = y * r + 0.05550328642129898f;
    y = y * r + 0.24022646248340607f;
    y = y * r + 0.6931471824645996f;
    y = y * r + 1.0f;
    return y * power; /* a sum of bits would turn some NaN into numbers */
#endif
}

/* Four numbers of each of four rows, as four columns that lie `step` apart. */
INLINE void turn_square(const float *p, const float *q, const float *r, const float *s, float *to, int64_t step) {
    F a = *(const F *)p, b = *(const F *)q, c = *(const F *)r, e = *(const F *)s;
    F ab = MIX(a, b, 0, 4, 1, 5), ce = MIX(c, e, 0, 4, 1, 5), ba = MIX(a, b, 2, 6, 3, 7), ec = MIX(c, e, 2, 6, 3, 7);
    *(F *)to = MIX(ab, ce, 0, 1, 4, 5), *(F *)(to + step) = MIX(ab, ce, 2, 3, 6, 7);
    *(F *)(to + 2 * step) = MIX(ba, ec, 0, 1, 4, 5), *(F *)(to + 3 * step) = MIX(ba, ec, 2, 3, 6, 7);
}

/* Copy `count` rows of `dim` numbers to as many columns. */
INLINE void transpose(const float *x, int64_t step, float *out, int64_t out_step, int64_t count, int64_t dim) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4, x += 4 * step) {
        int64_t d = 0;
        for (; d + 4 <= dim; d += 4)
            turn_square(
                x + d, x + step + d, x + 2 * step + d, x + 3 * step + d, out + d * out_step + i, out_step
            );
        for (; d < dim; d++) EACH(k, 4) out[d * out_step + i + k] = x[k * step + d];
    }
    for (; i < count; i++, x += step)
        for (int64_t d = 0; d < dim; d++) out[d * out_step + i] = x[d];
}

/* Turn scores for base 2, [count][BLOCK], into weights beside the largest so far; what was summed before shrinks by
 * `fade`. */
INLINE void soften(float *score, int64_t count, const int vectors, float *most, float *total, float *fade) {
    EACH(v, vectors) {
        float *s = score + v * LANES;
        V before = load(most + v * LANES), top = before, sum = {0};
        for (int64_t i = 0; i < count; i++) top = larger(top, load(s + i * BLOCK));
        /* Where every score is -inf so far, any finite number serves: the weights are 0. */
        V base = pick((I)(top == all(-INFINITY)), all(0), top), factor = power_of_2(before - base);
        for (int64_t i = 0; i < count; i++) {
            V x = power_of_2(load(s + i * BLOCK) - base);
            store(s + i * BLOCK, x);
            sum += x;
        }
        store(total + v * LANES, load(total + v * LANES) * factor + sum);
        store(most + v * LANES, top);
        store(fade + v * LANES, factor);
    }
}

/* Lanes whose numbers differ in the bit `h` change places. */
INLINE V swap_lanes(V x, const int h) {
#if LANES == 16
    if (h == 8) return MIX_LANES(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if (h == 4) return MIX_LANES(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    if (h == 2) return MIX_LANES(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return MIX_LANES(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
    if (h == 4) return MIX_LANES(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    if (h == 2) return MIX_LANES(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    return MIX_LANES(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#endif
}

/* Those of `x`, but of `other` the lanes in whose numbers the bit `h` is set. */
INLINE V blend_lanes(V x, V other, const int h) {
#if LANES == 16
    const __mmask16 set = h == 8 ? 0xff00 : h == 4 ? 0xf0f0 : h == 2 ? 0xcccc : 0xaaaa;
    return (V)_mm512_mask_blend_ps(set, (__m512)x, (__m512)other);
#else
    if (h == 4) return MIX_LANES(x, other, 0, 1, 2, 3, 12, 13, 14, 15);
    if (h == 2) return MIX_LANES(x, other, 0, 1, 10, 11, 4, 5, 14, 15);
    return MIX_LANES(x, other, 0, 9, 2, 11, 4, 13, 6, 15);
#endif
}

/* Sum each of as many vectors as they have lanes: the i-th lane has the i-th sum. */
INLINE V sum_lanes(V *x) {
#define HALVE(h) EACH(i, h) x[i] = blend_lanes(x[i], x[i + h], h) + swap_lanes(blend_lanes(x[i + h], x[i], h), h);
#if LANES == 16
    HALVE(8)
#endif
    HALVE(4)
    HALVE(2)
    HALVE(1)
#undef HALVE
    return x[0];
}

INLINE float sum_of_lanes(V x) {
#if LANES == 16
    x += swap_lanes(x, 8);
#endif
    x += swap_lanes(x, 4);
    x += swap_lanes(x, 2);
    return x[0] + x[1];
}

INLINE float highest_lane(V x) {
#if LANES == 16
    x = larger(x, swap_lanes(x, 8));
#endif
    x = larger(x, swap_lanes(x, 4));
    x = larger(x, swap_lanes(x, 2));
    return x[0] > x[1] ? x[0] : x[1];
}

/* Turn the first `count` of a query's scores, in whole vectors, into weights beside that of the highest, which is `top_score`,
 * and return one over their sum. */
INLINE float soften_row(float *score, int64_t count, float *top_score) {
    const V least = all(-INFINITY);
    V most = least, sum = {0};
    for (int64_t i = count; i % LANES; i++) score[i] = -INFINITY;
    for (int64_t i = 0; i < count; i += LANES) most = larger(most, load(score + i));
    const float top = highest_lane(most);
    *top_score = top;
    for (int64_t i = 0; i < count; i += LANES) {
        V x = power_of_2(load(score + i) - top);
        store(score + i, x);
        sum += x;
    }
    return 1 / sum_of_lanes(sum);
}

/* Tasks that threads take one after the other, each thread with scratch of its own. A job begins with it. */
typedef struct team team;
struct team {
    void (*run)(const team *, int64_t task, float *scratch);
    int64_t tasks, scratch, next; /* how many, numbers of scratch, the first that nobody has taken */
    int status;
};

enum { DONE, NO_MEMORY };

static void take_tasks(void *data) {
    team *t = data;
    void *memory = malloc(t->scratch * sizeof(float) + LINE);
    if (!memory) {
        __atomic_store_n(&t->status, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    float *scratch = (float *)(((uintptr_t)memory + LINE - 1) / LINE * LINE); /* no vector in two lines of a cache */
    for (;;) {
        int64_t task = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (task >= t->tasks) break;
        t->run(t, task, scratch);
    }
    free(memory);
}

/* Into how many parts the work of each of some planes is cut, for threads to have enough to share: up to `most`. */
INLINE int64_t parts_of(int64_t planes, int64_t threads, int64_t most) {
    const int64_t wanted = planes ? (2 * threads + planes - 1) / planes : 1;
    return wanted < most ? wanted : most > 0 ? most : 1;
}

/* Do all tasks by up to so many threads. `parallel` starts a team in the caller's OpenMP, and is 0 if there is none. */
INLINE int share_out(int64_t parallel, int64_t threads, team *t) {
    if (threads > t->tasks) threads = t->tasks;
    if (parallel && threads > 1)
        ((void (*)(void (*)(void *), void *, unsigned, unsigned))(intptr_t)parallel)(take_tasks, t, (unsigned)threads, 0);
    else
        take_tasks(t);
    return t->status;
}
