/* A level of QuadTree attention on CPU cores, forward and backward, float32: maps are read where they lie.
 *
 * Four siblings share their candidates, which are the children of some tokens: four, two by two on the map. A task is a
 * row of parents of one head of one image; in the backward pass a band of rows, which has sums of its own.
 *
 * Nothing here knows torch.
 */
#include "../shared_keys.h"

#define SIBLINGS QUERIES

/* One call, as level.py packs it: eight bytes a field. Rows and columns are those of the parents. */
typedef struct {
    int64_t threads, parallel, batch, rows, columns, key_rows, key_columns, heads, dim, dim_v, tokens, topk;
    double scale, share;
    tensor query, key, value, parent, base, out;
    int64_t token_index; /* int64 [batch][heads][rows][columns][tokens] */
    int64_t next;        /* int64 [batch][heads][2 rows][2 columns][topk], as numbers of the keys' map */
    int64_t bands;       /* of rows; 0 is the forward pass */
    tensor grad_out, grad_query, grad_key, grad_value, grad_parent;
    int64_t key_band, value_band; /* numbers from the sums of a band to the next one's */
    int64_t grad_share;           /* double [batch * heads * bands] */
} call;

typedef struct {
    team team;
    const call *a;
    int64_t chunks; /* of the rows of a head, forward */
    int turned;     /* whether maps are transposed, the children of a token together */
} job;

/* Where the four children of a token lie, which is the `row`-th and `column`-th. */
INLINE void children(const tensor *t, int64_t row, int64_t column, int64_t *place) {
    EACH(i, SIBLINGS) place[i] = (2 * row + i / 2) * t->row + (2 * column + i % 2) * t->column;
}

/* Where the candidates lie in two maps. */
INLINE void find(
    const job *j, const int64_t *tokens, const tensor *t, const tensor *u, int64_t *place, int64_t *other
) {
    for (int64_t k = 0; k < j->a->tokens; k++) {
        const int64_t row = tokens[k] / j->a->key_columns, column = tokens[k] - row * j->a->key_columns;
        children(t, row, column, place + SIBLINGS * k), children(u, row, column, other + SIBLINGS * k);
    }
}

/* How many numbers a head's map of keys has. */
INLINE int64_t map_size(const call *a, int64_t dim) { return SIBLINGS * a->key_rows * a->key_columns * dim; }

/* Transpose a map of one head, the children of each token together, which are the fours that candidates name. */
INLINE void turn_map(const call *a, const float *map, const tensor *t, int64_t dim, float *out) {
    for (int64_t row = 0; row < a->key_rows; row++)
        for (int64_t column = 0; column < a->key_columns; column++, out += SIBLINGS * dim) {
            int64_t place[SIBLINGS];
            children(t, row, column, place);
            turn_fours(map, place, 1, dim, out);
        }
}

/* Write the numbers of the `topk` best candidates; of equal ones the first. */
INLINE void choose(const job *j, const float *score, const int64_t *tokens, int64_t *best) {
    const int64_t columns = j->a->key_columns, topk = j->a->topk, keys = SIBLINGS * j->a->tokens;
    int64_t count = 0;
    for (int64_t from = 0; from < keys; from += LANES) {
        V own = load(score + from);
        I number, better = {0};
        EACH(i, LANES) number[i] = (int32_t)from + i;
        for (int32_t n = 0; n < keys; n++) {
            V other = all(score[n]);
            better -= (I)(other > own) | ((I)(other == own) & (I)(number > n));
        }
        for (int64_t n = from; n < from + LANES && n < keys; n++) {
            if (better[n - from] >= topk || count == topk) continue; /* NaN are the best, and may be too many */
            int64_t row = 2 * (tokens[n / SIBLINGS] / columns) + n % SIBLINGS / 2;
            best[count++] = row * 2 * columns + 2 * (tokens[n / SIBLINGS] % columns) + n % 2;
        }
    }
}

