/* Aggregated attention (TransNeXt) on CPU cores, forward, float32: one softmax over a window and a pooled map.
 *
 * A task is one head and some rows of the map, for all images. Keys and values of these rows and of those around them
 * are transposed to [dim][position], with zeros between the rows as wide as a window reaches: the key at a window's
 * offset of a vector of queries is one load, so much further on, also where a vector goes on in the next row. The bias
 * by position is made once for all images. Queries are taken from the projection, and everything that is done to them,
 * to the keys and to the scores happens in the first-level cache; no score ever reaches memory.
 *
 * Nothing here knows torch.
 */
#include "lanes.h"

#define KEYS 4  /* of the pooled map, whose scores are computed together */
#define TAPS 3  /* of a window's row, likewise */
#define BAND 49152 /* biases that a task makes at most, where a row has not more */

/* The distances of an axis, as `continuous_bias.AxisTable` has them. */
typedef struct {
    int64_t keys, terms, distances;
    int64_t index, weight; /* int64 and float64 [positions][keys][terms] */
} distances;

/* One call, as aggregated_native.py packs it: eight bytes a field. Tensors are contiguous. */
typedef struct {
    int64_t threads, parallel, batch, height, width, heads, dim, window;
    distances rows, columns;
    int64_t query;       /* [batch][height][width][heads][dim] as projected, like the next two */
    int64_t kv;          /* [batch][height][width][2][heads][dim] */
    int64_t pooled;      /* [batch][keys][2][heads][dim] */
    int64_t temperature; /* [heads], after the softplus */
    int64_t embedding;   /* [heads][dim] */
    int64_t scale;       /* float64 [height][width] */
    int64_t local_bias;  /* [heads][window * window] */
    int64_t tokens;      /* [heads][dim][window * window] */
    int64_t token_bias;  /* [heads][window * window] */
    int64_t table;       /* [heads][row distances][column distances] */
    int64_t out;         /* [batch][height][width][heads][dim] */
} call;

typedef struct {
    team team;
    const call *a;
    int64_t bands, rows; /* rows of a band */
    int64_t pitch, reach, keys, slots, space, biases;
} job;

#define TENSOR(name) ((const float *)(intptr_t)a->name)

/* Turn vectors, one a lane, to unit length, as torch.nn.functional.normalize does. */
INLINE void normalize(float *x, int64_t step, int64_t dim) {
    V sum = {0};
    for (int64_t d = 0; d < dim; d++) sum += load(x + d * step) * load(x + d * step);
    for (int lane = 0; lane < LANES; lane++) sum[lane] = sqrtf(sum[lane]);
    V factor = 1 / pick((I)(sum < all(1e-12f)), all(1e-12f), sum);
    for (int64_t d = 0; d < dim; d++) store(x + d * step, load(x + d * step) * factor);
}

/* The bias of a band's positions to every pooled key, [keys][space], for one head. */
INLINE void make_bias(const job *j, int64_t head, int64_t first, int64_t rows, float *line, float *bias) {
    const call *a = j->a;
    const distances *y = &a->rows, *x = &a->columns;
    const float *table = TENSOR(table) + head * y->distances * x->distances;
    const int64_t *index = (const int64_t *)(intptr_t)x->index;
    const double *weight = (const double *)(intptr_t)x->weight;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t key_row = 0; key_row < y->keys; key_row++) {
            int64_t at = ((first + row) * y->keys + key_row) * y->terms;
            const int64_t *row_index = (const int64_t *)(intptr_t)y->index + at;
            const double *row_weight = (const double *)(intptr_t)y->weight + at;
            const float *source = table + row_index[0] * x->distances;
            if (y->terms > 1) {
                memset(line, 0, x->distances * sizeof(float));
                for (int64_t t = 0; t < y->terms; t++) {
                    const float *part = table + row_index[t] * x->distances;
                    float share = (float)row_weight[t];
                    for (int64_t s = 0; s < x->distances; s++) line[s] += share * part[s];
                }
                source = line;
            }
            for (int64_t key = 0; key < x->keys; key++) {
                float *to = bias + (key_row * x->keys + key) * j->biases + row * j->pitch;
                const int64_t pair = key * x->terms, step = x->keys * x->terms;
                if (x->terms == 1)
                    for (int64_t column = 0; column < a->width; column++) to[column] = source[index[pair + column * step]];
                else
                    for (int64_t column = 0; column < a->width; column++) {
                        float sum = 0;
                        for (int64_t t = pair + column * step; t < pair + column * step + x->terms; t++)
                            sum += source[index[t]] * (float)weight[t];
                        to[column] = sum;
                    }
            }
        }
}

