/* A level of QuadTree attention on CPU cores, forward and backward, float32: maps are read where they lie.
 *
 * Four siblings share their candidates, which are the children of some tokens: four, two by two on the map. A lane is a
 * channel, and the products of four queries with four keys are summed across lanes together. A task is a row of parents
 * of one head of one image; in the backward pass a band of rows, which has sums of its own.
 *
 * Nothing here knows torch.
 */
#include "../lanes.h"

#define SIBLINGS 4

/* Address and strides in numbers; a head's channels lie side by side. */
typedef struct {
    int64_t data, batch, row, column, head;
} tensor;

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
    int64_t keys, space; /* candidates, and the same in whole vectors */
} job;

INLINE float *at(const tensor *t, int64_t image, int64_t head) {
    return (float *)(intptr_t)t->data + image * t->batch + head * t->head;
}

/* Where the four children of a token lie, which is the `row`-th and `column`-th. */
INLINE void children(const tensor *t, int64_t row, int64_t column, int64_t *place) {
    EACH(i, SIBLINGS) place[i] = (2 * row + i / 2) * t->row + (2 * column + i % 2) * t->column;
}

INLINE void find(const job *j, const tensor *t, const int64_t *tokens, int64_t *place) {
    for (int64_t k = 0; k < j->a->tokens; k++)
        children(t, tokens[k] / j->a->key_columns, tokens[k] % j->a->key_columns, place + SIBLINGS * k);
}

/* Products of the siblings' rows with those of all candidates, [sibling][space], times `scale`. */
INLINE void multiply(
    const float *const *siblings, const float *rows, const int64_t *place, const job *j, int64_t dim, float scale, float *out
) {
    for (int64_t from = 0; from < j->keys; from += SIBLINGS) {
        const float *row[SIBLINGS];
        V sums[SIBLINGS * SIBLINGS] = {0};
        EACH(i, SIBLINGS) row[i] = rows + place[from + i];
        for (int64_t d = 0; d < dim; d += LANES)
            EACH(i, SIBLINGS) EACH(n, SIBLINGS) sums[i * SIBLINGS + n] += load(siblings[i] + d) * load(row[n] + d);
        V product = sum_lanes(sums) * scale;
        EACH(i, SIBLINGS) *(F *)(out + i * j->space + from) = ((F *)&product)[i];
    }
}

/* Write the numbers of the `topk` best candidates; of equal ones the first. */
INLINE void choose(const job *j, const float *score, const int64_t *tokens, int64_t *best) {
    const int64_t columns = j->a->key_columns, topk = j->a->topk;
    int64_t count = 0;
    for (int64_t from = 0; from < j->keys; from += LANES) {
        V own = load(score + from);
        I number, better = {0};
        EACH(i, LANES) number[i] = (int32_t)from + i;
        for (int32_t n = 0; n < j->keys; n++) {
            V other = all(score[n]);
            better -= (I)(other > own) | ((I)(other == own) & (I)(number > n));
        }
        for (int64_t n = from; n < from + LANES && n < j->keys; n++) {
            if (better[n - from] >= topk || count == topk) continue; /* NaN are the best, and may be too many */
            int64_t row = 2 * (tokens[n / SIBLINGS] / columns) + n % SIBLINGS / 2;
            best[count++] = row * 2 * columns + 2 * (tokens[n / SIBLINGS] % columns) + n % 2;
        }
    }
}

/* What a task works with. */
typedef struct {
    int64_t *key_at, *value_at, *grad_key_at, *grad_value_at;
    float *score, *gain;
} work_space;

INLINE work_space share_scratch(const job *j, float *scratch) {
    int64_t *place = (int64_t *)scratch;
    float *score = (float *)(place + 4 * j->keys);
    return (work_space){
        place, place + j->keys, place + 2 * j->keys, place + 3 * j->keys, score, score + SIBLINGS * j->space
    };
}

