/* Attention from every position of a map to points, with a bias by their displacement, on CPU cores, float32.
 *
 * A lane is one query of a row of the map. Where a query and a point read the table of the bias is the sum of a number of
 * the point's and one of the query's, for either axis: the table's two rows around it are mixed once for a point and a
 * row of queries, and each query mixes two neighbors of the result. The softmax is online over tiles of points, so that
 * neither scores nor biases reach memory. A task is some rows of one head of one image.
 *
 * The backward pass computes the scores again. What the queries of several tasks add to the same gradient is kept apart
 * and summed by the caller, so that gradients are deterministic.
 *
 * Nothing here knows torch.
 */
#include "lanes.h"

#define POINTS 4 /* whose scores are computed together */
#define TILE 64  /* points whose scores are held at once */

/* Where an instruction picks numbers out of vectors, queries look up the table with it: so far apart at most. */
#if defined(__AVX512F__) && !defined(__clang__)
#define FARTHEST 1.9f /* a vector reads at most 1 + 15 * 1.9 numbers and the one after */
#define PICK(from, index, next) __builtin_shuffle(load(from), load(from + LANES), index + next)
#elif defined(__AVX2__) && LANES == 8
#include <immintrin.h>
#define FARTHEST 1.000001f
#define PICK(from, index, next) (V) _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + next), (__m256i)index)
#endif

/* One call, as point_attention_native.py packs it: eight bytes a field. Tensors are contiguous. */
typedef struct {
    int64_t threads, parallel, batch, height, width, heads, groups, points, dim, dim_v, table_height, table_width;
    double scale;
    int64_t query; /* [batch][height][width][heads][dim] */
    int64_t key;   /* [batch][heads][points][dim] */
    int64_t value; /* [batch][heads][points][dim_v] */
    int64_t table; /* [heads][table_height][table_width] */
    int64_t at;    /* [batch][groups][points][2]: where the first query of a point's reads the table, row and column */
    int64_t step;  /* [2]: how much further the next row and the next column do */
    int64_t out;   /* [batch][height][width][heads][dim_v] */
    int64_t lse;   /* [batch][heads][height][width], of the scores for base 2; may be 0 in the forward pass */
    int64_t bands; /* into which the rows of a plane are divided in the backward pass, where it is not 0 */
    int64_t grad_out, grad_query;            /* as out and query */
    int64_t grad_key, grad_value, grad_table; /* zeros, [bands] times those of every head of every image */
    int64_t grad_at;                          /* zeros, [bands][batch][heads][points][2] */
} call;

typedef struct {
    team team;
    const call *a;
    int64_t bands, rows;    /* rows of a band */
    int64_t lanes, line;    /* a row of queries in whole blocks, a mixed row of the table with its margins */
    int64_t pitch, pitch_v; /* a query and its gradient in whole vectors, for the backward pass */
} job;

#define LN2 0.69314718055994530942f
#define TENSOR(name) ((const float *)(intptr_t)a->name)
#define GRADIENT(name) ((float *)(intptr_t)a->name)

/* Keep `x` in [-1, size], where the table has ended; what is no number becomes -1. */
INLINE float inside(float x, float size) {
    x = x > -1 ? x : -1;
    return x < size ? x : size;
}

/* The two rows of a table around a point's place, whether they are inside (1 or 0), their shares, and the columns that
 * queries will read. */
typedef struct {
    const float *first, *second;
    int64_t upper, lower, from, to;
    float above, below, up, down;
} rows;

INLINE rows find_rows(const call *a, const float *table, const float *at, int64_t row) {
    const int64_t height = a->table_height, width = a->table_width;
    const float place = at[0] + TENSOR(step)[0] * (float)row, y = inside(place, (float)height);
    const float column = at[1], last = column + TENSOR(step)[1] * (float)(a->width - 1);
    rows r = {.upper = (int64_t)floorf(y)};
    r.lower = r.upper + 1;
    r.above = r.upper >= 0 && r.upper < height;
    r.below = r.lower < height && place >= -1;
    r.down = (y - (float)r.upper) * r.below, r.up = (1 - y + (float)r.upper) * r.above;
    if (!r.above) r.upper = 0;
    if (!r.below) r.lower = 0;
    r.first = table + r.upper * width, r.second = table + r.lower * width;
    r.from = (int64_t)inside(column < last ? column : last, (float)width);
    r.to = (int64_t)inside(column < last ? last : column, (float)width) + 2;
    if (r.from < 0) r.from = 0;
    if (r.to > width) r.to = width;
    return r;
}

