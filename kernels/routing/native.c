/* Routed attention on CPU cores, forward and backward, float32: regions of keys are read where they lie.
 *
 * Forward in a region of many tokens a lane is one query: queries are transposed to [dim][lane], keys and values are
 * numbers that all lanes take. In a region of a few tokens lanes would be idle: there a lane is a channel, as it is
 * backward. A task is a row of regions of one head of one image; backward a band of rows, which has sums of its own.
 *
 * Nothing here knows torch.
 */
#include "../query_lanes.h"
#include "../shared_keys.h"

#define FEW (LANES * 3 / 4) /* tokens that a region needs for lanes of queries */

/* One call, as native.py packs it: eight bytes a field. */
typedef struct {
    int64_t threads, parallel, batch, height, width, heads, dim, dim_v, region_height, region_width, topk;
    double scale;
    tensor query, key, value, out;
    int64_t routes; /* int64 [batch][regions][topk] */
    int64_t lse;    /* float32 [batch][heads][height][width], log2 of the sums of 2 to the scores */
    int64_t bands;  /* of rows; 0 is the forward pass */
    tensor grad, grad_query, grad_key, grad_value;
    int64_t key_band, value_band; /* numbers from the sums of a band to the next one's */
} call;

typedef struct {
    team team;
    const call *a;
    int64_t rows, columns, tokens, keys; /* rows and columns of regions; tokens of one */
    int64_t chunks;                      /* of the rows of a head, forward */
    int turned;                          /* whether maps are transposed in fours of tokens */
} job;

INLINE float *sums_at(const call *a, int64_t image, int64_t head) {
    return (float *)(intptr_t)a->lse + (image * a->heads + head) * a->height * a->width;
}

INLINE int64_t offset(const tensor *t, int64_t row, int64_t column) { return row * t->row + column * t->column; }

/* Where the tokens of the first region lie in a map. */
INLINE void find_first_tokens(const job *j, const tensor *t, int64_t *place) {
    for (int64_t y = 0; y < j->a->region_height; y++)
        for (int64_t x = 0; x < j->a->region_width; x++) *place++ = offset(t, y, x);
}

/* Where in a map the tokens of a region lie, by those of the first one. */
INLINE void find_region(const job *j, int64_t region, const tensor *t, const int64_t *first, int64_t *place) {
    const int64_t row = region / j->columns, column = region - row * j->columns, tokens = j->tokens;
    const int64_t corner = offset(t, row * j->a->region_height, column * j->a->region_width);
    for (int64_t i = 0; i < tokens; i++) place[i] = corner + first[i];
}

INLINE void find_tokens(const job *j, const int64_t *routes, const tensor *t, const int64_t *first, int64_t *place) {
    for (int64_t k = 0; k < j->a->topk; k++) find_region(j, routes[k], t, first, place + k * j->tokens);
}

/* Which fours of the map's tokens, region by region, a region's routes have. */
INLINE void find_fours(const job *j, const int64_t *routes, int64_t *four) {
    const int64_t count = j->tokens / 4;
    for (int64_t k = 0; k < j->a->topk; k++)
        for (int64_t i = 0; i < count; i++) *four++ = routes[k] * count + i;
}

/* Transpose a map of one head in fours of tokens, region by region; `place` is room for those of a region. */
INLINE void turn_map(
    const job *j, const float *map, const tensor *t, const int64_t *first, int64_t dim, int64_t *place, float *out
) {
    for (int64_t region = 0; region < j->rows * j->columns; region++) {
        find_region(j, region, t, first, place);
        turn_fours(map, place, j->tokens / 4, dim, out + region * j->tokens * dim);
    }
}

/* A region of many tokens, whose first is at `top` and `left`. */
INLINE void attend_region(
    const job *j, const query_block *b, int64_t image, int64_t head, int64_t top, int64_t left
) {
    const call *a = j->a;
    const grid from = {a->query.row, a->query.column, a->region_width}, to = {a->out.row, a->out.column, a->region_width};
    const float *query = at(&a->query, image, head) + offset(&a->query, top, left);
    float *out = at(&a->out, image, head) + offset(&a->out, top, left), *lse = sums_at(a, image, head);
    for (int64_t first = 0; first < j->tokens; first += BLOCK) {
        const int64_t count = j->tokens - first < BLOCK ? j->tokens - first : BLOCK;
        take_queries(query, from, first, count, a->dim, b->query);
        attend_block(b, NULL, (float)a->scale, count, 0);
        put_queries(b->sums, out, to, first, count, a->dim_v);
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = top + (first + i) / a->region_width, column = left + (first + i) % a->region_width;
            lse[row * a->width + column] = b->most[i] + log2f(b->total[i]);
        }
    }
}