/* Scores of `taps` neighboring offsets of a window's row, and what the learned tokens add to their weights. */
INLINE void score_taps(
    const float *scaled, const float *unit, const float *key, int64_t space, const float *tokens, int64_t slots,
    int64_t dim, const int taps, float *score, float *added
) {
    V s[TAPS][VECTORS] = {0}, t[TAPS][VECTORS] = {0};
    for (int64_t d = 0; d < dim; d++)
        EACH(i, taps) EACH(v, VECTORS) {
            s[i][v] += load(scaled + d * BLOCK + v * LANES) * load(key + d * space + i + v * LANES);
            t[i][v] += load(unit + d * BLOCK + v * LANES) * tokens[d * slots + i];
        }
    EACH(i, taps) EACH(v, VECTORS) {
        store(score + i * BLOCK + v * LANES, s[i][v]);
        store(added + i * BLOCK + v * LANES, t[i][v]);
    }
}

INLINE void score_keys(
    const float *scaled, const float *key, const float *bias, int64_t biases, int64_t dim, const int keys, float *score
) {
    V s[KEYS][VECTORS];
    EACH(i, keys) EACH(v, VECTORS) s[i][v] = load(bias + i * biases + v * LANES);
    for (int64_t d = 0; d < dim; d++)
        EACH(i, keys) EACH(v, VECTORS) s[i][v] += load(scaled + d * BLOCK + v * LANES) * key[i * dim + d];
    EACH(i, keys) EACH(v, VECTORS) store(score + i * BLOCK + v * LANES, s[i][v]);
}

/* Some channels of the sums of values by weights: of the window's, then of the pooled map's. */
INLINE void sum_values(
    const job *j, const float *weights, const float *value, const float *pooled, int64_t stride, const int dims,
    float *out
) {
    V sum[DIMS][VECTORS] = {0};
    const float *weight = weights;
    for (int64_t dy = 0; dy < j->a->window; dy++)
        for (int64_t dx = 0; dx < j->a->window; dx++, weight += BLOCK)
            EACH(d, dims) EACH(v, VECTORS) sum[d][v] +=
                load(weight + v * LANES) * load(value + d * j->space + dy * j->pitch + dx + v * LANES);
    for (int64_t key = 0; key < j->keys; key++, weight += BLOCK, pooled += stride)
        EACH(d, dims) EACH(v, VECTORS) sum[d][v] += load(weight + v * LANES) * pooled[d];
    EACH(d, dims) EACH(v, VECTORS) store(out + d * BLOCK + v * LANES, sum[d][v]);
}

/* Turn scores into weights, which the learned tokens add to. */
INLINE void weigh(const job *j, float *score, const float *added) {
    const int64_t count = j->slots + j->keys;
    EACH(v, VECTORS) {
        float *s = score + v * LANES;
        V most = load(s), sum = {0};
        for (int64_t i = 1; i < count; i++) {
            V x = load(s + i * BLOCK);
            most = pick((I)(most > x), most, x); /* x if it is NaN */
        }
        for (int64_t i = 0; i < count; i++) {
            V x = power_of_2((load(s + i * BLOCK) - most) * LOG2E);
            store(s + i * BLOCK, x);
            sum += x;
        }
        sum = 1 / sum;
        for (int64_t i = 0; i < j->slots; i++)
            store(s + i * BLOCK, load(s + i * BLOCK) * sum + load(added + i * BLOCK + v * LANES));
        for (int64_t i = j->slots; i < count; i++) store(s + i * BLOCK, load(s + i * BLOCK) * sum);
    }
}