/* Mix two rows for base 2: zero outside, one number before the table's columns and more than two after them. */
INLINE void mix_rows(const rows *r, int64_t width, float *line) {
    const float up = r->up * LOG2E, down = r->down * LOG2E;
    line[0] = line[width + 1] = line[width + 2] = 0;
    for (int64_t x = r->from; x < r->to; x++) line[x + 1] = up * r->first[x] + down * r->second[x];
}

/* Where a vector of queries reads a mixed row, the first of them at `x` and each other `step` further. */
INLINE V places(float x, float step) {
    const V lane = LANE_NUMBERS;
    return all(x) + lane * step;
}

INLINE int are_zero(I x) {
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= x[i];
    return bits == 0;
}

/* What is read there: two neighbors, the second one's share, and where the first one is in the line. */
typedef struct {
    V near, next, share;
    I left;
} pair;

INLINE pair read_line(const float *line, int64_t width, V place, const int permute) {
    const V size = all((float)width);
    pair p;
    place = pick((I)(place > all(-1)), place, all(-1));
    place = pick((I)(place < size), place, size) + 1; /* a line begins with its margin */
    p.left = __builtin_convertvector(place, I);       /* rounded down */
#if LANES == 8 /* by rounding the last one may read the eighth number: as the next one of the seventh */
    if (permute) p.left += p.left - p.left[0] > 7;
#endif
    p.share = place - __builtin_convertvector(p.left, V);
#if defined(FARTHEST)
    if (permute) {
        const float *from = line + p.left[0];
        I index = p.left - p.left[0];
        p.near = PICK(from, index, 0), p.next = PICK(from, index, 1);
        return p;
    }
#endif
    (void)permute;
    int32_t index[LANES];
    float near[LANES], next[LANES];
    *(I *)index = p.left;
    for (int i = 0; i < LANES; i++) near[i] = line[index[i]];
    for (int i = 0; i < LANES; i++) next[i] = line[index[i] + 1];
    p.near = load(near), p.next = load(next);
    return p;
}

/* Scores of a block of queries with some points, for base 2. */
INLINE void score_points(
    const float *query, int64_t lanes, const float *key, int64_t dim, const int points, const float *lines, int64_t line,
    int64_t width, const float *at, float step, int64_t first, const int vectors, const int permute, float *score
) {
    V s[POINTS][VECTORS];
    EACH(i, points) EACH(v, vectors) {
        V place = places(at[2 * i + 1] + step * (float)(first + v * LANES), step);
        pair p = read_line(lines + i * line, width, place, permute);
        s[i][v] = p.near + p.share * (p.next - p.near);
    }
    for (int64_t d = 0; d < dim; d++)
        EACH(i, points) EACH(v, vectors) s[i][v] += load(query + d * lanes + v * LANES) * key[i * dim + d];
    EACH(i, points) EACH(v, vectors) store(score + i * BLOCK + v * LANES, s[i][v]);
}

INLINE void sum_values(
    const float *weight, int64_t count, const float *value, int64_t dim_v, const int dims, const int vectors,
    const float *fade, float *sums, int64_t lanes
) {
    V sum[DIMS][VECTORS];
    EACH(d, dims) EACH(v, vectors) sum[d][v] = load(sums + d * lanes + v * LANES) * load(fade + v * LANES);
    for (int64_t i = 0; i < count; i++)
        EACH(d, dims) EACH(v, vectors) sum[d][v] += load(weight + i * BLOCK + v * LANES) * value[i * dim_v + d];
    EACH(d, dims) EACH(v, vectors) store(sums + d * lanes + v * LANES, sum[d][v]);
}

/* Some queries of a row: where what belongs to them lies, and the column of the first. */
typedef struct {
    const float *query, *lines;
    float *score, *most, *total, *fade, *sums;
    int64_t first;
} block;