/* Up to four tokens of a region from the `first` on, whose number is returned; the last stands in for what is beyond. */
INLINE int64_t find_queries(const job *j, int64_t top, int64_t left, int64_t first, int64_t *row, int64_t *column) {
    const int64_t rest = j->tokens - first;
    EACH(i, QUERIES) {
        int64_t token = i < rest ? first + i : j->tokens - 1;
        row[i] = top + token / j->a->region_width, column[i] = left + token % j->a->region_width;
    }
    return rest < QUERIES ? rest : QUERIES;
}

INLINE void put_rows(
    const shared_keys *w, const float *factor, float *const *to, int64_t count, int64_t d, const int vectors
) {
    V sum[QUERIES][TOGETHER];
    sum_rows(w, d, vectors, sum);
    for (int64_t i = 0; i < count; i++) EACH(v, vectors) store(to[i] + d + v * LANES, sum[i][v] * factor[i]);
}

/* A region of a few tokens. */
INLINE void attend_small_region(
    const job *j, const shared_keys *w, int64_t image, int64_t head, int64_t top, int64_t left
) {
    const call *a = j->a;
    const float *query = at(&a->query, image, head), *q[QUERIES];
    float *out = at(&a->out, image, head), *lse = sums_at(a, image, head), factor[QUERIES], most[QUERIES];
    for (int64_t first = 0; first < j->tokens; first += QUERIES) {
        int64_t y[QUERIES], x[QUERIES], count = find_queries(j, top, left, first, y, x);
        EACH(i, QUERIES) q[i] = query + offset(&a->query, y[i], x[i]);
        score_rows(w, q, (float)a->scale);
        weigh_rows(w, factor, most);
        for (int64_t i = 0; i < count; i++) lse[y[i] * a->width + x[i]] = most[i] - log2f(factor[i]);
        float *to[QUERIES];
        EACH(i, QUERIES) to[i] = out + offset(&a->out, y[i], x[i]);
        int64_t d = 0;
        for (; d + TOGETHER * LANES <= a->dim_v; d += TOGETHER * LANES) put_rows(w, factor, to, count, d, TOGETHER);
        if (d < a->dim_v) put_rows(w, factor, to, count, d, 1);
    }
}

/* The parts of some keys, which stay in the cache while all of a region's queries pass. */
INLINE void differentiate_region(
    const job *j, const shared_keys *w, int64_t image, int64_t head, int64_t top, int64_t left
) {
    const call *a = j->a;
    const float *query = at(&a->query, image, head), *grad = at(&a->grad, image, head), *out = at(&a->out, image, head);
    const float *lse = sums_at(a, image, head), *q[QUERIES], *g[QUERIES], scale = (float)a->scale;
    float *grad_query = at(&a->grad_query, image, head), *to_query[QUERIES];
    for (int64_t first = 0; first < j->tokens; first += QUERIES) {
        int64_t y[QUERIES], x[QUERIES], count = find_queries(j, top, left, first, y, x);
        EACH(i, QUERIES) {
            q[i] = query + offset(&a->query, y[i], x[i]), g[i] = grad + offset(&a->grad, y[i], x[i]);
            to_query[i] = grad_query + offset(&a->grad_query, y[i], x[i]);
        }
        score_rows(w, q, scale);
        multiply_rows(w, g, w->value, w->value_at, w->turned_value, a->dim_v, 1, 0, w->gain);
        for (int64_t i = 0; i < QUERIES; i++) {
            float *p = w->score + i * w->space, *s = w->gain + i * w->space, mean;
            if (i >= count) { /* a query that stands in for none */
                memset(p, 0, w->space * sizeof(float)), memset(s, 0, w->space * sizeof(float));
                continue;
            }
            const float *o = out + offset(&a->out, y[i], x[i]), sum = lse[y[i] * a->width + x[i]];
            V products = {0};
            for (int64_t d = 0; d < a->dim_v; d += LANES) products += load(g[i] + d) * load(o + d);
            mean = sum_of_lanes(products);
            for (int64_t n = 0; n < w->keys; n += LANES) {
                store(p + n, power_of_2(load(p + n) - sum));
                store(s + n, load(p + n) * (load(s + n) - mean) * scale);
            }
        }
        spread_rows(w, q, g, to_query, count);
    }
}

/* Some rows of regions, of few tokens each, of one head of one image. */
INLINE void attend_small_regions(
    const job *j, int64_t image, int64_t head, int64_t from, int64_t end, const int64_t *routes, const int64_t *key_first,
    const int64_t *value_first, float *scratch
) {
    const call *a = j->a;
    shared_keys w = lay_out(scratch, j->keys, a->dim, a->dim_v);
    w.key = at(&a->key, image, head), w.value = at(&a->value, image, head);
    int64_t *four = (int64_t *)(scratch + scratch_of(j->keys));
    if (j->turned) {
        w.four = four;
        float *turned = (float *)(four + j->keys / 4);
        turn_map(j, w.key, &a->key, key_first, a->dim, w.key_at, turned);
        w.turned_key = turned;
    }
    for (int64_t row = from; row < end; row++)
        for (int64_t column = 0; column < j->columns; column++, routes += a->topk) {
            if (j->turned)
                find_fours(j, routes, four);
            else
                find_tokens(j, routes, &a->key, key_first, w.key_at);
            find_tokens(j, routes, &a->value, value_first, w.value_at);
            attend_small_region(j, &w, image, head, row * a->region_height, column * a->region_width);
        }
}

