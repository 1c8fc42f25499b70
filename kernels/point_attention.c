/* Attention from every position of a map to points, with a bias by their displacement, on CPU cores, forward, float32.
 *
 * A lane is one query of a row of the map. Where a query and a point read the table of the bias is the sum of a number of
 * the point's and one of the query's, for either axis: the table's two rows around it are mixed once for a point and a
 * row of queries, and each query mixes two neighbors of the result. The softmax is online over tiles of points, so that
 * neither scores nor biases reach memory. A task is some rows of one head of one image.
 *
 * Nothing here knows torch.
 */
#include <stdlib.h>

#include "lanes.h"

#define VECTORS 2 /* of queries, which are computed together; one where a row ends */
#define BLOCK (LANES * VECTORS)
#define POINTS 4 /* whose scores are computed together */
#define DIMS 8   /* whose sums are computed together */
#define TILE 64  /* points whose scores are held at once */

/* Where an instruction picks numbers out of two vectors, queries look up the table with it. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PERMUTES __attribute__((target("avx512f")))
#endif

enum { DONE, NO_MEMORY };

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
} call;

typedef struct job job;
struct job {
    const call *a;
    int64_t next, tasks, bands, rows; /* rows of a band */
    int64_t lanes, line, scratch;     /* a row of queries in whole blocks, a mixed row of the table with its margins */
    void (*attend)(const job *, int64_t, float *);
    int status;
};

#define TENSOR(name) ((const float *)(intptr_t)a->name)

/* Keep `x` in [-1, size], where the table has ended; what is no number becomes -1. */
INLINE float inside(float x, float size) {
    x = x > -1 ? x : -1;
    return x < size ? x : size;
}

/* Mix the rows of a table around a point's place, for base 2, where a row of `count` queries will read the result: zero
 * outside, with one number before the table's columns and more than two after them. */
INLINE void mix_rows(const call *a, const float *table, float row, float column, float step, int64_t count, float *line) {
    const int64_t height = a->table_height, width = a->table_width;
    float y = inside(row, (float)height), last = column + step * (float)(count - 1);
    int64_t upper = (int64_t)floorf(y), lower = upper + 1;
    int64_t from = (int64_t)inside(column < last ? column : last, (float)width);
    int64_t to = (int64_t)inside(column < last ? last : column, (float)width) + 2;
    float down = y - (float)upper, up = 1 - down;
    up = upper >= 0 && upper < height ? up * LOG2E : 0;
    down = lower < height ? down * LOG2E : 0;
    const float *first = table + (up != 0 ? upper : 0) * width, *second = table + (down != 0 ? lower : 0) * width;
    line[0] = line[width + 1] = line[width + 2] = 0;
    if (from < 0) from = 0;
    if (to > width) to = width;
    for (int64_t x = from; x < to; x++) line[x + 1] = up * first[x] + down * second[x];
}

/* The bias of a vector of queries, the first of which reads a mixed row at `x`, and each other `step` further. */
INLINE V read_line(const float *line, int64_t width, float x, float step, const int permute) {
    const V size = all((float)width), lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    V place = all(x) + lane * step;
    place = pick((I)(place > all(-1)), place, all(-1));
    place = pick((I)(place < size), place, size);
    I left = __builtin_convertvector(place + 1, I); /* rounded down, of a line that begins with its margin */
    V share = place + 1 - __builtin_convertvector(left, V), near, next;
#if defined(PERMUTES)
    if (permute) { /* all that is read lies in two vectors */
        const float *from = line + left[0];
        I index = left - left[0];
        near = __builtin_shuffle(load(from), load(from + LANES), index);
        next = __builtin_shuffle(load(from), load(from + LANES), index + 1);
        return near + share * (next - near);
    }
#endif
    (void)permute;
    int32_t index[LANES];
    *(I *)index = left;
    for (int i = 0; i < LANES; i++) ((float *)&near)[i] = line[index[i]];
    for (int i = 0; i < LANES; i++) ((float *)&next)[i] = line[index[i] + 1];
    return near + share * (next - near);
}