/* Go on with a block of queries by a tile of `count` points. */
INLINE void attend_block(
    const job *j, const block *b, const float *key, const float *value, const float *at, float step, int64_t count,
    const int vectors, const int permute
) {
    const int64_t dim = j->a->dim, dim_v = j->a->dim_v, lanes = j->lanes, width = j->a->table_width;
    int64_t i = 0, d = 0;
#define SCORE(points)                                                                                              \
    score_points(                                                                                                  \
        b->query, lanes, key + i * dim, dim, points, b->lines + i * j->line, j->line, width, at + 2 * i, step,     \
        b->first, vectors, permute, b->score + i * BLOCK                                                           \
    )
    for (; i + POINTS <= count; i += POINTS) SCORE(POINTS);
    for (; i < count; i++) SCORE(1);
#undef SCORE
    soften(b->score, count, vectors, b->most, b->total, b->fade);
    for (; d + DIMS <= dim_v; d += DIMS)
        sum_values(b->score, count, value + d, dim_v, DIMS, vectors, b->fade, b->sums + d * lanes, lanes);
    for (; d < dim_v; d++)
        sum_values(b->score, count, value + d, dim_v, 1, vectors, b->fade, b->sums + d * lanes, lanes);
}

INLINE void attend(const job *j, int64_t task, float *scratch, const int permute) {
    const call *a = j->a;
    const int64_t plane = task / j->bands, band = task % j->bands, image = plane / a->heads, head = plane % a->heads;
    const int64_t group = head / (a->heads / a->groups), lanes = j->lanes, dim = a->dim, dim_v = a->dim_v;
    const int64_t begin = band * j->rows, end = begin + j->rows < a->height ? begin + j->rows : a->height;
    const float *table = TENSOR(table) + head * a->table_height * a->table_width;
    const float *at = TENSOR(at) + (image * a->groups + group) * a->points * 2;
    const float *key = TENSOR(key) + plane * a->points * dim, *value = TENSOR(value) + plane * a->points * dim_v;
    const float right = TENSOR(step)[1], scale = (float)a->scale * LOG2E;
    float *query = scratch, *sums = query + dim * lanes, *most = sums + dim_v * lanes, *total = most + lanes;
    float *lines = total + lanes, *score = lines + TILE * j->line, *fade = score + TILE * BLOCK;
    memset(query, 0, dim * lanes * sizeof(float));
    memset(lines, 0, TILE * j->line * sizeof(float));
    for (int64_t row = begin; row < end; row++) {
        int64_t place = (image * a->height + row) * a->width * a->heads + head;
        transpose(TENSOR(query) + place * dim, a->heads * dim, query, lanes, a->width, dim);
        for (int64_t i = 0; i < dim * lanes; i++) query[i] *= scale;
        memset(sums, 0, (dim_v + 2) * lanes * sizeof(float));
        for (int64_t lane = 0; lane < lanes; lane++) most[lane] = -INFINITY;
        for (int64_t from = 0; from < a->points; from += TILE) {
            int64_t count = a->points - from < TILE ? a->points - from : TILE;
            for (int64_t i = 0; i < count; i++) {
                rows r = find_rows(a, table, at + 2 * (from + i), row);
                mix_rows(&r, a->table_width, lines + i * j->line);
            }
            for (int64_t first = 0; first < a->width; first += BLOCK) {
                block b = {query + first, lines, score, most + first, total + first, fade, sums + first, first};
                if (a->width - first > LANES)
                    attend_block(j, &b, key + from * dim, value + from * dim_v, at + 2 * from, right, count, 2, permute);
                else
                    attend_block(j, &b, key + from * dim, value + from * dim_v, at + 2 * from, right, count, 1, permute);
            }
        }
        if (a->lse)
            for (int64_t x = 0; x < a->width; x++)
                GRADIENT(lse)[(plane * a->height + row) * a->width + x] = most[x] + log2f(total[x]);
        for (int64_t lane = 0; lane < lanes; lane += LANES) store(total + lane, 1 / load(total + lane));
        for (int64_t d = 0; d < dim_v; d++)
            for (int64_t lane = 0; lane < lanes; lane += LANES)
                store(sums + d * lanes + lane, load(sums + d * lanes + lane) * load(total + lane));
        float *out = (float *)(intptr_t)a->out + place * dim_v;
        transpose(sums, lanes, out, a->heads * dim_v, dim_v, a->width);
    }
}

