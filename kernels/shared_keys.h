/* Four queries that share their keys, forward and backward. For their products with keys that come in fours, a lane is a
 * key, of rows that a task has transposed once; else a lane is a channel, and products are summed across lanes. In sums of
 * rows a lane is a channel. Rows are given as places from the start of a map.
 */
#include "lanes.h"

#define QUERIES 4
#define KEYS_TOGETHER (LANES / QUERIES)

/* Address and strides in numbers; a head's channels lie side by side. */
typedef struct {
    int64_t data, batch, row, column, head;
} tensor;

INLINE float *at(const tensor *t, int64_t image, int64_t head) {
    return (float *)(intptr_t)t->data + image * t->batch + head * t->head;
}

/* A task of the backward pass: the rows from `first` to `end` of one head of one image, which are the `number`-th band. */
typedef struct {
    int64_t image, head, number, first, end;
} band;

/* A head's `rows` are shared out to as many `bands`, as evenly as they go. */
INLINE band band_of(int64_t task, int64_t bands, int64_t heads, int64_t rows) {
    int64_t plane = task / bands, number = task % bands, step = (rows + bands - 1) / bands;
    int64_t end = (number + 1) * step < rows ? (number + 1) * step : rows;
    return (band){.image = plane / heads, .head = plane % heads, .number = number, .first = number * step, .end = end};
}

typedef struct {
    int64_t keys, space, dim, dim_v; /* the keys, the same in whole vectors, and channels */
    const float *key, *value;
    int64_t *key_at, *value_at, *grad_key_at, *grad_value_at; /* of each key */
    float *score, *gain, *grad_key, *grad_value;              /* the first two [QUERIES][space] */
    const float *turned_key, *turned_value;                   /* what `turn_fours` makes of them, or NULL */
    const int64_t *four;                                      /* of each four of keys, which of those it is */
} shared_keys;

/* How many numbers of scratch `lay_out` shares out; addresses are two floats wide. */
INLINE int64_t scratch_of(int64_t keys) { return 8 * keys + 2 * QUERIES * (keys + LANES); }

INLINE shared_keys lay_out(float *scratch, int64_t keys, int64_t dim, int64_t dim_v) {
    int64_t *place = (int64_t *)scratch, space = (keys + LANES - 1) / LANES * LANES;
    float *score = (float *)(place + 4 * keys);
    return (shared_keys){
        .keys = keys, .space = space, .dim = dim, .dim_v = dim_v,
        .key_at = place, .value_at = place + keys, .grad_key_at = place + 2 * keys, .grad_value_at = place + 3 * keys,
        .score = score, .gain = score + QUERIES * space,
    };
}

/* The keys from one on, in the same scratch. */
INLINE shared_keys some_keys(const shared_keys *all, int64_t from, int64_t keys) {
    shared_keys some = *all;
    some.keys = keys, some.space = (keys + LANES - 1) / LANES * LANES, some.gain = some.score + QUERIES * some.space;
    some.key_at += from, some.value_at += from, some.grad_key_at += from, some.grad_value_at += from;
    if (some.four) some.four += from / 4;
    return some;
}

/* Channels that heads usually have, whose loops are unrolled. */
#define USUAL_DIM 32

INLINE void multiply_rows_of(
    const shared_keys *w, const float *const *own, const float *rows, const int64_t *place, const int64_t dim, float scale,
    float *out
) {
    for (int64_t from = 0; from < w->keys; from += KEYS_TOGETHER) {
        const float *row[KEYS_TOGETHER];
        V sums[LANES] = {0};
        EACH(n, KEYS_TOGETHER) row[n] = rows + place[from + n < w->keys ? from + n : w->keys - 1];
        for (int64_t d = 0; d < dim; d += LANES)
            EACH(n, KEYS_TOGETHER) EACH(i, QUERIES) sums[i * KEYS_TOGETHER + n] += load(own[i] + d) * load(row[n] + d);
        V product = sum_lanes(sums) * scale;
        const float *part = (const float *)&product;
        EACH(i, QUERIES) memcpy(out + i * w->space + from, part + i * KEYS_TOGETHER, KEYS_TOGETHER * sizeof(float));
    }
}

/* Whether rows had better be transposed once for each task, where a head's are shared out to as many. */
INLINE int turning_pays(int64_t tasks) { return tasks <= 4; }

/* Transpose rows in fours, each to [dim][4]. */
INLINE void turn_fours(const float *rows, const int64_t *place, int64_t fours, int64_t dim, float *out) {
    for (int64_t n = 0; n < fours; n++, place += 4)
        for (int64_t d = 0; d < dim; d += 4, out += 16)
            turn_square(rows + place[0] + d, rows + place[1] + d, rows + place[2] + d, rows + place[3] + d, out, 4);
}

#define FOURS (LANES / 4)

INLINE V load_fours(const float *const *four, int64_t d) {
#if LANES == 16
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(four[0] + d));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(four[1] + d), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(four[2] + d), 2);
    return (V)_mm512_insertf32x4(x, _mm_loadu_ps(four[3] + d), 3);
#elif defined(__AVX__)
    return (V)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(four[0] + d)), _mm_loadu_ps(four[1] + d), 1);
#else
    V x;
    EACH(i, FOURS) ((F *)&x)[i] = *(const F *)(four[i] + d);
    return x;
#endif
}

/* How many vectors of channels, or of keys, are taken together. */
#define TOGETHER 2

