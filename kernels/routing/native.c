/* Routed attention on CPU cores, forward and backward, float32: regions of keys are read where they lie.
 *
 * Forward in a region of many tokens a lane is one query: queries are transposed to [dim][lane], keys and values are
 * numbers that all lanes take. In a region of a few tokens lanes would be idle: there a lane is a channel, as it is
 * backward. A task is a row of regions of one head of one image; backward a band of rows, which has sums of its own.
 *
 * Nothing here knows torch.
 */
#include "../shared_keys.h"

#define KEYS 4  /* whose scores are computed together */
#define TILE 64 /* keys whose scores are held at once */
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
} job;

INLINE float *sums_at(const call *a, int64_t image, int64_t head) {
    return (float *)(intptr_t)a->lse + (image * a->heads + head) * a->height * a->width;
}

INLINE int64_t offset(const tensor *t, int64_t row, int64_t column) { return row * t->row + column * t->column; }

/* Where in two maps the keys and the values of a region's queries lie. */
INLINE void find_tokens(
    const job *j, const int64_t *routes, const tensor *t, const tensor *u, int64_t *place, int64_t *other
) {
    const tensor own = *t, second = *u; /* no memory that the places might be written to */
    const int64_t columns = j->columns, height = j->a->region_height, width = j->a->region_width, topk = j->a->topk;
    for (int64_t k = 0; k < topk; k++) {
        const int64_t row = routes[k] / columns, top = row * height, left = (routes[k] - row * columns) * width;
        for (int64_t y = top; y < top + height; y++)
            for (int64_t x = left; x < left + width; x++)
                *place++ = offset(&own, y, x), *other++ = offset(&second, y, x);
    }
}

/* Scores of a block of queries, [dim][BLOCK], with some keys. */
INLINE void score_keys(
    const float *query, const float *key, const int64_t *place, int64_t dim, const int keys, const int vectors, float *score
) {
    V s[KEYS][VECTORS] = {0};
    const float *row[KEYS];
    EACH(i, keys) row[i] = key + place[i];
    for (int64_t d = 0; d < dim; d++)
        EACH(i, keys) EACH(v, vectors) s[i][v] += load(query + d * BLOCK + v * LANES) * row[i][d];
    EACH(i, keys) EACH(v, vectors) store(score + i * BLOCK + v * LANES, s[i][v]);
}

INLINE void sum_values(
    const float *weight, int64_t count, const float *value, const int64_t *place, const int dims, const int vectors,
    const float *fade, float *sums
) {
    V sum[DIMS][VECTORS];
    EACH(d, dims) EACH(v, vectors) sum[d][v] = load(sums + d * BLOCK + v * LANES) * load(fade + v * LANES);
    for (int64_t i = 0; i < count; i++) {
        const float *row = value + place[i];
        EACH(d, dims) EACH(v, vectors) sum[d][v] += load(weight + i * BLOCK + v * LANES) * row[d];
    }
    EACH(d, dims) EACH(v, vectors) store(sums + d * BLOCK + v * LANES, sum[d][v]);
}

/* What a task works with. */
typedef struct {
    const float *key, *value;
    int64_t *key_at, *value_at;
    float *query, *score, *sums, *most, *total, *fade;
} work_space;

/* The queries of a block, which are transposed already, over all keys. */
INLINE void attend_block(const job *j, const work_space *w, const int vectors) {
    const int64_t dim = j->a->dim, dim_v = j->a->dim_v;
    memset(w->sums, 0, dim_v * BLOCK * sizeof(float));
    for (int64_t lane = 0; lane < BLOCK; lane++) w->most[lane] = -INFINITY, w->total[lane] = 0;
    for (int64_t from = 0; from < j->keys; from += TILE) {
        int64_t count = j->keys - from < TILE ? j->keys - from : TILE, i = 0;
        for (; i + KEYS <= count; i += KEYS)
            score_keys(w->query, w->key, w->key_at + from + i, dim, KEYS, vectors, w->score + i * BLOCK);
        for (; i < count; i++)
            score_keys(w->query, w->key, w->key_at + from + i, dim, 1, vectors, w->score + i * BLOCK);
        soften(w->score, count, vectors, w->most, w->total, w->fade);
        for (int64_t d = 0; d < dim_v; d += DIMS)
            sum_values(w->score, count, w->value + d, w->value_at + from, DIMS, vectors, w->fade, w->sums + d * BLOCK);
    }
    EACH(v, vectors) {
        V factor = 1 / load(w->total + v * LANES);
        for (int64_t d = 0; d < dim_v; d++)
            store(w->sums + d * BLOCK + v * LANES, load(w->sums + d * BLOCK + v * LANES) * factor);
    }
}