/* Add, for some points, the sums of rows of queries, `dims` numbers each, by weights: to `out`, [points][step]. */
INLINE void sum_queries(
    const float *weight, int64_t count, const float *row, int64_t pitch, int64_t dims, const int points, float *out,
    int64_t step
) {
    V sum[POINTS][VECTORS] = {0};
    const int64_t second = dims > LANES ? LANES : 0;
    for (int64_t q = 0; q < count; q++, row += pitch)
        EACH(i, points) {
            sum[i][0] += load(row) * weight[i * BLOCK + q];
            sum[i][1] += load(row + second) * weight[i * BLOCK + q];
        }
    if (dims >= BLOCK) {
        EACH(i, points) EACH(v, VECTORS) store(out + i * step + v * LANES, load(out + i * step + v * LANES) + sum[i][v]);
        return;
    }
    for (int i = 0; i < points; i++)
        for (int64_t d = 0; d < dims; d++) out[i * step + d] += sum[i][d / LANES][d % LANES];
}

/* The same for all points of a tile and all numbers of a row. */
INLINE void sum_rows(
    const float *weight, int64_t points, int64_t count, const float *row, int64_t pitch, float *out, int64_t dim
) {
    for (int64_t d = 0; d < dim; d += BLOCK) {
        int64_t i = 0, dims = dim - d;
        for (; i + POINTS <= points; i += POINTS)
            sum_queries(weight + i * BLOCK, count, row + d, pitch, dims, POINTS, out + i * dim + d, dim);
        for (; i < points; i++)
            sum_queries(weight + i * BLOCK, count, row + d, pitch, dims, 1, out + i * dim + d, dim);
    }
}

/* Add what a vector's gradients give to a mixed row's, and return what they give to the place where it is read. */
INLINE V add_to_line(
    const float *line, int64_t width, V place, V grad, int64_t count, const int permute, float *grad_line
) {
    pair p = read_line(line, width, place, permute);
    V near = grad * (1 - p.share), next = grad * p.share, zero = {0};
    float sum = 0, sum_next = 0;
    int32_t at = p.left[0];
    const I lane = LANE_NUMBERS;
    if (count == LANES && are_zero(p.left - at - lane)) { /* each the one after, as in a table of the map's size */
        store(grad_line + at, load(grad_line + at) + near);
        store(grad_line + at + 1, load(grad_line + at + 1) + next);
        count = 0;
    }
    for (int64_t lane = 0; lane < count; lane++) { /* queries that read the same two numbers follow each other */
        if (((int32_t *)&p.left)[lane] != at) {
            grad_line[at] += sum;
            grad_line[at + 1] += sum_next;
            sum = sum_next = 0;
            at = ((int32_t *)&p.left)[lane];
        }
        sum += ((float *)&near)[lane];
        sum_next += ((float *)&next)[lane];
    }
    grad_line[at] += sum;
    grad_line[at + 1] += sum_next;
    I within = (I)(place >= all(-1)) & (I)(place < all((float)width));
    return pick(within, grad * (p.next - p.near), zero);
}

/* Give the gradient of a mixed row to the table, and return what it gives to the place where the point's row lies. */
INLINE float add_to_rows(const rows *r, const float *grad_line, int64_t width, float *grad_table) {
    float *first = grad_table + r->upper * width, *second = grad_table + r->lower * width, sum = 0;
    for (int64_t x = r->from; x < r->to; x++) {
        float grad = grad_line[x + 1];
        first[x] += r->up * grad;
        second[x] += r->down * grad;
        sum += grad * (r->below * r->second[x] - r->above * r->first[x]);
    }
    return sum;
}

/* Turn the scores of some queries and a tile into gradients of scores: `weight` holds the weights after it. */
INLINE void differentiate_scores(
    float *weight, float *grad, int64_t count, const int vectors, const float *lse, const float *delta
) {
    for (int64_t i = 0; i < count; i++)
        EACH(v, vectors) {
            V w = power_of_2(load(weight + i * BLOCK + v * LANES) - load(lse + v * LANES));
            store(weight + i * BLOCK + v * LANES, w);
            store(grad + i * BLOCK + v * LANES, w * (load(grad + i * BLOCK + v * LANES) - load(delta + v * LANES)));
        }
}

/* Products of the queries' rows, [dim][lanes], with those of some points. */
INLINE void multiply_points(
    const float *query, int64_t lanes, const float *key, int64_t dim, const int points, const int vectors, float *product
) {
    V s[POINTS][VECTORS] = {0};
    for (int64_t d = 0; d < dim; d++)
        EACH(i, points) EACH(v, vectors) s[i][v] += load(query + d * lanes + v * LANES) * key[i * dim + d];
    EACH(i, points) EACH(v, vectors) store(product + i * BLOCK + v * LANES, s[i][v]);
}