/* The siblings' weights, before they are divided by their sums, one over which is `factor`. */
INLINE void weigh_candidates(const job *j, const work_space *w, float *factor) {
    EACH(i, SIBLINGS) factor[i] = soften_row(w->score + i * j->space, j->keys);
}

INLINE void attend_siblings(
    const job *j, const work_space *w, int64_t image, int64_t head, int64_t row, int64_t column, const int64_t *tokens
) {
    const call *a = j->a;
    const float *query = at(&a->query, image, head), *value = at(&a->value, image, head);
    const float *parent = at(&a->parent, image, head) + row * a->parent.row + column * a->parent.column;
    const float *base = at(&a->base, image, head);
    float *out = at(&a->out, image, head), factor[SIBLINGS];
    int64_t from[SIBLINGS], under[SIBLINGS], to[SIBLINGS];
    children(&a->query, row, column, from), children(&a->base, row, column, under), children(&a->out, row, column, to);
    const float *q[SIBLINGS];
    EACH(i, SIBLINGS) q[i] = query + from[i];
    multiply(q, at(&a->key, image, head), w->key_at, j, a->dim, (float)a->scale * LOG2E, w->score);
    for (int64_t i = 0; i < SIBLINGS; i++) {
        float *score = w->score + i * j->space;
        for (int64_t n = j->keys; n < j->space; n++) score[n] = -INFINITY;
        if (!a->topk) continue;
        int64_t plane = image * a->heads + head, place = (plane * 2 * a->rows + 2 * row + i / 2) * 2 * a->columns;
        choose(j, score, tokens, (int64_t *)(intptr_t)a->next + (place + 2 * column + i % 2) * a->topk);
    }
    weigh_candidates(j, w, factor);
    EACH(i, SIBLINGS) factor[i] *= (float)a->share;
    for (int64_t d = 0; d < a->dim_v; d += LANES) {
        V sum[SIBLINGS] = {0}, above = load(parent + d);
        for (int64_t n = 0; n < j->keys; n++) {
            V v = load(value + w->value_at[n] + d);
            EACH(i, SIBLINGS) sum[i] += v * w->score[i * j->space + n];
        }
        EACH(i, SIBLINGS) store(out + to[i] + d, load(base + under[i] + d) + above + sum[i] * factor[i]);
    }
}

CLONES static void attend(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t plane = task / a->rows, row = task % a->rows;
    const int64_t *tokens = (const int64_t *)(intptr_t)a->token_index + task * a->columns * a->tokens;
    work_space w = share_scratch(j, scratch);
    for (int64_t column = 0; column < a->columns; column++, tokens += a->tokens) {
        find(j, &a->key, tokens, w.key_at);
        find(j, &a->value, tokens, w.value_at);
        attend_siblings(j, &w, plane / a->heads, plane % a->heads, row, column, tokens);
    }
}