static void attend(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t plane = task / j->chunks, number = task % j->chunks, image = plane / a->heads, head = plane % a->heads;
    const int64_t from = j->rows * number / j->chunks, end = j->rows * (number + 1) / j->chunks;
    const int64_t *routes = (const int64_t *)(intptr_t)a->routes + (image * j->rows + from) * j->columns * a->topk;
    int64_t *key_first = (int64_t *)scratch, *value_first = key_first + j->tokens;
    find_first_tokens(j, &a->key, key_first), find_first_tokens(j, &a->value, value_first);
    scratch = (float *)(value_first + j->tokens);
    if (j->tokens < FEW) {
        attend_small_regions(j, image, head, from, end, routes, key_first, value_first, scratch);
        return;
    }
    query_block b = lay_out_block(scratch, j->keys, a->dim, a->dim_v);
    b.key = at(&a->key, image, head), b.value = at(&a->value, image, head);
    for (int64_t row = from; row < end; row++)
        for (int64_t column = 0; column < j->columns; column++, routes += a->topk) {
            find_tokens(j, routes, &a->key, key_first, b.key_at);
            find_tokens(j, routes, &a->value, value_first, b.value_at);
            attend_region(j, &b, image, head, row * a->region_height, column * a->region_width);
        }
}

static void differentiate(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const band b = band_of(task, a->bands, a->heads, j->rows);
    const tensor *maps[4] = {&a->key, &a->value, &a->grad_key, &a->grad_value};
    int64_t *first = (int64_t *)scratch;
    for (int64_t i = 0; i < 4; i++) find_first_tokens(j, maps[i], first + i * j->tokens);
    shared_keys all = lay_out((float *)(first + 4 * j->tokens), j->keys, a->dim, a->dim_v);
    int64_t *place[4] = {all.key_at, all.value_at, all.grad_key_at, all.grad_value_at};
    all.key = at(&a->key, b.image, b.head), all.grad_key = at(&a->grad_key, b.image, b.head) + b.number * a->key_band;
    all.value = at(&a->value, b.image, b.head);
    all.grad_value = at(&a->grad_value, b.image, b.head) + b.number * a->value_band;
    int64_t *four = (int64_t *)((float *)(first + 4 * j->tokens) + scratch_of(j->keys));
    if (j->turned) {
        all.four = four;
        float *turned = (float *)(four + j->keys / 4);
        turn_map(j, all.key, &a->key, first, a->dim, all.key_at, turned);
        all.turned_key = turned;
        turned += a->height * a->width * a->dim;
        turn_map(j, all.value, &a->value, first + j->tokens, a->dim_v, all.key_at, turned);
        all.turned_value = turned;
    }
    for (int64_t row = b.first; row < b.end; row++) {
        const int64_t *routes = (const int64_t *)(intptr_t)a->routes + (b.image * j->rows + row) * j->columns * a->topk;
        for (int64_t column = 0; column < j->columns; column++, routes += a->topk) {
            for (int64_t i = 0; i < 4; i++) find_tokens(j, routes, maps[i], first + i * j->tokens, place[i]);
            if (j->turned) find_fours(j, routes, four);
            for (int64_t from = 0; from < j->keys; from += TILE) {
                shared_keys w = some_keys(&all, from, j->keys - from < TILE ? j->keys - from : TILE);
                differentiate_region(j, &w, b.image, b.head, row * a->region_height, column * a->region_width);
            }
        }
    }
}

EXPORTED(foveate_routed)(const call *a) {
    job j = {.team.run = a->bands ? differentiate : attend, .a = a};
    j.rows = a->height / a->region_height, j.columns = a->width / a->region_width;
    j.tokens = a->region_height * a->region_width;
    j.keys = a->topk * j.tokens;
    const int small = j.tokens < FEW, backward = a->bands > 0;
    const int64_t planes = a->batch * a->heads;
    j.chunks = small ? parts_of(planes, a->threads, j.rows) : j.rows;
    j.turned = j.tokens % 4 == 0 && (backward ? turning_pays(a->bands) : small && a->topk > 1 && turning_pays(j.chunks));
    j.team.tasks = planes * (backward ? a->bands : j.chunks);
    j.team.scratch = 8 * j.tokens; /* four tables of places, two floats wide */
    j.team.scratch += small || backward ? scratch_of(j.keys) : scratch_of_block(j.keys, a->dim, a->dim_v);
    if (j.turned) j.team.scratch += j.keys / 2 + a->height * a->width * (a->dim + (backward ? a->dim_v : 0));
    return share_out(a->parallel, a->threads, &j.team);
}