INLINE void differentiate(const job *j, int64_t task, float *scratch, const int permute) {
    const call *a = j->a;
    const int64_t plane = task / j->bands, band = task % j->bands, image = plane / a->heads, head = plane % a->heads;
    const int64_t group = head / (a->heads / a->groups), lanes = j->lanes, dim = a->dim, dim_v = a->dim_v;
    const int64_t begin = band * j->rows, end = begin + j->rows < a->height ? begin + j->rows : a->height;
    const int64_t table_size = a->table_height * a->table_width, own = band * a->batch * a->heads + plane;
    const float *table = TENSOR(table) + head * table_size, step = TENSOR(step)[1], scale = (float)a->scale;
    const float *at = TENSOR(at) + (image * a->groups + group) * a->points * 2;
    const float *key = TENSOR(key) + plane * a->points * dim, *value = TENSOR(value) + plane * a->points * dim_v;
    float *grad_key = GRADIENT(grad_key) + own * a->points * dim;
    float *grad_value = GRADIENT(grad_value) + own * a->points * dim_v;
    float *grad_table = GRADIENT(grad_table) + own * table_size, *grad_at = GRADIENT(grad_at) + own * a->points * 2;
    float *query = scratch, *grad = query + dim * lanes, *sums = grad + dim_v * lanes, *lse = sums + dim * lanes;
    float *delta = lse + lanes, *query_row = delta + lanes, *grad_row = query_row + lanes * j->pitch;
    float *lines = grad_row + lanes * j->pitch_v, *grad_lines = lines + TILE * j->line;
    float *weight = grad_lines + TILE * j->line, *ds = weight + TILE * BLOCK, *one = ds + TILE * BLOCK;
    memset(scratch, 0, j->team.scratch * sizeof(float));
    for (int64_t i = 0; i < BLOCK; i++) one[i] = 1;
    for (int64_t row = begin; row < end; row++) {
        int64_t place = (image * a->height + row) * a->width * a->heads + head;
        transpose(TENSOR(query) + place * dim, a->heads * dim, query, lanes, a->width, dim);
        transpose(TENSOR(grad_out) + place * dim_v, a->heads * dim_v, grad, lanes, a->width, dim_v);
        for (int64_t i = 0; i < dim * lanes; i++) query[i] *= scale * LOG2E;
        memset(sums, 0, dim * lanes * sizeof(float));
        for (int64_t x = 0; x < a->width; x++) {
            const float *q = TENSOR(query) + (place + x * a->heads) * dim;
            const float *g = TENSOR(grad_out) + (place + x * a->heads) * dim_v;
            const float *o = TENSOR(out) + (place + x * a->heads) * dim_v;
            delta[x] = 0;
            for (int64_t d = 0; d < dim; d++) query_row[x * j->pitch + d] = q[d] * scale;
            for (int64_t d = 0; d < dim_v; d++) grad_row[x * j->pitch_v + d] = g[d], delta[x] += g[d] * o[d];
            lse[x] = TENSOR(lse)[(plane * a->height + row) * a->width + x];
        }
        for (int64_t from = 0; from < a->points; from += TILE) {
            int64_t count = a->points - from < TILE ? a->points - from : TILE;
            const float *keys = key + from * dim, *values = value + from * dim_v, *starts = at + 2 * from;
            rows found[TILE];
            for (int64_t i = 0; i < count; i++) {
                found[i] = find_rows(a, table, starts + 2 * i, row);
                mix_rows(&found[i], a->table_width, lines + i * j->line);
            }
            memset(grad_lines, 0, TILE * j->line * sizeof(float));
            for (int64_t first = 0; first < a->width; first += BLOCK) {
                int64_t i = 0, d = 0, queries = a->width - first < BLOCK ? a->width - first : BLOCK;
                const float *q = query + first, *g = grad + first;
                for (; i + POINTS <= count; i += POINTS) {
                    score_points(
                        q, lanes, keys + i * dim, dim, POINTS, lines + i * j->line, j->line, a->table_width,
                        starts + 2 * i, step, first, VECTORS, permute, weight + i * BLOCK
                    );
                    multiply_points(g, lanes, values + i * dim_v, dim_v, POINTS, VECTORS, ds + i * BLOCK);
                }
                for (; i < count; i++) {
                    score_points(
                        q, lanes, keys + i * dim, dim, 1, lines + i * j->line, j->line, a->table_width, starts + 2 * i,
                        step, first, VECTORS, permute, weight + i * BLOCK
                    );
                    multiply_points(g, lanes, values + i * dim_v, dim_v, 1, VECTORS, ds + i * BLOCK);
                }
                differentiate_scores(weight, ds, count, VECTORS, lse + first, delta + first);
                for (; d + DIMS <= dim; d += DIMS)
                    sum_values(ds, count, keys + d, dim, DIMS, VECTORS, one, sums + first + d * lanes, lanes);
                for (; d < dim; d++)
                    sum_values(ds, count, keys + d, dim, 1, VECTORS, one, sums + first + d * lanes, lanes);
                sum_rows(ds, count, queries, query_row + first * j->pitch, j->pitch, grad_key + from * dim, dim);
                sum_rows(
                    weight, count, queries, grad_row + first * j->pitch_v, j->pitch_v, grad_value + from * dim_v, dim_v
                );
                for (i = 0; i < count; i++) {
                    V sum = {0};
                    for (int64_t v = 0; v * LANES < queries; v++) {
                        int64_t lane = first + v * LANES, rest = queries - v * LANES;
                        V lookup = places(starts[2 * i + 1] + step * (float)lane, step);
                        V part = load(ds + i * BLOCK + v * LANES);
                        rest = rest < LANES ? rest : LANES;
                        part = add_to_line(
                            lines + i * j->line, a->table_width, lookup, part, rest, permute, grad_lines + i * j->line
                        );
                        for (int64_t k = rest; k < LANES; k++) part[k] = 0;
                        sum += part;
                    }
                    float total = 0;
                    for (int k = 0; k < LANES; k++) total += sum[k];
                    grad_at[2 * (from + i) + 1] += total * LN2; /* the line is one for base 2 */
                }
            }
            for (int64_t i = 0; i < count; i++)
                grad_at[2 * (from + i)] +=
                    add_to_rows(&found[i], grad_lines + i * j->line, a->table_width, grad_table);
        }
        for (int64_t i = 0; i < dim * lanes; i++) sums[i] *= scale;
        transpose(sums, lanes, GRADIENT(grad_query) + place * dim, a->heads * dim, dim, a->width);
    }
}