/* Transpose rows of a map, a head's channels at a time, and zero what is between them; keys become unit vectors. */
INLINE void transpose_rows(const job *j, int64_t image, int64_t head, int64_t first, int64_t rows, float *key) {
    const call *a = j->a;
    const int64_t dim = a->dim, step = 2 * a->heads * dim, reach = j->reach;
    float *value = key + dim * j->space;
    for (int64_t row = -reach; row < rows + reach; row++) {
        int64_t y = first + row;
        if (y < 0 || y >= a->height) continue;
        const float *source = TENSOR(kv) + ((image * a->height + y) * a->width * 2 * a->heads + head) * dim;
        int64_t at = (row + reach) * j->pitch + reach;
        transpose(source, step, key + at, j->space, a->width, dim);
        transpose(source + a->heads * dim, step, value + at, j->space, a->width, dim);
    }
    for (int64_t at = 0; at + LANES <= j->space; at += LANES) normalize(key + at, j->space, dim);
}

static void attend(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t head = task / j->bands, first = task % j->bands * j->rows, dim = a->dim, reach = j->reach;
    const int64_t rows = first + j->rows < a->height ? j->rows : a->height - first, slots = j->slots;
    float *line = scratch, *bias = line + a->columns.distances, *key = bias + j->keys * j->biases;
    float *value = key + dim * j->space, *pooled = value + dim * j->space, *unit = pooled + j->keys * dim;
    float *scaled = unit + dim * BLOCK, *added = scaled + dim * BLOCK, *score = added + slots * BLOCK;
    float *sums = score + (slots + j->keys) * BLOCK;
    const float *embedding = TENSOR(embedding) + head * dim, temperature = TENSOR(temperature)[head];
    const float *tokens = TENSOR(tokens) + head * dim * slots;
    memset(scratch, 0, (pooled - scratch) * sizeof(float));
    make_bias(j, head, first, rows, line, bias);
    for (int64_t image = 0; image < a->batch; image++) {
        const float *pooled_kv = TENSOR(pooled) + (image * j->keys * 2 * a->heads + head) * dim;
        const int64_t stride = 2 * a->heads * dim;
        for (int64_t i = 0; i < j->keys; i++) {
            const float *source = pooled_kv + i * stride;
            float sum = 0;
            for (int64_t d = 0; d < dim; d++) sum += source[d] * source[d];
            float norm = sqrtf(sum), factor = 1 / (norm < 1e-12f ? 1e-12f : norm);
            for (int64_t d = 0; d < dim; d++) pooled[i * dim + d] = source[d] * factor;
        }
        transpose_rows(j, image, head, first, rows, key);
        int64_t y = 0, x = 0, from_y = 0, from_x = 0; /* of the next lane to be read, and to be written */
        for (int64_t begin = 0; begin < rows * j->pitch; begin += BLOCK) {
            I column[VECTORS], row[VECTORS];
            float scales[BLOCK];
            memset(unit, 0, dim * BLOCK * sizeof(float));
            for (int64_t lane = 0, run; lane < BLOCK; lane += run) { /* runs of one row of the map, and between rows */
                int64_t inside = y < rows && x < a->width, end = x < a->width ? a->width : j->pitch;
                run = end - x < BLOCK - lane ? end - x : BLOCK - lane;
                int64_t position = (first + y) * a->width + x;
                const double *scale = (const double *)(intptr_t)a->scale + position;
                const float *source = TENSOR(query) + ((image * a->height * a->width + position) * a->heads + head) * dim;
                if (inside) transpose(source, a->heads * dim, unit + lane, BLOCK, run, dim);
                for (int64_t i = 0; i < run; i++) {
                    ((int32_t *)row)[lane + i] = (int32_t)(first + y);
                    ((int32_t *)column)[lane + i] = (int32_t)(x + i);
                    scales[lane + i] = inside ? (float)scale[i] * temperature : 0;
                }
                x += run;
                if (x == j->pitch) x = 0, y++;
            }
            EACH(v, VECTORS) normalize(unit + v * LANES, BLOCK, dim);
            for (int64_t d = 0; d < dim; d++)
                EACH(v, VECTORS) store(
                    scaled + d * BLOCK + v * LANES,
                    (load(unit + d * BLOCK + v * LANES) + embedding[d]) * load(scales + v * LANES)
                );
            for (int64_t dy = 0, slot = 0; dy < a->window; dy++)
                for (int64_t dx = 0; dx < a->window;) {
                    const float *near = key + begin + dy * j->pitch + dx;
                    float *s = score + slot * BLOCK, *t = added + slot * BLOCK;
                    int taps = a->window - dx < TAPS ? 1 : TAPS;
                    if (taps == TAPS)
                        score_taps(scaled, unit, near, j->space, tokens + slot, slots, dim, TAPS, s, t);
                    else
                        score_taps(scaled, unit, near, j->space, tokens + slot, slots, dim, 1, s, t);
                    for (int i = 0; i < taps; i++, slot++, dx++) {
                        float local = TENSOR(local_bias)[head * slots + slot];
                        float more = TENSOR(token_bias)[head * slots + slot];
                        int32_t down = (int32_t)(dy - reach), right = (int32_t)(dx - reach);
                        EACH(v, VECTORS) {
                            I y = row[v] + down, x = column[v] + right;
                            I seen = (y >= 0) & (y < (int32_t)a->height) & (x >= 0) & (x < (int32_t)a->width);
                            float *at = score + slot * BLOCK + v * LANES, *plus = added + slot * BLOCK + v * LANES;
                            store(at, pick(seen, load(at) + local, all(-INFINITY)));
                            store(plus, load(plus) + more);
                        }
                    }
                }
            int64_t i = 0;
            float *s = score + slots * BLOCK;
            for (; i + KEYS <= j->keys; i += KEYS)
                score_keys(scaled, pooled + i * dim, bias + i * j->biases + begin, j->biases, dim, KEYS, s + i * BLOCK);
            for (; i < j->keys; i++)
                score_keys(scaled, pooled + i * dim, bias + i * j->biases + begin, j->biases, dim, 1, s + i * BLOCK);
            weigh(j, score, added);
            int64_t d = 0;
            const float *pooled_value = pooled_kv + a->heads * dim;
            for (; d + DIMS <= dim; d += DIMS)
                sum_values(
                    j, score, value + d * j->space + begin, pooled_value + d, stride, DIMS, sums + d * BLOCK
                );
            for (; d < dim; d++)
                sum_values(j, score, value + d * j->space + begin, pooled_value + d, stride, 1, sums + d * BLOCK);
            for (int64_t lane = 0, run; lane < BLOCK; lane += run) {
                int64_t end = from_x < a->width ? a->width : j->pitch;
                run = end - from_x < BLOCK - lane ? end - from_x : BLOCK - lane;
                int64_t position = (image * a->height + first + from_y) * a->width + from_x;
                float *out = (float *)(intptr_t)a->out + (position * a->heads + head) * dim;
                if (from_y < rows && from_x < a->width)
                    transpose(sums + lane, BLOCK, out, a->heads * dim, dim, run);
                from_x += run;
                if (from_x == j->pitch) from_x = 0, from_y++;
            }
        }
    }
}