/* A region of many tokens, whose first is at `top` and `left`. */
INLINE void attend_region(
    const job *j, const work_space *w, int64_t image, int64_t head, int64_t top, int64_t left
) {
    const call *a = j->a;
    const float *query = at(&a->query, image, head), scale = (float)a->scale * LOG2E;
    float *out = at(&a->out, image, head), *lse = sums_at(a, image, head);
    for (int64_t first = 0; first < j->tokens; first += BLOCK) {
        int64_t count = j->tokens - first < BLOCK ? j->tokens - first : BLOCK;
        for (int64_t pass = 0; pass < 2; pass++) {
            for (int64_t lane = 0, run; lane < count; lane += run) { /* of tokens side by side */
                int64_t y = (first + lane) / a->region_width, x = (first + lane) % a->region_width;
                run = a->region_width - x < count - lane ? a->region_width - x : count - lane;
                if (pass == 0) {
                    transpose(
                        query + offset(&a->query, top + y, left + x), a->query.column, w->query + lane, BLOCK, run, a->dim
                    );
                    continue;
                }
                transpose(w->sums + lane, BLOCK, out + offset(&a->out, top + y, left + x), a->out.column, a->dim_v, run);
                for (int64_t i = lane; i < lane + run; i++)
                    lse[(top + y) * a->width + left + x + i - lane] = w->most[i] + log2f(w->total[i]);
            }
            if (pass == 1) break;
            for (int64_t i = 0; i < a->dim * BLOCK; i++) w->query[i] *= scale;
            if (count > LANES)
                attend_block(j, w, 2);
            else
                attend_block(j, w, 1);
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
        multiply_rows(w, g, w->value, w->value_at, a->dim_v, 1, 0, w->gain);
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

static void attend(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t plane = task / j->rows, row = task % j->rows, image = plane / a->heads, head = plane % a->heads;
    const int64_t *routes = (const int64_t *)(intptr_t)a->routes + (image * j->rows + row) * j->columns * a->topk;
    const int small = j->tokens < FEW;
    shared_keys few = lay_out(scratch, j->keys, a->dim, a->dim_v);
    few.key = at(&a->key, image, head), few.value = at(&a->value, image, head);
    work_space w = {.key = few.key, .value = few.value, .key_at = few.key_at, .value_at = few.value_at};
    w.score = (float *)(w.value_at + j->keys), w.query = w.score + TILE * BLOCK, w.sums = w.query + a->dim * BLOCK;
    w.most = w.sums + a->dim_v * BLOCK, w.total = w.most + BLOCK, w.fade = w.total + BLOCK;
    memset(w.query, 0, small ? 0 : a->dim * BLOCK * sizeof(float));
    for (int64_t column = 0; column < j->columns; column++, routes += a->topk) {
        find_tokens(j, routes, &a->key, &a->value, w.key_at, w.value_at);
        if (small)
            attend_small_region(j, &few, image, head, row * a->region_height, column * a->region_width);
        else
            attend_region(j, &w, image, head, row * a->region_height, column * a->region_width);
    }
}

static void differentiate(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const band b = band_of(task, a->bands, a->heads, j->rows);
    shared_keys all = lay_out(scratch, j->keys, a->dim, a->dim_v);
    all.key = at(&a->key, b.image, b.head), all.grad_key = at(&a->grad_key, b.image, b.head) + b.number * a->key_band;
    all.value = at(&a->value, b.image, b.head);
    all.grad_value = at(&a->grad_value, b.image, b.head) + b.number * a->value_band;
    for (int64_t row = b.first; row < b.end; row++) {
        const int64_t *routes = (const int64_t *)(intptr_t)a->routes + (b.image * j->rows + row) * j->columns * a->topk;
        for (int64_t column = 0; column < j->columns; column++, routes += a->topk) {
            find_tokens(j, routes, &a->key, &a->value, all.key_at, all.value_at);
            find_tokens(j, routes, &a->grad_key, &a->grad_value, all.grad_key_at, all.grad_value_at);
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
    j.team.tasks = a->batch * a->heads * (a->bands ? a->bands : j.rows);
    j.team.scratch = scratch_of(j.keys);
    if (!a->bands && j.tokens >= FEW) j.team.scratch = 4 * j.keys + (TILE + a->dim + a->dim_v + 3) * BLOCK;
    return share_out(a->parallel, a->threads, &j.team);
}