INLINE void put(
    const shared_keys *w, const float *factor, const float *parent, const float *const *base, float *const *out, int64_t d,
    const int vectors
) {
    V sum[QUERIES][TOGETHER];
    sum_rows(w, d, vectors, sum);
    EACH(v, vectors) {
        const int64_t from = d + v * LANES;
        const V above = load(parent + from);
        EACH(i, SIBLINGS) store(out[i] + from, load(base[i] + from) + above + sum[i][v] * factor[i]);
    }
}

INLINE void attend_siblings(
    const job *j, const shared_keys *w, int64_t image, int64_t head, int64_t row, int64_t column, const int64_t *tokens
) {
    const call *a = j->a;
    const float *query = at(&a->query, image, head);
    const float *parent = at(&a->parent, image, head) + row * a->parent.row + column * a->parent.column;
    const float *base = at(&a->base, image, head);
    float *out = at(&a->out, image, head), factor[SIBLINGS], top[SIBLINGS];
    int64_t from[SIBLINGS], under[SIBLINGS], to[SIBLINGS];
    children(&a->query, row, column, from), children(&a->base, row, column, under), children(&a->out, row, column, to);
    const float *q[SIBLINGS];
    EACH(i, SIBLINGS) q[i] = query + from[i];
    score_rows(w, q, (float)a->scale);
    for (int64_t i = 0; a->topk && i < SIBLINGS; i++) {
        int64_t plane = image * a->heads + head, place = (plane * 2 * a->rows + 2 * row + i / 2) * 2 * a->columns;
        choose(j, w->score + i * w->space, tokens, (int64_t *)(intptr_t)a->next + (place + 2 * column + i % 2) * a->topk);
    }
    weigh_rows(w, factor, top);
    EACH(i, SIBLINGS) factor[i] *= (float)a->share;
    int64_t d = 0;
    const float *below[SIBLINGS];
    float *at_out[SIBLINGS];
    EACH(i, SIBLINGS) below[i] = base + under[i], at_out[i] = out + to[i];
    for (; d + TOGETHER * LANES <= a->dim_v; d += TOGETHER * LANES) put(w, factor, parent, below, at_out, d, TOGETHER);
    if (d < a->dim_v) put(w, factor, parent, below, at_out, d, 1);
}

static void attend(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t plane = task / j->chunks, number = task % j->chunks, image = plane / a->heads, head = plane % a->heads;
    const int64_t from = a->rows * number / j->chunks, end = a->rows * (number + 1) / j->chunks;
    const int64_t *tokens = (const int64_t *)(intptr_t)a->token_index + (plane * a->rows + from) * a->columns * a->tokens;
    shared_keys w = lay_out(scratch, SIBLINGS * a->tokens, a->dim, a->dim_v);
    w.key = at(&a->key, image, head), w.value = at(&a->value, image, head);
    if (j->turned) {
        float *turned = scratch + scratch_of(w.keys);
        turn_map(a, w.key, &a->key, a->dim, turned);
        w.turned_key = turned;
    }
    for (int64_t row = from; row < end; row++)
        for (int64_t column = 0; column < a->columns; column++, tokens += a->tokens) {
            find(j, tokens, &a->key, &a->value, w.key_at, w.value_at);
            w.four = tokens;
            attend_siblings(j, &w, image, head, row, column, tokens);
        }
}