/* What `multiply_rows_of` does, a lane being a key: nothing is summed across lanes. */
INLINE void multiply_fours(
    const shared_keys *w, const float *const *own, const float *turned, int64_t dim, float scale, float *out
) {
    const int64_t fours = w->keys / 4;
    for (int64_t from = 0; from < fours; from += TOGETHER * FOURS) {
        const float *four[TOGETHER][FOURS];
        V sum[QUERIES][TOGETHER] = {0};
        EACH(v, TOGETHER) EACH(i, FOURS) {
            const int64_t n = from + v * FOURS + i;
            four[v][i] = turned + w->four[n < fours ? n : fours - 1] * dim * 4;
        }
        for (int64_t d = 0; d < dim; d++) {
            V key[TOGETHER];
            EACH(v, TOGETHER) key[v] = load_fours(four[v], 4 * d);
            EACH(i, QUERIES) EACH(v, TOGETHER) sum[i][v] += key[v] * own[i][d];
        }
        EACH(v, TOGETHER) if (from + v * FOURS < fours)
            EACH(i, QUERIES) store(out + i * w->space + (from + v * FOURS) * 4, sum[i][v] * scale);
    }
}

/* Products of the queries' rows with all keys', times `scale`, and `rest` behind them. */
INLINE void multiply_rows(
    const shared_keys *w, const float *const *own, const float *rows, const int64_t *place, const float *turned,
    int64_t dim, float scale, float rest, float *out
) {
    if (turned)
        multiply_fours(w, own, turned, dim, scale, out);
    else if (dim == USUAL_DIM)
        multiply_rows_of(w, own, rows, place, USUAL_DIM, scale, out);
    else
        multiply_rows_of(w, own, rows, place, dim, scale, out);
    EACH(i, QUERIES) for (int64_t n = w->keys; n < w->space; n++) out[i * w->space + n] = rest;
}

INLINE void score_rows(const shared_keys *w, const float *const *query, float scale) {
    multiply_rows(w, query, w->key, w->key_at, w->turned_key, w->dim, scale * LOG2E, -INFINITY, w->score);
}

/* Turn scores into weights, which are still to be multiplied by `factor`; `top` are the highest scores. */
INLINE void weigh_rows(const shared_keys *w, float *factor, float *top) {
    EACH(i, QUERIES) factor[i] = soften_row(w->score + i * w->space, w->keys, top + i);
}

/* Sums of the values' channels from `d` on, [QUERIES][TOGETHER]. */
INLINE void sum_rows(const shared_keys *w, int64_t d, const int vectors, V sum[QUERIES][TOGETHER]) {
    EACH(i, QUERIES) EACH(v, vectors) sum[i][v] = (V){0};
    for (int64_t n = 0; n < w->keys; n++) {
        const float *row = w->value + w->value_at[n] + d, *weight = w->score + n;
        V value[TOGETHER];
        EACH(v, vectors) value[v] = load(row + v * LANES);
        EACH(i, QUERIES) EACH(v, vectors) sum[i][v] += value[v] * weight[i * w->space];
    }
}

INLINE void spread_keys(
    const shared_keys *w, const float *const *query, float *const *grad_query, int64_t count, int64_t d, const int vectors
) {
    V sum[QUERIES][TOGETHER] = {0}, own[QUERIES][TOGETHER];
    EACH(i, QUERIES) EACH(v, vectors) own[i][v] = load(query[i] + d + v * LANES);
    for (int64_t n = 0; n < w->keys; n++) {
        const float *row = w->key + w->key_at[n] + d, *gain = w->gain + n;
        float *to = w->grad_key + w->grad_key_at[n] + d;
        V key[TOGETHER], total[TOGETHER];
        EACH(v, vectors) key[v] = load(row + v * LANES), total[v] = load(to + v * LANES);
        EACH(i, QUERIES) {
            const V by = all(gain[i * w->space]);
            EACH(v, vectors) sum[i][v] += key[v] * by, total[v] += own[i][v] * by;
        }
        EACH(v, vectors) store(to + v * LANES, total[v]);
    }
    for (int64_t i = 0; i < count; i++)
        EACH(v, vectors) store(grad_query[i] + d + v * LANES, load(grad_query[i] + d + v * LANES) + sum[i][v]);
}

INLINE void spread_values(const shared_keys *w, const float *const *grad, int64_t d, const int vectors) {
    V own[QUERIES][TOGETHER];
    EACH(i, QUERIES) EACH(v, vectors) own[i][v] = load(grad[i] + d + v * LANES);
    for (int64_t n = 0; n < w->keys; n++) {
        const float *weight = w->score + n;
        float *to = w->grad_value + w->grad_value_at[n] + d;
        V total[TOGETHER];
        EACH(v, vectors) total[v] = load(to + v * LANES);
        EACH(i, QUERIES) EACH(v, vectors) total[v] += own[i][v] * weight[i * w->space];
        EACH(v, vectors) store(to + v * LANES, total[v]);
    }
}

/* Gradients by the weights of the values, `score`, and those of the scaled products, `gain`: add the queries' parts of the
 * keys' and the values', and add the first `count` of their own. */
INLINE void spread_rows(
    const shared_keys *w, const float *const *query, const float *const *grad, float *const *grad_query, int64_t count
) {
    int64_t d = 0;
    for (; d + TOGETHER * LANES <= w->dim; d += TOGETHER * LANES) spread_keys(w, query, grad_query, count, d, TOGETHER);
    if (d < w->dim) spread_keys(w, query, grad_query, count, d, 1);
    for (d = 0; d + TOGETHER * LANES <= w->dim_v; d += TOGETHER * LANES) spread_values(w, grad, d, TOGETHER);
    if (d < w->dim_v) spread_values(w, grad, d, 1);
}
