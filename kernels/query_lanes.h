/* Attention with a query in each lane, forward: queries lie transposed, [dim][BLOCK], and all of them see the same keys,
 * whose numbers every lane takes. Keys and values are given as places from the start of a map.
 */
#define VECTORS 3
#include "lanes.h"

#define TILE 64 /* keys whose scores are held at once */
/* With how many keys, and for how many channels, so many vectors of queries are computed together: what registers hold. */
#if LANES == 16
#define KEYS(vectors) 8
#define CHANNELS(vectors) 8
#else
#define KEYS(vectors) ((vectors) == 3 ? 4 : (vectors) == 2 ? 6 : 8)
#define CHANNELS(vectors) ((vectors) == 1 ? 8 : 4)
#endif
#define MOST_KEYS 8
#define LAST_KEYS 4 /* at the end of a tile, where the last one stands in for what is beyond */

/* What is added to the scores: of a block's first query, and how far it is to the next query's and the next key's. */
typedef struct {
    const float *data;
    int64_t query, key;
} score_bias;

typedef struct {
    int64_t keys, dim, dim_v;
    const float *key, *value;
    int64_t *key_at, *value_at; /* of each key */
    float *query, *score, *sums, *most, *total, *fade; /* [dim] blocks, [TILE] and more, [dim_v], and one of each */
} query_block;

/* How many numbers of scratch `lay_out_block` shares out; addresses are two floats wide. */
INLINE int64_t scratch_of_block(int64_t keys, int64_t dim, int64_t dim_v) {
    return 4 * keys + (TILE + MOST_KEYS + dim + dim_v + 3) * BLOCK;
}

INLINE query_block lay_out_block(float *scratch, int64_t keys, int64_t dim, int64_t dim_v) {
    query_block b = {.keys = keys, .dim = dim, .dim_v = dim_v, .key_at = (int64_t *)scratch};
    b.value_at = b.key_at + keys, b.score = (float *)(b.value_at + keys), b.query = b.score + (TILE + MOST_KEYS) * BLOCK;
    b.sums = b.query + dim * BLOCK, b.most = b.sums + dim_v * BLOCK, b.total = b.most + BLOCK;
    b.fade = b.total + BLOCK;
    memset(b.query, 0, dim * BLOCK * sizeof(float)); /* lanes that no query takes */
    return b;
}

/* Rows of tokens that lie `row` and `column` numbers apart; `width` are side by side. */
typedef struct {
    int64_t row, column, width;
} grid;

/* Copy `count` tokens from the `first` on to lanes, or back. */
INLINE void take_queries(const float *x, grid g, int64_t first, int64_t count, int64_t dim, float *lanes) {
    for (int64_t lane = 0, run; lane < count; lane += run) {
        int64_t at = first + lane, rest = g.width - at % g.width;
        run = rest < count - lane ? rest : count - lane;
        transpose(x + at / g.width * g.row + at % g.width * g.column, g.column, lanes + lane, BLOCK, run, dim);
    }
}

INLINE void put_queries(const float *lanes, float *x, grid g, int64_t first, int64_t count, int64_t dim) {
    for (int64_t lane = 0, run; lane < count; lane += run) {
        int64_t at = first + lane, rest = g.width - at % g.width;
        run = rest < count - lane ? rest : count - lane;
        transpose(lanes + lane, BLOCK, x + at / g.width * g.row + at % g.width * g.column, g.column, dim, run);
    }
}

/* Scores of a block of queries with some keys, of which there are `keys`, on top of what is there if `begun`. */
INLINE void score_keys(
    const float *query, const float *key, const int64_t *place, int64_t dim, int64_t keys, const int together,
    const int vectors, const int begun, float *score
) {
    V s[MOST_KEYS][VECTORS];
    const float *row[MOST_KEYS];
    EACH(i, together) row[i] = key + place[i < keys ? i : keys - 1];
    EACH(i, together) EACH(v, vectors) s[i][v] = begun ? load(score + i * BLOCK + v * LANES) : all(0);
    for (int64_t d = 0; d < dim; d++)
        EACH(i, together) EACH(v, vectors) s[i][v] += load(query + d * BLOCK + v * LANES) * row[i][d];
    EACH(i, together) EACH(v, vectors) store(score + i * BLOCK + v * LANES, s[i][v]);
}