/* Scores of a block of queries with some points, for base 2. */
INLINE void score_points(
    const float *query, int64_t lanes, const float *key, int64_t dim, const int points, const float *lines, int64_t line,
    int64_t width, const float *at, float step, int64_t first, const int vectors, const int permute, float *score
) {
    V s[POINTS][VECTORS];
    EACH(i, points) EACH(v, vectors) {
        float x = at[2 * i + 1] + step * (float)(first + v * LANES);
        s[i][v] = read_line(lines + i * line, width, x, step, permute);
    }
    for (int64_t d = 0; d < dim; d++)
        EACH(i, points) EACH(v, vectors) s[i][v] += load(query + d * lanes + v * LANES) * key[i * dim + d];
    EACH(i, points) EACH(v, vectors) store(score + i * BLOCK + v * LANES, s[i][v]);
}

/* Turn the scores of a tile into weights beside the largest score so far; what was summed before shrinks by `fade`. */
INLINE void soften(float *score, int64_t count, const int vectors, float *most, float *total, float *fade) {
    EACH(v, vectors) {
        float *s = score + v * LANES;
        V before = load(most + v * LANES), top = before, sum = {0};
        for (int64_t i = 0; i < count; i++) {
            V x = load(s + i * BLOCK);
            top = pick((I)(top > x), top, x); /* x if it is NaN */
        }
        V factor = power_of_2(before - top);
        for (int64_t i = 0; i < count; i++) {
            V x = power_of_2(load(s + i * BLOCK) - top);
            store(s + i * BLOCK, x);
            sum += x;
        }
        store(total + v * LANES, load(total + v * LANES) * factor + sum);
        store(most + v * LANES, top);
        store(fade + v * LANES, factor);
    }
}

INLINE void sum_values(
    const float *weight, int64_t count, const float *value, int64_t dim_v, const int dims, const int vectors, const float *fade,
    float *sums, int64_t lanes
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
    const float down = TENSOR(step)[0], right = TENSOR(step)[1], scale = (float)a->scale * LOG2E;
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
                const float *start = at + 2 * (from + i);
                mix_rows(a, table, start[0] + down * (float)row, start[1], right, a->width, lines + i * j->line);
            }
            for (int64_t first = 0; first < a->width; first += BLOCK) {
                block b = {query + first, lines, score, most + first, total + first, fade, sums + first, first};
                if (a->width - first > LANES)
                    attend_block(j, &b, key + from * dim, value + from * dim_v, at + 2 * from, right, count, 2, permute);
                else
                    attend_block(j, &b, key + from * dim, value + from * dim_v, at + 2 * from, right, count, 1, permute);
            }
        }
        for (int64_t lane = 0; lane < lanes; lane += LANES) store(total + lane, 1 / load(total + lane));
        for (int64_t d = 0; d < dim_v; d++)
            for (int64_t lane = 0; lane < lanes; lane += LANES)
                store(sums + d * lanes + lane, load(sums + d * lanes + lane) * load(total + lane));
        float *out = (float *)(intptr_t)a->out + place * dim_v;
        transpose(sums, lanes, out, a->heads * dim_v, dim_v, a->width);
    }
}

CLONES static void attend_by_loads(const job *j, int64_t task, float *scratch) { attend(j, task, scratch, 0); }

#if defined(PERMUTES)
PERMUTES static void attend_by_permutes(const job *j, int64_t task, float *scratch) { attend(j, task, scratch, 1); }
#endif

static void work(void *data) {
    job *j = data;
    float *scratch = malloc(j->scratch * sizeof(float));
    if (!scratch) {
        __atomic_store_n(&j->status, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {
        int64_t task = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (task >= j->tasks) break;
        j->attend(j, task, scratch);
    }
    free(scratch);
}

EXPORT int foveate_point_attention(const call *a) {
    job j = {.a = a, .lanes = (a->width + BLOCK - 1) / BLOCK * BLOCK, .line = a->table_width + 2 + 2 * LANES};
    int64_t planes = a->batch * a->heads, wanted = (4 * a->threads + planes - 1) / planes;
    j.rows = (a->height + wanted - 1) / wanted;
    j.bands = (a->height + j.rows - 1) / j.rows;
    j.tasks = planes * j.bands;
    j.scratch = (a->dim + a->dim_v + 2) * j.lanes + TILE * (j.line + BLOCK) + BLOCK;
    j.attend = attend_by_loads;
#if defined(PERMUTES)
    float right = TENSOR(step)[1]; /* a vector reads at most 1 + 15 * 1.9 numbers and the one after */
    if (__builtin_cpu_supports("avx512f") && right >= 0 && right <= 1.9f) j.attend = attend_by_permutes;
#endif
    share_out(a->parallel, a->threads < j.tasks ? a->threads : j.tasks, work, &j);
    return j.status;
}