/* Gradients of four siblings; return that of the level's share. */
INLINE double differentiate_siblings(
    const job *j, const shared_keys *w, int64_t image, int64_t head, int64_t row, int64_t column
) {
    const call *a = j->a;
    const float *query = at(&a->query, image, head), *grad = at(&a->grad_out, image, head);
    float *grad_query = at(&a->grad_query, image, head), *to_query[SIBLINGS];
    float *grad_parent = at(&a->grad_parent, image, head) + row * a->grad_parent.row + column * a->grad_parent.column;
    int64_t from[SIBLINGS], under[SIBLINGS], to[SIBLINGS];
    children(&a->query, row, column, from), children(&a->grad_out, row, column, under);
    children(&a->grad_query, row, column, to);
    const float *q[SIBLINGS], *g[SIBLINGS];
    EACH(i, SIBLINGS) q[i] = query + from[i], g[i] = grad + under[i], to_query[i] = grad_query + to[i];
    for (int64_t d = 0; d < a->dim_v; d += LANES) {
        V above = {0};
        EACH(i, SIBLINGS) above += load(g[i] + d);
        store(grad_parent + d, above);
    }
    float factor[SIBLINGS], top[SIBLINGS], share = (float)a->share;
    double shares = 0;
    score_rows(w, q, (float)a->scale);
    multiply_rows(w, g, w->value, w->value_at, w->turned_value, a->dim_v, 1, 0, w->gain);
    weigh_rows(w, factor, top);
    for (int64_t i = 0; i < SIBLINGS; i++) {
        float *p = w->score + i * w->space, *s = w->gain + i * w->space, mean;
        V sum = {0};
        for (int64_t n = 0; n < w->keys; n += LANES) {
            store(p + n, load(p + n) * factor[i]);
            sum += load(p + n) * load(s + n);
        }
        mean = sum_of_lanes(sum);
        shares += mean;
        for (int64_t n = 0; n < w->keys; n += LANES) {
            store(s + n, load(p + n) * (load(s + n) - mean) * (share * (float)a->scale));
            store(p + n, load(p + n) * share);
        }
        memset(to_query[i], 0, a->dim * sizeof(float));
    }
    spread_rows(w, q, g, to_query, SIBLINGS);
    return shares;
}

static void differentiate(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const band b = band_of(task, a->bands, a->heads, a->rows);
    shared_keys w = lay_out(scratch, SIBLINGS * a->tokens, a->dim, a->dim_v);
    w.key = at(&a->key, b.image, b.head), w.grad_key = at(&a->grad_key, b.image, b.head) + b.number * a->key_band;
    w.value = at(&a->value, b.image, b.head);
    w.grad_value = at(&a->grad_value, b.image, b.head) + b.number * a->value_band;
    if (j->turned) {
        float *turned = scratch + scratch_of(w.keys);
        turn_map(a, w.key, &a->key, a->dim, turned);
        w.turned_key = turned;
        turned += map_size(a, a->dim);
        turn_map(a, w.value, &a->value, a->dim_v, turned);
        w.turned_value = turned;
    }
    double shares = 0;
    for (int64_t row = b.first; row < b.end; row++) {
        const int64_t *tokens = (const int64_t *)(intptr_t)a->token_index;
        tokens += ((b.image * a->heads + b.head) * a->rows + row) * a->columns * a->tokens;
        for (int64_t column = 0; column < a->columns; column++, tokens += a->tokens) {
            find(j, tokens, &a->key, &a->value, w.key_at, w.value_at);
            find(j, tokens, &a->grad_key, &a->grad_value, w.grad_key_at, w.grad_value_at);
            w.four = tokens;
            shares += differentiate_siblings(j, &w, b.image, b.head, row, column);
        }
    }
    ((double *)(intptr_t)a->grad_share)[task] = shares;
}

EXPORTED(foveate_quadtree_level)(const call *a) {
    job j = {.team.run = a->bands ? differentiate : attend, .a = a};
    const int64_t planes = a->batch * a->heads;
    j.chunks = parts_of(planes, a->threads, a->rows);
    j.turned = turning_pays(a->bands ? a->bands : j.chunks);
    j.team.tasks = planes * (a->bands ? a->bands : j.chunks);
    j.team.scratch = scratch_of(SIBLINGS * a->tokens);
    if (j.turned) j.team.scratch += map_size(a, a->dim) + (a->bands ? map_size(a, a->dim_v) : 0);
    return share_out(a->parallel, a->threads, &j.team);
}