/* Gradients of four siblings; return that of the level's share. */
INLINE double differentiate_siblings(
    const job *j, const work_space *w, int64_t image, int64_t head, int64_t row, int64_t column, int64_t band
) {
    const call *a = j->a;
    const float *query = at(&a->query, image, head), *grad = at(&a->grad_out, image, head);
    const float *key = at(&a->key, image, head), *value = at(&a->value, image, head);
    float *grad_query = at(&a->grad_query, image, head);
    float *grad_key = at(&a->grad_key, image, head) + band * a->key_band;
    float *grad_value = at(&a->grad_value, image, head) + band * a->value_band;
    float *grad_parent = at(&a->grad_parent, image, head) + row * a->grad_parent.row + column * a->grad_parent.column;
    int64_t from[SIBLINGS], under[SIBLINGS], to[SIBLINGS];
    children(&a->query, row, column, from), children(&a->grad_out, row, column, under);
    children(&a->grad_query, row, column, to);
    const float *q[SIBLINGS], *g[SIBLINGS];
    EACH(i, SIBLINGS) q[i] = query + from[i], g[i] = grad + under[i];
    float *score = w->score, *gain = w->gain, factor[SIBLINGS], share = (float)a->share;
    multiply(q, key, w->key_at, j, a->dim, (float)a->scale * LOG2E, score);
    multiply(g, value, w->value_at, j, a->dim_v, 1, gain);
    for (int64_t i = 0; i < SIBLINGS; i++)
        for (int64_t n = j->keys; n < j->space; n++) score[i * j->space + n] = -INFINITY, gain[i * j->space + n] = 0;
    weigh_candidates(j, w, factor);
    double shares = 0;
    for (int64_t i = 0; i < SIBLINGS; i++) {
        float *p = score + i * j->space, *s = gain + i * j->space, mean = 0;
        V sum = {0};
        for (int64_t n = 0; n < j->keys; n += LANES) {
            store(p + n, load(p + n) * factor[i]);
            sum += load(p + n) * load(s + n);
        }
        EACH(k, LANES) mean += sum[k];
        shares += mean;
        for (int64_t n = 0; n < j->keys; n += LANES) {
            store(s + n, load(p + n) * (load(s + n) - mean) * (share * (float)a->scale));
            store(p + n, load(p + n) * share);
        }
    }
    for (int64_t d = 0; d < a->dim; d += LANES) {
        V sum[SIBLINGS] = {0}, own[SIBLINGS];
        EACH(i, SIBLINGS) own[i] = load(q[i] + d);
        for (int64_t n = 0; n < j->keys; n++) {
            float *to_key = grad_key + w->grad_key_at[n] + d;
            V k = load(key + w->key_at[n] + d), total = load(to_key);
            EACH(i, SIBLINGS) sum[i] += k * gain[i * j->space + n], total += own[i] * gain[i * j->space + n];
            store(to_key, total);
        }
        EACH(i, SIBLINGS) store(grad_query + to[i] + d, sum[i]);
    }
    for (int64_t d = 0; d < a->dim_v; d += LANES) {
        V own[SIBLINGS], above = {0};
        EACH(i, SIBLINGS) own[i] = load(g[i] + d), above += own[i];
        store(grad_parent + d, above);
        for (int64_t n = 0; n < j->keys; n++) {
            float *to_value = grad_value + w->grad_value_at[n] + d;
            V total = load(to_value);
            EACH(i, SIBLINGS) total += own[i] * score[i * j->space + n];
            store(to_value, total);
        }
    }
    return shares;
}

CLONES static void differentiate(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t plane = task / a->bands, band = task % a->bands, step = (a->rows + a->bands - 1) / a->bands;
    const int64_t end = (band + 1) * step < a->rows ? (band + 1) * step : a->rows;
    work_space w = share_scratch(j, scratch);
    double shares = 0;
    for (int64_t row = band * step; row < end; row++) {
        const int64_t *tokens = (const int64_t *)(intptr_t)a->token_index;
        tokens += (plane * a->rows + row) * a->columns * a->tokens;
        for (int64_t column = 0; column < a->columns; column++, tokens += a->tokens) {
            find(j, &a->key, tokens, w.key_at);
            find(j, &a->value, tokens, w.value_at);
            find(j, &a->grad_key, tokens, w.grad_key_at);
            find(j, &a->grad_value, tokens, w.grad_value_at);
            shares += differentiate_siblings(j, &w, plane / a->heads, plane % a->heads, row, column, band);
        }
    }
    ((double *)(intptr_t)a->grad_share)[task] = shares;
}

EXPORT int foveate_quadtree_level(const call *a) {
    job j = {.team.run = a->bands ? differentiate : attend, .a = a, .keys = SIBLINGS * a->tokens};
    j.space = (j.keys + LANES - 1) / LANES * LANES;
    j.team.tasks = a->batch * a->heads * (a->bands ? a->bands : a->rows);
    j.team.scratch = 8 * j.keys + 2 * SIBLINGS * j.space; /* addresses are two floats wide */
    return share_out(a->parallel, a->threads, &j.team);
}