EXPORTED(foveate_aggregated)(const call *a) {
    job j = {.team.run = attend, .a = a, .reach = a->window / 2, .keys = a->rows.keys * a->columns.keys, .slots = a->window * a->window};
    j.pitch = a->width + j.reach;
    j.rows = BAND / (j.pitch * j.keys);
    /* Bands for every thread, and not so thin that rows around them, which are transposed too, are most of the work. */
    int64_t wanted = (2 * a->threads + a->heads - 1) / a->heads, most = (a->height + wanted - 1) / wanted;
    if (a->threads > 1 && j.rows > most) j.rows = most < 4 * j.reach ? 4 * j.reach : most;
    if (j.rows > a->height) j.rows = a->height;
    if (j.rows < 1) j.rows = 1;
    j.bands = (a->height + j.rows - 1) / j.rows;
    j.team.tasks = j.bands * a->heads;
    j.biases = (j.rows * j.pitch + BLOCK - 1) / BLOCK * BLOCK;
    j.space = j.biases + 2 * j.reach * j.pitch + 2 * j.reach + LANES;
    j.team.scratch = a->columns.distances + j.keys * j.biases + 2 * a->dim * j.space + j.keys * a->dim +
                3 * a->dim * BLOCK + (2 * j.slots + j.keys) * BLOCK;
    return share_out(a->parallel, a->threads, &j.team);
}