/* Begin the scores of `count` queries with `keys` keys by what is added to them, for base 2. */
INLINE void begin_scores(const score_bias *bias, int64_t from, int64_t keys, int64_t count, float *score) {
    const float *x = bias->data + from * bias->key;
    if (count < BLOCK) memset(score, 0, keys * BLOCK * sizeof(float)); /* what was there might be slow to compute with */
    if (bias->query == 1)
        for (int64_t i = 0; i < keys; i++) memcpy(score + i * BLOCK, x + i * bias->key, count * sizeof(float));
    else
        transpose(x, bias->query, score, BLOCK, count, keys); /* whose keys lie side by side */
    for (int64_t i = 0; i < keys * BLOCK; i += LANES) store(score + i, load(score + i) * LOG2E);
}

INLINE void sum_values(
    const float *weight, int64_t count, const float *value, const int64_t *place, const int channels, const int vectors,
    const float *fade, float *sums
) {
    V sum[8][VECTORS];
    EACH(d, channels) EACH(v, vectors) sum[d][v] = load(sums + d * BLOCK + v * LANES) * load(fade + v * LANES);
    for (int64_t i = 0; i < count; i++) {
        const float *row = value + place[i];
        EACH(d, channels) EACH(v, vectors) sum[d][v] += load(weight + i * BLOCK + v * LANES) * row[d];
    }
    EACH(d, channels) EACH(v, vectors) store(sums + d * BLOCK + v * LANES, sum[d][v]);
}

/* Attend with the first `count` queries of a block, which are scaled for base 2, to all keys. */
INLINE void attend_vectors(
    const query_block *b, const score_bias *bias, int64_t count, const int vectors, const int biased
) {
    const int together = KEYS(vectors), channels = CHANNELS(vectors);
    memset(b->sums, 0, b->dim_v * BLOCK * sizeof(float));
    for (int64_t lane = 0; lane < BLOCK; lane++) b->most[lane] = -INFINITY, b->total[lane] = 0;
    for (int64_t from = 0; from < b->keys; from += TILE) {
        const int64_t keys = b->keys - from < TILE ? b->keys - from : TILE, *key_at = b->key_at + from;
        int64_t i = 0;
        if (biased) begin_scores(bias, from, keys, count, b->score);
        for (; i + together <= keys; i += together)
            score_keys(
                b->query, b->key, key_at + i, b->dim, together, together, vectors, biased, b->score + i * BLOCK
            );
        for (; i < keys; i += LAST_KEYS)
            score_keys(
                b->query, b->key, key_at + i, b->dim, keys - i, LAST_KEYS, vectors, biased, b->score + i * BLOCK
            );
        soften(b->score, keys, vectors, b->most, b->total, b->fade);
        for (int64_t d = 0; d < b->dim_v; d += channels)
            sum_values(
                b->score, keys, b->value + d, b->value_at + from, channels, vectors, b->fade, b->sums + d * BLOCK
            );
    }
    EACH(v, vectors) {
        V total = load(b->total + v * LANES), factor = pick((I)(total == all(0)), all(0), 1 / total);
        for (int64_t d = 0; d < b->dim_v; d++)
            store(b->sums + d * BLOCK + v * LANES, load(b->sums + d * BLOCK + v * LANES) * factor);
    }
}

INLINE void attend_block(
    const query_block *b, const score_bias *bias, float scale, int64_t count, const int biased
) {
    for (int64_t i = 0; i < b->dim * BLOCK; i += LANES) store(b->query + i, load(b->query + i) * (scale * LOG2E));
    if (count > 2 * LANES)
        attend_vectors(b, bias, count, 3, biased);
    else if (count > LANES)
        attend_vectors(b, bias, count, 2, biased);
    else
        attend_vectors(b, bias, count, 1, biased);
}