static void attend_by_loads(const team *team, int64_t task, float *scratch) {
    attend((const job *)team, task, scratch, 0);
}

#if defined(FARTHEST)
static void attend_by_permutes(const team *team, int64_t task, float *scratch) {
    attend((const job *)team, task, scratch, 1);
}
#endif

static void differentiate_by_loads(const team *team, int64_t task, float *scratch) {
    differentiate((const job *)team, task, scratch, 0);
}

#if defined(FARTHEST)
static void differentiate_by_permutes(const team *team, int64_t task, float *scratch) {
    differentiate((const job *)team, task, scratch, 1);
}
#endif

EXPORTED(foveate_point_attention)(const call *a) {
    job j = {.a = a, .lanes = (a->width + BLOCK - 1) / BLOCK * BLOCK, .line = a->table_width + 2 + 2 * LANES};
    int64_t planes = a->batch * a->heads, wanted = a->bands ? a->bands : (4 * a->threads + planes - 1) / planes;
    j.rows = (a->height + wanted - 1) / wanted;
    j.bands = a->bands ? a->bands : (a->height + j.rows - 1) / j.rows;
    j.team.tasks = planes * j.bands;
    j.pitch = (a->dim + LANES - 1) / LANES * LANES;
    j.pitch_v = (a->dim_v + LANES - 1) / LANES * LANES;
    int permute = 0;
#if defined(FARTHEST)
    permute = TENSOR(step)[1] >= 0 && TENSOR(step)[1] <= FARTHEST;
    j.team.run = a->bands ? differentiate_by_permutes : attend_by_permutes;
#endif
    if (!permute) j.team.run = a->bands ? differentiate_by_loads : attend_by_loads;
    if (a->bands)
        j.team.scratch = (2 * a->dim + a->dim_v + 2 + j.pitch + j.pitch_v) * j.lanes + 2 * TILE * (j.line + BLOCK) + BLOCK;
    else
        j.team.scratch = (a->dim + a->dim_v + 2) * j.lanes + TILE * (j.line + BLOCK) + BLOCK;
    return share_out(a->parallel, a->threads, &j.team);
}
