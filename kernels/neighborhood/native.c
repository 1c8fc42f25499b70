/* Neighborhood attention on CPU cores, forward and backward, with one vector lane per query.
 *
 * Keys and values are transposed row by row to [dim][column], where a column holds the same position of `group`
 * neighboring planes (a plane is one head of one image). A lane is one column of one plane, so the key at window
 * offset o of all lanes is one load, `o * step * group` floats further: windows cost neither gathers nor permutes, and
 * a dilation is only a longer step. Lanes whose window differs from their neighbors' (at borders, with a stride or a
 * causal axis) are masked. Several query rows are computed together, so that a load serves all of them. Rows are kept
 * in a ring; the softmax is online over blocks of rows, so memory does not grow with the window.
 *
 * The backward pass computes the scores again: once with a lane per query for the gradients of query and bias, once
 * with a lane per key, over the queries that see it, for those of key and value. Nothing is added to by two threads, so
 * gradients are deterministic.
 *
 * The products of unfused attention (`product`) walk alike, but hold one number for each pair of a query and a slot of its
 * window in memory: scores write it, values and their transpose read it.
 *
 * The second half of this file is compiled once per instruction set, chosen at run time. Nothing here knows torch.
 */
#ifndef LANES

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <malloc.h>
#define free_aligned _aligned_free
#else
#define free_aligned free
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LOG2E 1.44269504088896340736f
#define CACHE (512 << 10) /* bytes that transposed rows may take of the second-level cache */
#define LN2 0.69314718055994530942f
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < n; i++) /* unrolled */

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { FORWARD, BACKWARD_QUERY, BACKWARD_KEY, SCORES, VALUES, SCATTER };
enum { DONE, NO_MEMORY, BAD_WINDOWS, NO_SUCH_ISA };

/* Address and strides in elements; the last axis, dim, is contiguous. */
typedef struct {
    int64_t data, batch, position[3], head;
} tensor;

/* One call, as native.py packs it: eight bytes a field. Axes are depth, height, width. */
typedef struct {
    int64_t isa, threads, parallel, dtype, batch, heads, heads_kv, dim, dim_v;
    int64_t length[3], step[3];
    int64_t first[3], count[3]; /* int32 per position: the first key, and how many follow it in steps */
    int64_t reach[3];           /* the bias table has 2 * reach + 1 entries on an axis */
    int64_t bias;               /* float32 [heads][entries], or 0 */
    double scale;
    tensor query, key, value, out;
    int64_t lse; /* float32 [batch][positions][heads], or 0 in the forward pass */
    tensor grad_out, grad_query, grad_key, grad_value;
    int64_t grad_lse, delta; /* float32 as lse; grad_lse may be 0, delta is written and read */
    int64_t grad_bias;       /* float32 as bias, or 0 */
} call;

/* Windows on an axis in the order of its dilation groups, where the keys of a query lie side by side. */
typedef struct {
    int length;
    int *position, *place; /* of a place in that order, and back */
    int *low, *high;       /* per place, the places it sees; where lanes are keys, by which it is seen */
    int *first;            /* per place, the first that it sees */
} axis;

/* The lanes of one vector: which offsets they use, and which of these each lane uses if they differ. */
typedef struct {
    int first, count;
    const int32_t *mask; /* [count][lanes], or NULL */
    int64_t *slot;       /* for `SCATTER`: where from a row's weights that of a pair lies, [count][lanes]; -1 for none */
    int64_t *run;        /* for other products, [lanes][3]: where a query's weights lie, its first offset, its number */
} columns;

typedef struct {
    int start, rows;
} tile;

typedef struct plan plan;
struct plan {
    const call *a;
    int pass, lanes, group, groups, planes, vectors, tiles, depth_parts, height_parts, width_parts, tasks;
    axis depth, height, width;
    columns *columns;
    tile *tile;
    int64_t lead, tail, ld;         /* floats before and after a part's columns; from one dim to the next */
    int64_t ring_row, ring, layers; /* floats of a row, rows of a layer, layers */
    int64_t most_columns, block;    /* offsets of a vector at most, rows whose scores are held at once */
    int64_t entries, scratch;       /* entries of the bias table; floats a thread needs */
    float *partial;                 /* gradient of the bias by part and plane */
    void (*run)(plan *, int, float *);
    int next, status;
    void **owned;
    int owners, space;
};

static void *own(plan *p, size_t size) {
    if (p->owners == p->space) {
        void **owned = realloc(p->owned, (p->space + 64) * sizeof(void *));
        if (!owned) return NULL;
        p->owned = owned;
        p->space += 64;
    }
    void *memory = malloc(size ? size : 1);
    if (memory) p->owned[p->owners++] = memory;
    return memory;
}

/* Scratch outlives a call: fresh pages would cost more than the arithmetic of a small map. */
#define KEPT 8
#define KEPT_BYTES (16u << 20)
static struct {
    void *memory;
    size_t size;
} kept[KEPT];
static int kept_lock;

static void *borrow(size_t size) {
    void *memory = NULL;
    if (!__atomic_exchange_n(&kept_lock, 1, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < KEPT && !memory; i++)
            if (kept[i].memory && kept[i].size >= size) {
                memory = kept[i].memory;
                kept[i].memory = NULL;
            }
        __atomic_store_n(&kept_lock, 0, __ATOMIC_RELEASE);
    }
    if (memory) return memory;
    size_t *block = NULL;
#if defined(_WIN32)
    if (!(block = _aligned_malloc(size + 64, 64))) return NULL;
#else
    if (posix_memalign((void **)&block, 64, size + 64)) return NULL;
#endif
    *block = size;
    return block + 8;
}

static void give_back(void *memory) {
    size_t size = ((size_t *)memory)[-8];
    void *spare = memory;
    if (size <= KEPT_BYTES && !__atomic_exchange_n(&kept_lock, 1, __ATOMIC_ACQUIRE)) {
        int slot = 0;
        for (int i = 0; i < KEPT; i++) {
            if (!kept[i].memory) {
                slot = i;
                break;
            }
            if (kept[i].size < kept[slot].size) slot = i;
        }
        spare = kept[slot].memory;
        kept[slot].memory = memory;
        kept[slot].size = size;
        __atomic_store_n(&kept_lock, 0, __ATOMIC_RELEASE);
    }
    if (spare) free_aligned((size_t *)spare - 8);
}

static void work(void *argument) {
    plan *p = argument;
    float *scratch = borrow(p->scratch * sizeof(float));
    if (!scratch) {
        __atomic_store_n(&p->status, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (int task; (task = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->tasks;) p->run(p, task, scratch);
    give_back(scratch);
}

static void *work_in_thread(void *argument) {
    work(argument);
    return NULL;
}

/* Run the tasks in the OpenMP team that torch uses as well, or else in threads of this call. */
static int run_tasks(plan *p) {
    int threads = p->a->threads < p->tasks ? (int)p->a->threads : p->tasks;
    if (threads <= 1) {
        work(p);
    } else if (p->a->parallel) {
        ((void (*)(void (*)(void *), void *, unsigned, unsigned))(intptr_t)p->a->parallel)(work, p, threads, 0);
    } else {
        pthread_t helper[64];
        int started = 0;
        while (started < threads - 1 && started < 64 && !pthread_create(&helper[started], NULL, work_in_thread, p))
            started++;
        work(p);
        for (int i = 0; i < started; i++) pthread_join(helper[i], NULL);
    }
    return p->status;
}

static int plan_axis(plan *p, int i, axis *x) {
    const int32_t *first = (const int32_t *)(intptr_t)p->a->first[i],
                  *count = (const int32_t *)(intptr_t)p->a->count[i];
    int length = (int)p->a->length[i], step = (int)p->a->step[i], *memory = own(p, 6 * sizeof(int) * length);
    if (!memory) return NO_MEMORY;
    *x = (axis){length, memory, memory + length, memory + 2 * length, memory + 3 * length, memory + 2 * length};
    int place = 0;
    for (int residue = 0; residue < step; residue++)
        for (int position = residue; position < length; position += step) {
            x->position[place] = position;
            x->place[position] = place++;
        }
    for (place = 0; place < length; place++) {
        int position = x->position[place], key = first[position], keys = count[position];
        if (keys < 1 || key < 0 || key + (int64_t)step * (keys - 1) >= length || key % step != position % step)
            return BAD_WINDOWS;
        x->low[place] = x->place[key];
        x->high[place] = x->low[place] + keys;
        if (place && (x->low[place] < x->low[place - 1] || x->high[place] < x->high[place - 1])) return BAD_WINDOWS;
    }
    if (p->pass != BACKWARD_KEY && p->pass != SCATTER) return DONE;
    int *low = memory + 4 * length, *high = memory + 5 * length, from = 0, to = 0;
    for (place = 0; place < length; place++) { /* both ends only grow, so the queries of a key lie side by side */
        while (from < length && x->high[from] <= place) from++;
        while (to < length && x->low[to] <= place) to++;
        low[place] = from;
        high[place] = to > from ? to : from;
    }
    x->low = low;
    x->high = high;
    return DONE;
}

static columns join_columns(const axis *x, int from, int to) {
    int first = 0, end = 0, any = 0;
    for (int c = from; c < to; c++) {
        int place = x->place[c], low = x->low[place] - place, high = x->high[place] - place;
        if (low == high) continue;
        first = any && first < low ? first : low;
        end = any && end > high ? end : high;
        any = 1;
    }
    return (columns){first, end - first, NULL, NULL, NULL};
}

/* How many planes share a vector: as few as make good use of the lanes. */
static int choose_group(const plan *p, const axis *x) {
    int best = 1;
    double least = INFINITY;
    for (int group = 1; group <= p->lanes; group *= 2) {
        int width = p->lanes / group, offsets = 0;
        for (int c = 0; c < x->length; c += width)
            offsets += join_columns(x, c, c + width < x->length ? c + width : x->length).count;
        double cost = (double)offsets * ((p->planes + group - 1) / group);
        if (cost < least * 0.97) {
            least = cost;
            best = group;
        }
    }
    return best;
}

static int plan_columns(plan *p) {
    const axis *x = &p->width;
    int width = p->lanes / p->group;
    p->vectors = (x->length + width - 1) / width;
    p->columns = own(p, p->vectors * sizeof(columns));
    if (!p->columns) return NO_MEMORY;
    int64_t masked = 0;
    for (int pass = 0; pass < 2; pass++) {
        int32_t *mask = pass ? own(p, masked * sizeof(int32_t)) : NULL;
        if (pass && !mask) return NO_MEMORY;
        for (int v = 0; v < p->vectors; v++) {
            int from = v * width, to = from + width < x->length ? from + width : x->length;
            columns *c = &p->columns[v];
            *c = join_columns(x, from, to);
            /* Lanes beyond the map are never stored, but the gradient of the bias sums over lanes. */
            int differ = p->pass == BACKWARD_QUERY && to < from + width;
            for (int i = from; i < to; i++) {
                int place = x->place[i];
                differ |= x->low[place] - place != c->first || x->high[place] - x->low[place] != c->count;
            }
            p->most_columns = c->count > p->most_columns ? c->count : p->most_columns;
            if (!differ) continue;
            masked += pass ? 0 : (int64_t)c->count * p->lanes;
            if (!pass) continue;
            c->mask = mask;
            for (int o = 0; o < c->count; o++)
                for (int lane = 0; lane < p->lanes; lane++) {
                    int i = from + lane / p->group, place = i < to ? x->place[i] : 0;
                    int key = place + c->first + o;
                    *mask++ = i < to && key >= x->low[place] && key < x->high[place] ? -1 : 0;
                }
        }
    }
    return DONE;
}

/* Where in the weights of a row those of the lanes lie. */
static int plan_slots(plan *p) {
    const axis *x = &p->width;
    const int64_t next = p->a->value.position[2];
    int width = p->lanes / p->group;
    for (int v = 0; v < p->vectors; v++) {
        columns *c = &p->columns[v];
        int64_t *slot = c->slot = p->pass == SCATTER ? own(p, (int64_t)c->count * p->lanes * sizeof(int64_t)) : NULL;
        int64_t *run = c->run = own(p, 3 * (int64_t)p->lanes * sizeof(int64_t));
        if (!run || (p->pass == SCATTER && !slot)) return NO_MEMORY;
        for (int lane = 0; lane < p->lanes; lane++) {
            int i = v * width + lane / p->group, place = i < x->length ? x->place[i] : 0;
            int inside = i < x->length;
            run[3 * lane] = x->position[place] * next;
            run[3 * lane + 1] = inside ? x->low[place] - place - c->first : 0;
            run[3 * lane + 2] = inside ? x->high[place] - x->low[place] : 0;
            for (int o = 0; slot && o < c->count; o++) {
                int query = place + c->first + o, seen = inside && query >= x->low[place] && query < x->high[place];
                slot[o * p->lanes + lane] = seen ? x->position[query] * next + place - x->first[query] : -1;
            }
        }
    }
    return DONE;
}

/* Cut rows into parts whose ring fits the second-level cache, or that give every thread work. */
static void cut_width(plan *p, int wanted) {
    const int64_t dims = p->a->dim + p->a->dim_v, next = p->a->step[2] * p->group, lanes = p->lanes;
    int64_t reach = 0;
    for (int v = 0; v < p->vectors; v++) {
        int64_t left = -p->columns[v].first, right = p->columns[v].first + p->columns[v].count - 1;
        reach = left > reach ? left : reach;
        reach = right > reach ? right : reach;
    }
    int64_t beside = (reach * next + lanes - 1) / lanes, bytes = p->layers * p->ring * dims * lanes * 4;
    int64_t fit = CACHE / (bytes ? bytes : 1) - 2 * beside, least = 4 * beside + 4;
    int64_t even = (p->vectors + wanted - 1) / wanted, vectors = p->vectors;
    if (vectors + 2 * beside > CACHE / (bytes ? bytes : 1)) vectors = fit > least ? fit : least;
    if (even < vectors) vectors = even > beside + 2 ? even : beside + 2;
    p->width_parts = (int)((p->vectors + vectors - 1) / vectors);
    int64_t most = 0;
    for (int part = 0; part < p->width_parts; part++) {
        int64_t from = p->vectors * (int64_t)part / p->width_parts, to = p->vectors * (part + 1LL) / p->width_parts;
        most = to - from > most ? to - from : most;
        for (int64_t v = from; v < to; v++) {
            int64_t first = p->columns[v].first * next, last = first + (p->columns[v].count - 1) * next;
            int64_t left = -first - (v - from) * lanes, right = last - (to - 1 - v) * lanes;
            p->lead = left > p->lead ? left : p->lead;
            p->tail = right > p->tail ? right : p->tail;
        }
    }
    p->lead = (p->lead + lanes - 1) / lanes * lanes;
    p->tail = (p->tail + lanes - 1) / lanes * lanes;
    /* An odd number of cache lines between dims spreads them over the cache's sets. */
    p->ld = ((p->lead + most * lanes + p->tail + 15) / 16 | 1) * 16;
}

static int plan_tiles(plan *p, int most_rows) {
    const axis *y = &p->height, *z = &p->depth;
    int step = (int)p->a->step[1], place = 0, threads = p->a->threads > 1 ? (int)p->a->threads : 1;
    p->tile = own(p, y->length * sizeof(tile));
    if (!p->tile) return NO_MEMORY;
    for (int residue = 0; residue < step && place < y->length; residue++) {
        int rows = (y->length - residue + step - 1) / step, tiles = (rows + most_rows - 1) / most_rows;
        for (int i = 0; i < tiles; i++) {
            tile t = {place + rows * i / tiles, rows * (i + 1) / tiles - rows * i / tiles};
            int high = y->high[t.start + t.rows - 1] - y->low[t.start];
            p->ring = high > p->ring ? high : p->ring;
            p->tile[p->tiles++] = t;
        }
        place += rows;
    }
    /* Cuts repeat the transposition of a window's rows, so there are as few as keep all threads busy to the end. */
    int wanted = (4 * threads + p->groups - 1) / p->groups;
    if (threads == 1) wanted = 1;
    p->depth_parts = z->length < wanted ? z->length : wanted;
    int64_t sparse = (int64_t)p->tiles * most_rows / (2 * (p->ring > 0 ? p->ring : 1));
    int enough = (threads + p->groups * p->depth_parts - 1) / (p->groups * p->depth_parts);
    p->height_parts = (wanted + p->depth_parts - 1) / p->depth_parts;
    if (p->height_parts > sparse) p->height_parts = sparse > enough ? (int)sparse : enough;
    if (p->height_parts > p->tiles) p->height_parts = p->tiles;
    if (p->depth_parts < (z->length + 7) / 8) p->depth_parts = (z->length + 7) / 8;
    for (int i = 0; i < p->depth_parts; i++) {
        int from = (int)((int64_t)z->length * i / p->depth_parts);
        int last = (int)((int64_t)z->length * (i + 1) / p->depth_parts) - 1;
        int layers = z->high[last] - z->low[from];
        p->layers = layers > p->layers ? layers : p->layers;
    }
    int tasks = p->groups * p->depth_parts * p->height_parts;
    cut_width(p, tasks < threads ? (2 * threads + tasks - 1) / tasks : 1);
    p->tasks = tasks * p->width_parts;
    return DONE;
}

static int make_plan(plan *p, const call *a, int pass, int lanes, int most_rows) {
    memset(p, 0, sizeof *p);
    p->a = a;
    p->pass = pass;
    p->lanes = lanes;
    p->planes = (int)(a->batch * a->heads);
    int status = plan_axis(p, 0, &p->depth);
    if (!status) status = plan_axis(p, 1, &p->height);
    if (!status) status = plan_axis(p, 2, &p->width);
    if (status) return status;
    p->group = choose_group(p, &p->width);
    p->groups = (p->planes + p->group - 1) / p->group;
    if (!status) status = plan_columns(p);
    if (!status && pass >= SCORES) status = plan_slots(p);
    if (!status) status = plan_tiles(p, most_rows);
    if (status) return status;
    p->entries = (2 * a->reach[0] + 1) * (2 * a->reach[1] + 1) * (2 * a->reach[2] + 1);
    p->ring_row = (a->dim + a->dim_v + (pass == BACKWARD_KEY ? 2 : 0)) * p->ld;
    /* Scores of a block stay in the first-level cache where the window allows it. */
    int64_t row_scores = most_rows * (p->most_columns ? p->most_columns : 1) * lanes;
    int64_t rows = p->layers * p->ring, held = (pass == FORWARD ? 12288 : 6144) / row_scores;
    p->block = held < 1 ? 1 : held > rows || pass >= SCORES ? rows : held;
    if (p->block < 1) p->block = 1;
    int64_t dims = a->dim + a->dim_v;
    p->scratch = rows * p->ring_row                       /* ring */
                 + 2 * most_rows * dims * lanes           /* tiles and accumulators */
                 + 2 * p->block * row_scores              /* scores and their gradients */
                 + (a->bias ? 2 * p->entries * lanes : 0) /* bias and its gradient, by lane */
                 + 16 * (rows + 1)                        /* list of rows */
                 + 64 * lanes;
    if (pass >= SCORES) /* the weights of a tile's queries, or a row's of every lane */
        p->scratch +=
            most_rows * ((a->reach[0] + 1) * (a->reach[1] + 1) * (a->reach[2] + 1) + p->most_columns) * lanes;
    return DONE;
}

static void free_plan(plan *p) {
    for (int i = 0; i < p->owners; i++) free(p->owned[i]);
    free(p->owned);
}

/* A row of keys (or of queries, backward) and the query rows of the tile that see it. */
typedef struct {
    const float *a, *b; /* transposed key and value, at the first column */
    int64_t bias;       /* entry of the bias for the tile's first row at offset 0 of the columns */
    int64_t weight;     /* where the weights of the tile's first row lie, also if it sees none */
    int from, to, layer, row;
} key_row;

/* What of the map a task computes. */
typedef struct {
    int first_plane, part, v_from, v_to, z_from, z_to, tile_from, tile_to, layer_from, layer_to;
} share;

static share share_of(const plan *p, int task) {
    const int parts = p->tasks / p->groups, part = task % parts;
    const int64_t depth_part = part / p->width_parts / p->height_parts,
                  height_part = part / p->width_parts % p->height_parts, width_part = part % p->width_parts;
    share s = {.first_plane = task / parts * p->group, .part = part};
    s.v_from = (int)(p->vectors * width_part / p->width_parts);
    s.v_to = (int)(p->vectors * (width_part + 1) / p->width_parts);
    s.z_from = (int)(p->depth.length * depth_part / p->depth_parts);
    s.z_to = (int)(p->depth.length * (depth_part + 1) / p->depth_parts);
    s.tile_from = (int)(p->tiles * height_part / p->height_parts);
    s.tile_to = (int)(p->tiles * (height_part + 1) / p->height_parts);
    s.layer_from = p->depth.low[s.z_from];
    s.layer_to = p->depth.high[s.z_to - 1];
    return s;
}

/* List the rows of the ring that a tile's rows see from layer `zi`; return how many. */
static int list_rows(const plan *p, const share *s, const tile *t, int zi, float *ring, key_row *key) {
    const axis *z = &p->depth, *y = &p->height;
    const int64_t width = 2 * p->a->reach[2] + 1, height = 2 * p->a->reach[1] + 1;
    /* A lane per key looks at queries, so its offsets are those of the bias mirrored. */
    const int64_t mirror = p->pass == BACKWARD_KEY ? -1 : 1;
    const int start = t->start, rows = t->rows;
    int keys = 0;
    for (int layer = z->low[zi]; layer < z->high[zi]; layer++)
        for (int row = y->low[start]; row < y->high[start + rows - 1]; row++) {
            key_row *k = &key[keys];
            k->layer = layer;
            k->row = row;
            k->a = ring + ((layer - s->layer_from) * p->ring + row % p->ring) * p->ring_row + p->lead;
            k->b = k->a + p->a->dim * p->ld;
            k->bias = ((mirror * (layer - zi) + p->a->reach[0]) * height + mirror * (row - start) + p->a->reach[1]) *
                          width +
                      p->a->reach[2];
            for (k->from = 0; k->from < rows && y->high[start + k->from] <= row;) k->from++;
            for (k->to = rows; k->to > k->from && y->low[start + k->to - 1] > row;) k->to--;
            keys += k->from < k->to;
        }
    return keys;
}

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13, bits;
    if (rest >= 0x0f800000) {
        bits = rest | 0x7f800000; /* infinity or NaN */
    } else {
        float f;
        memcpy(&f, &rest, 4);
        f *= 0x1p112f; /* the exponent's new bias; subnormals become normal */
        memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_half(float f) {
    uint32_t bits, sign;
    memcpy(&bits, &f, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) { /* subnormal: the addition rounds at the last place kept */
        float g;
        memcpy(&g, &bits, 4);
        g += 0.5f;
        memcpy(&bits, &g, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1) - 0x38000000;
    return (uint16_t)(sign | bits >> 13);
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name, ISA)
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FN(ints)){__VA_ARGS__})
#endif

#define ISA generic
#define LANES 4
#define MOST_ROWS 3
#define MOST_COLUMNS(rows) ((rows) == 3 ? 3 : (rows) == 2 ? 4 : 6)
#define MOST_DIMS(rows) 4
#include "native.c"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA avx2
#define LANES 8
#define MOST_ROWS 3
#define MOST_COLUMNS(rows) ((rows) == 3 ? 4 : (rows) == 2 ? 6 : 8)
#define MOST_DIMS(rows) ((rows) == 1 ? 8 : 4)
#include "native.c"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define ISA avx512
#define LANES 16
#define MOST_ROWS 4
#define MOST_COLUMNS(rows) ((rows) == 4 ? 6 : 8)
#define MOST_DIMS(rows) ((rows) == 4 ? 4 : 8)
#include "native.c"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* The number of lanes of the best instruction set here. */
EXPORT int foveate_neighborhood_lanes(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

static int run_pass(const call *a, int pass) {
    plan p;
    int lanes = (int)a->isa, status;
    void (*run)(plan *, int, float *) = run_generic, (*product)(plan *, int, float *) = product_generic;
    int most_rows = 3;
    if (lanes > foveate_neighborhood_lanes()) return NO_SUCH_ISA;
#if defined(__x86_64__)
    if (lanes == 8) {
        run = run_avx2;
        product = product_avx2;
    }
    if (lanes == 16) {
        run = run_avx512;
        product = product_avx512;
        most_rows = 4;
    }
#endif
    status = make_plan(&p, a, pass, lanes, most_rows);
    if (!status && pass == BACKWARD_QUERY && a->grad_bias) {
        p.partial = own(&p, (int64_t)p.tasks * p.group * p.entries * sizeof(float));
        if (!p.partial) status = NO_MEMORY;
    }
    if (!status) {
        p.run = pass >= SCORES ? product : run;
        status = run_tasks(&p);
    }
    if (!status && p.partial) { /* parts and images are summed in one order, whoever computed them */
        float *grad = (float *)(intptr_t)a->grad_bias;
        int64_t parts = p.tasks / p.groups, all = (int64_t)p.groups * p.group;
        memset(grad, 0, a->heads * p.entries * sizeof(float));
        for (int64_t part = 0; part < parts; part++)
            for (int64_t plane = 0; plane < p.planes; plane++) {
                const float *from = p.partial + (part * all + plane) * p.entries;
                float *to = grad + plane % a->heads * p.entries;
                for (int64_t i = 0; i < p.entries; i++) to[i] += from[i];
            }
    }
    free_plan(&p);
    return status;
}

EXPORT int foveate_neighborhood_forward(const call *a) { return run_pass(a, FORWARD); }

EXPORT int foveate_neighborhood_backward(const call *a) {
    int status = run_pass(a, BACKWARD_QUERY);
    return status ? status : run_pass(a, BACKWARD_KEY);
}

EXPORT int foveate_neighborhood_scores(const call *a) { return run_pass(a, SCORES); }

EXPORT int foveate_neighborhood_values(const call *a) { return run_pass(a, VALUES); }

EXPORT int foveate_neighborhood_scatter(const call *a) { return run_pass(a, SCATTER); }

#else /* compiled once per instruction set */

typedef float FN(floats) __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t FN(ints) __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t FN(words) __attribute__((vector_size(4 * LANES), may_alias));
typedef float FN(unaligned) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define V FN(floats)
#define I FN(ints)
#define U FN(words)

INLINE V FN(load)(const float *p) { return *(const FN(unaligned) *)p; }
INLINE void FN(store)(float *p, V x) { *(FN(unaligned) *)p = x; }
#define load FN(load)
#define store FN(store)
#define ALL(x) ((V){0} + (float)(x))

/* Keep a loaded vector in a register, where the compiler would load it again for every use. */
#if LANES == 16
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#elif defined(__x86_64__)
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define IN_REGISTER(x) __asm__("" : "+w"(x))
#else
#define IN_REGISTER(x) (void)0
#endif

INLINE V FN(select)(I mask, V x, V other) { return (V)((mask & (I)x) | (~mask & (I)other)); }

/* The larger of two; x if it is NaN. */
INLINE V FN(larger)(V than, V x) {
#if LANES == 16
    return _mm512_max_ps(than, x);
#elif LANES == 8
    return _mm256_max_ps(than, x);
#else
    return FN(select)((I)(x < than), than, x);
#endif
}

/* 2 ** x to 1.2e-7 for x below 128, 0 for -inf; the polynomial is the minimax one of degree 6. */
INLINE V FN(exp2)(V x) {
#if LANES == 16
    V r = _mm512_reduce_ps(x, 0x01);
    V y = ALL(0.00021702254889532924f);
    y = y * r + 0.0012439688434824347f;
    y = y * r + 0.009678840637207031f;
    y = y * r + 0.055483341217041016f;
    y = y * r + 0.24022983014583588f;
    y = y * r + 0.6931470036506653f;
    y = y * r + 1.0f;
    return _mm512_scalef_ps(y, x);
#else
    x = FN(larger)(ALL(-127.0f), x); /* whose power of two is 0 */
    V n = x + ALL(0x1.8p23f + 127);
    V power = (V)((U)n << 23); /* the low bits of n hold the nearest integer, and an exponent's bias */
    n -= ALL(0x1.8p23f + 127);
    V r = x - n, y = ALL(0.00015345810970757157f);
    y = y * r + 0.0013399930903688073f;
    y = y * r + 0.009618489071726799f;
    y = y * r + 0.05550328642129898f;
    y = y * r + 0.24022646248340607f;
    y = y * r + 0.6931471824645996f;
    y = y * r + 1.0f;
    return y * power; /* a sum of bits would turn some NaN into numbers */
#endif
}

INLINE V FN(load_as)(const void *p, const int dtype) {
    if (dtype == FLOAT32) return load(p);
#if LANES == 16
    __m256i h = _mm256_loadu_si256(p);
    return dtype == FLOAT16 ? (V)_mm512_cvtph_ps(h) : (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif LANES == 8
    __m128i h = _mm_loadu_si128(p);
    return dtype == FLOAT16 ? (V)_mm256_cvtph_ps(h) : (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
    const uint16_t *h = p;
    V x;
    I bits;
    if (dtype == FLOAT16) {
        for (int i = 0; i < LANES; i++) x[i] = half_to_float(h[i]);
        return x;
    }
    for (int i = 0; i < LANES; i++) bits[i] = (int32_t)((uint32_t)h[i] << 16);
    return (V)bits;
#endif
}

INLINE void FN(store_as)(void *p, V x, const int dtype) {
    if (dtype == FLOAT32) {
        store(p, x);
        return;
    }
    uint16_t *h = p;
    if (dtype == FLOAT16) {
#if LANES == 16
        _mm256_storeu_si256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8
        _mm_storeu_si128(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < LANES; i++) h[i] = float_to_half(x[i]);
#endif
        return;
    }
    U bits = (U)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    bits = (U)FN(select)((I)(x != x), (V)(bits | 0x400000), (V)rounded);
    for (int i = 0; i < LANES; i++) h[i] = (uint16_t)(bits[i] >> 16);
}

/* Turn LANES vectors into their transpose, by swapping blocks of half the size each time. */
INLINE void FN(transpose)(V *x) {
#define LIST(...) __VA_ARGS__
#define SWAP(h, first, second)                \
    EACH (i, LANES)                           \
        if (!(i & h)) {                       \
            V a = x[i], b = x[i + h];         \
            x[i] = SHUFFLE(a, b, first);      \
            x[i + h] = SHUFFLE(a, b, second); \
        }
#if LANES == 16
    SWAP(
        8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    SWAP(
        4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    SWAP(
        2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    SWAP(
        1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#elif LANES == 8
    SWAP(4, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
    SWAP(2, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15))
    SWAP(1, LIST(0, 8, 2, 10, 4, 12, 6, 14), LIST(1, 9, 3, 11, 5, 13, 7, 15))
#else
    SWAP(2, LIST(0, 1, 4, 5), LIST(2, 3, 6, 7))
    SWAP(1, LIST(0, 4, 2, 6), LIST(1, 5, 3, 7))
#endif
#undef SWAP
#undef LIST
}

/* Write `to[d * ld + lane] = factor * from[lane][d]`. */
INLINE void FN(gather_as)(char *const *from, int64_t dim, float factor, float *to, int64_t ld, const int dtype) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t d = 0; d < dim; d += LANES) {
        V x[LANES];
        if (d + LANES <= dim) {
            EACH (lane, LANES) x[lane] = FN(load_as)(from[lane] + d * size, dtype);
            FN(transpose)(x);
            EACH (i, LANES) store(to + (d + i) * ld, x[i] * factor);
        } else {
            float rest[LANES] = {0};
            for (int lane = 0; lane < LANES; lane++) {
                memcpy(rest, from[lane] + d * size, (dim - d) * size);
                x[lane] = FN(load_as)(rest, dtype);
            }
            FN(transpose)(x);
            for (int64_t i = 0; i < dim - d; i++) store(to + (d + i) * ld, x[i] * factor);
        }
    }
}

static __attribute__((noinline)) void FN(gather)(
    char *const *from, int64_t dim, float factor, float *to, int64_t ld, int dtype) {
    if (dtype == FLOAT32) FN(gather_as)(from, dim, factor, to, ld, FLOAT32);
    if (dtype == FLOAT16) FN(gather_as)(from, dim, factor, to, ld, FLOAT16);
    if (dtype == BFLOAT16) FN(gather_as)(from, dim, factor, to, ld, BFLOAT16);
}

/* Write `to[lane][d] = factor[lane] * from[d][lane]` for the lanes that are in `valid`. */
INLINE void FN(scatter_as)(const float *from, int64_t dim, V factor, char *const *to, uint32_t valid, const int dtype) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t d = 0; d < dim; d += LANES) {
        V x[LANES];
        if (d + LANES <= dim) {
            EACH (i, LANES) x[i] = load(from + (d + i) * LANES) * factor;
            FN(transpose)(x);
            EACH (lane, LANES)
                if (valid >> lane & 1) FN(store_as)(to[lane] + d * size, x[lane], dtype);
        } else {
            float rest[LANES];
            for (int64_t i = 0; i < LANES; i++) x[i] = i < dim - d ? load(from + (d + i) * LANES) * factor : ALL(0);
            FN(transpose)(x);
            for (int lane = 0; lane < LANES; lane++)
                if (valid >> lane & 1) {
                    FN(store_as)(rest, x[lane], dtype);
                    memcpy(to[lane] + d * size, rest, (dim - d) * size);
                }
        }
    }
}

static __attribute__((noinline)) void FN(scatter)(
    const float *from, int64_t dim, const float *factor, char *const *to, uint32_t valid, int dtype) {
    V f = load(factor);
    if (dtype == FLOAT32) FN(scatter_as)(from, dim, f, to, valid, FLOAT32);
    if (dtype == FLOAT16) FN(scatter_as)(from, dim, f, to, valid, FLOAT16);
    if (dtype == BFLOAT16) FN(scatter_as)(from, dim, f, to, valid, BFLOAT16);
}

/* Scores of R rows of a tile with S offsets of one key row, on top of the bias. */
INLINE void FN(dot)(
    const int R, const int S, int64_t dim, const float *q, const float *k, int64_t ld, int64_t next, const float *bias,
    int64_t bias_row, int64_t bias_next, float *out, int64_t out_row) {
    V sum[MOST_ROWS][8];
    EACH (r, R)
        EACH (s, S) sum[r][s] = load(bias + r * bias_row + s * bias_next);
    for (int64_t d = 0; d < dim; d++, k += ld, q += LANES) {
        V x[MOST_ROWS];
        EACH (r, R) {
            x[r] = load(q + r * dim * LANES);
            IN_REGISTER(x[r]);
        }
        EACH (s, S) {
            V y = load(k + s * next);
            IN_REGISTER(y);
            EACH (r, R) sum[r][s] += x[r] * y;
        }
    }
    EACH (r, R)
        EACH (s, S) store(out + r * out_row + s * LANES, sum[r][s]);
}

#define DOT(R, S)                                                                                                     \
    case R * 16 + S:                                                                                                  \
        if (R <= MOST_ROWS && S <= MOST_COLUMNS(R))                                                                   \
            FN(dot)(                                                                                                  \
                R <= MOST_ROWS ? R : 1, S <= MOST_COLUMNS(R) ? S : 1, dim, q, k, ld, next, bias, bias_row, bias_next, \
                out, out_row);                                                                                        \
        break;
#define DOTS(R) DOT(R, 1) DOT(R, 2) DOT(R, 3) DOT(R, 4) DOT(R, 5) DOT(R, 6) DOT(R, 7) DOT(R, 8)

static __attribute__((noinline)) void FN(scores)(
    int rows, int count, int64_t dim, const float *q, const float *k, int64_t ld, int64_t next, const float *bias,
    int64_t bias_row, int64_t bias_next, float *out, int64_t out_row) {
    for (int left = count, width; left; left -= width) {
        const int most = MOST_COLUMNS(rows);
        width = left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
        switch (rows * 16 + width) { DOTS(1) DOTS(2) DOTS(3) DOTS(4) }
        k += width * next;
        bias += width * bias_next;
        out += width * LANES;
    }
}
#undef DOTS
#undef DOT

/* Add the weighted values of one key row to D dims of the sums of the rows of a tile that see it. */
INLINE void FN(add_row)(
    const int from, const int to, const int D, const int masked, V (*sum)[8], const float *v, int count, int64_t ld,
    int64_t next, const int32_t *mask, const float *weight, int64_t weight_row) {
    for (int s = 0; s < count; s++, v += next, weight += LANES) {
        V x[MOST_ROWS];
        I keep;
        if (masked) keep = (I)load((const float *)mask + s * LANES);
        EACH (r, MOST_ROWS)
            if (r >= from && r < to) {
                x[r] = load(weight + r * weight_row);
                IN_REGISTER(x[r]);
            }
        EACH (d, D) {
            V y = load(v + d * ld);
            if (masked) y = (V)((I)y & keep); /* a weight of 0 would not silence NaN and infinity */
            IN_REGISTER(y);
            EACH (r, MOST_ROWS)
                if (r >= from && r < to) sum[r][d] += x[r] * y;
        }
    }
}

#define SEEN(from, to)                                                                                    \
    case from * 8 + to:                                                                                   \
        if (to <= R) FN(add_row)(from, to, D, masked, sum, v, count, ld, next, mask, w, weight_row); \
        break;

/* Add the weighted values of some key rows to D dims of the sums of a tile's R rows, which stay in registers. */
INLINE void FN(add)(
    const int R, const int D, const int masked, const key_row *key, int keys, int use_a, int count, int64_t at,
    int64_t ld, int64_t next, const int32_t *mask, const float *weight, int64_t weight_row, float *out,
    int64_t out_row) {
    V sum[MOST_ROWS][8];
    EACH (r, R)
        EACH (d, D) sum[r][d] = load(out + r * out_row + d * LANES);
    for (int i = 0; i < keys; i++) {
        const float *v = (use_a ? key[i].a : key[i].b) + at, *w = weight + key[i].weight;
        switch (key[i].from * 8 + key[i].to) {
            SEEN(0, 1) SEEN(0, 2) SEEN(0, 3) SEEN(1, 2) SEEN(1, 3) SEEN(2, 3)
#if MOST_ROWS == 4
            SEEN(0, 4) SEEN(1, 4) SEEN(2, 4) SEEN(3, 4)
#endif
        }
    }
    EACH (r, R)
        EACH (d, D) store(out + r * out_row + d * LANES, sum[r][d]);
}
#undef SEEN

#define ADD(R, D)                                                                                                  \
    case R * 16 + D:                                                                                               \
        if (R <= MOST_ROWS && D <= MOST_DIMS(R)) {                                                                 \
            const int r_ = R <= MOST_ROWS ? R : 1, d_ = D <= MOST_DIMS(R) ? D : 1;                                 \
            if (mask)                                                                                              \
                FN(add)(                                                                                           \
                    r_, d_, 1, key, keys, use_a, count, from, ld, next, mask, weight, weight_row, to, out_row); \
            else                                                                                                   \
                FN(add)(                                                                                           \
                    r_, d_, 0, key, keys, use_a, count, from, ld, next, mask, weight, weight_row, to, out_row); \
        }                                                                                                          \
        break;
#define ADDS(R) ADD(R, 1) ADD(R, 2) ADD(R, 4) ADD(R, 8)

/* Add the weighted values of some key rows to the sums of a tile's rows. */
static __attribute__((noinline)) void FN(weighted)(
    int rows, int64_t dim, const key_row *key, int keys, int use_a, int count, int64_t at, int64_t ld, int64_t next,
    const int32_t *mask, const float *weight, int64_t weight_row, float *out, int64_t out_row) {
    for (int64_t d = 0, width; d < dim; d += width) {
        width = MOST_DIMS(rows);
        while (width > dim - d) width /= 2;
        const int64_t from = at + d * ld;
        float *to = out + d * LANES;
        switch (rows * 16 + (int)width) { ADDS(1) ADDS(2) ADDS(3) ADDS(4) }
    }
}
#undef ADDS
#undef ADD

/* The addresses of a row's lanes at one vector of columns; lanes beyond the map repeat its last column. */
INLINE void FN(lanes_of)(
    const plan *p, const tensor *t, const int64_t *plane, int depth, int height, int vector, int64_t size,
    char **lane) {
    int64_t row = depth * t->position[0] + height * t->position[1];
    int width = LANES / p->group, last = p->width.length - 1;
    for (int c = 0; c < width; c++) {
        int column = vector * width + c;
        int64_t at = row + (column < last ? column : last) * t->position[2];
        for (int g = 0; g < p->group; g++)
            lane[c * p->group + g] = (char *)(intptr_t)(t->data + (at + plane[g]) * size);
    }
}

/* Ask for a row's next vector of columns: its lanes lie too far apart for the hardware to foresee. */
INLINE void FN(prefetch)(
    const plan *p, const tensor *t, const int64_t *plane, int depth, int height, int vector, int64_t bytes,
    int64_t size) {
    char *lane[LANES];
    if (vector >= p->vectors) return;
    FN(lanes_of)(p, t, plane, depth, height, vector, size, lane);
    for (int i = 0; i < LANES; i++)
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(lane[i] + byte);
}

/* Where the planes of a vector begin in a tensor; planes beyond the last repeat it. */
INLINE void FN(planes_of)(const plan *p, const tensor *t, int first, int64_t heads, int64_t *plane) {
    int64_t share = p->a->heads / heads;
    for (int g = 0; g < p->group; g++) {
        int64_t i = first + g < p->planes ? first + g : p->planes - 1;
        plane[g] = i / p->a->heads * t->batch + i % p->a->heads / share * t->head;
    }
}

INLINE uint32_t FN(valid_lanes)(const plan *p, int first, int vector) {
    uint32_t valid = 0;
    for (int lane = 0; lane < LANES; lane++) {
        int column = vector * (LANES / p->group) + lane / p->group;
        if (column < p->width.length && first + lane % p->group < p->planes) valid |= 1u << lane;
    }
    return valid;
}

INLINE V FN(gather_one)(char *const *lane) {
    V x;
    for (int i = 0; i < LANES; i++) x[i] = *(const float *)lane[i];
    return x;
}

INLINE void FN(scatter_one)(V x, char *const *lane, uint32_t valid) {
    for (int i = 0; i < LANES; i++)
        if (valid >> i & 1) *(float *)lane[i] = x[i];
}

typedef struct {
    int64_t query[LANES], key[LANES], value[LANES], out[LANES], lse[LANES];
    int64_t grad_out[LANES], grad_query[LANES], grad_key[LANES], grad_value[LANES];
} FN(planes);

/* Ask for what `fill_row` reads of one vector of columns. */
static void FN(prefetch_row)(const plan *p, const FN(planes) * plane, int depth, int height, int v) {
    const call *a = p->a;
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2;
    const int keyed = p->pass == BACKWARD_KEY;
    FN(prefetch)(
        p, keyed ? &a->query : &a->key, keyed ? plane->query : plane->key, depth, height, v, a->dim * size, size);
    FN(prefetch)(
        p, keyed ? &a->grad_out : &a->value, keyed ? plane->grad_out : plane->value, depth, height, v, a->dim_v * size,
        size);
}

/* Transpose one row of keys and values, or backward of queries and what belongs to them, into the ring. */
static void FN(fill_row)(
    const plan *p, const FN(planes) * plane, const tensor *lse, int depth, int height, int v_from, int v_to,
    float *row) {
    const call *a = p->a;
    int64_t size = a->dtype == FLOAT32 ? 4 : 2;
    char *lane[LANES];
    int from = v_from - (int)(p->lead / LANES), end = v_to + (int)(p->tail / LANES);
    for (int v = from > 0 ? from : 0; v < end && v < p->vectors; v++) {
        float *to = row + p->lead + (v - v_from) * LANES;
        const int keyed = p->pass == BACKWARD_KEY;
        FN(prefetch_row)(p, plane, depth, height, v + 1);
        if (!keyed) {
            FN(lanes_of)(p, &a->key, plane->key, depth, height, v, size, lane);
            FN(gather)(lane, a->dim, 1, to, p->ld, (int)a->dtype);
            FN(lanes_of)(p, &a->value, plane->value, depth, height, v, size, lane);
            FN(gather)(lane, a->dim_v, 1, to + a->dim * p->ld, p->ld, (int)a->dtype);
            continue;
        }
        FN(lanes_of)(p, &a->query, plane->query, depth, height, v, size, lane);
        FN(gather)(lane, a->dim, 1, to, p->ld, (int)a->dtype);
        FN(lanes_of)(p, &a->grad_out, plane->grad_out, depth, height, v, size, lane);
        FN(gather)(lane, a->dim_v, 1, to + a->dim * p->ld, p->ld, (int)a->dtype);
        to += (a->dim + a->dim_v) * p->ld;
        FN(lanes_of)(p, lse, plane->lse, depth, height, v, 4, lane);
        store(to, FN(gather_one)(lane) * LOG2E);
        int64_t shift = a->delta - a->lse;
        for (int i = 0; i < LANES; i++) lane[i] += shift;
        store(to + p->ld, FN(gather_one)(lane));
    }
}

/* Softmax, one block of rows after another: scores become weights, sums so far are scaled to the new maximum. */
static void FN(softmax)(
    const key_row *key, int keys, int r, int rows, int count, const int32_t *mask, float *score, int first, V *most,
    V *total, float *sum, int64_t dim) {
    V top[2] = {*most, *most};
    for (int i = 0; i < keys; i++) {
        if (r < key[i].from || r >= key[i].to) continue;
        float *x = score + ((int64_t)i * rows + r) * count * LANES;
        if (mask)
            for (int s = 0; s < count; s++)
                store(
                    x + s * LANES,
                    FN(select)((I)load((const float *)mask + s * LANES), load(x + s * LANES), ALL(-INFINITY)));
        int s = 0;
        for (; s + 1 < count; s += 2) {
            top[0] = FN(larger)(top[0], load(x + s * LANES));
            top[1] = FN(larger)(top[1], load(x + (s + 1) * LANES));
        }
        if (s < count) top[0] = FN(larger)(top[0], load(x + s * LANES));
    }
    top[0] = FN(larger)(top[0], top[1]);
    /* Where every score is -inf so far, any finite value serves: the weights are 0. */
    V base = FN(select)((I)(top[0] == ALL(-INFINITY)), ALL(0), top[0]);
    V part[2] = {ALL(0), ALL(0)};
    if (!first) {
        V factor = FN(exp2)(*most - base);
        part[0] = *total * factor;
        for (int64_t d = 0; d < dim; d++) store(sum + d * LANES, load(sum + d * LANES) * factor);
    }
    *most = top[0];
    for (int i = 0; i < keys; i++) {
        if (r < key[i].from || r >= key[i].to) continue;
        float *x = score + ((int64_t)i * rows + r) * count * LANES;
        int s = 0;
        for (; s + 1 < count; s += 2) { /* an index that isn't constant would keep the sums in memory */
            V w = FN(exp2)(load(x + s * LANES) - base), other = FN(exp2)(load(x + (s + 1) * LANES) - base);
            store(x + s * LANES, w);
            store(x + (s + 1) * LANES, other);
            part[0] += w;
            part[1] += other;
        }
        if (s < count) {
            V w = FN(exp2)(load(x + s * LANES) - base);
            store(x + s * LANES, w);
            part[0] += w;
        }
    }
    *total = part[0] + part[1];
}

/* The gradient of the scores from that of the weights, both over the scores' memory; backward only. */
static void FN(score_gradients)(
    const plan *p, const key_row *key, int keys, int rows, const columns *c, int64_t at, int64_t next, float *score,
    float *grad, const V *lse, const V *delta) {
    const int64_t beside = (p->a->dim + p->a->dim_v) * p->ld;
    for (int i = 0; i < keys; i++)
        for (int r = key[i].from; r < key[i].to; r++) {
            float *x = score + ((int64_t)i * rows + r) * c->count * LANES;
            float *g = grad + ((int64_t)i * rows + r) * c->count * LANES;
            const float *row = key[i].a + beside + at;
            for (int s = 0; s < c->count; s++) {
                V l = p->pass == BACKWARD_KEY ? load(row + s * next) : lse[r];
                V e = p->pass == BACKWARD_KEY ? load(row + s * next + p->ld) : delta[r];
                V w = FN(exp2)(load(x + s * LANES) - l), y = w * (load(g + s * LANES) - e);
                if (c->mask) {
                    I keep = (I)load((const float *)c->mask + s * LANES);
                    w = (V)((I)w & keep);
                    y = (V)((I)y & keep);
                }
                store(x + s * LANES, w);
                store(g + s * LANES, y);
            }
        }
}

/* One group of planes, some layers, some tiles of rows. */
static void FN(run)(plan *p, int task, float *scratch) {
    const call *a = p->a;
    const int pass = p->pass, forward = pass == FORWARD;
    const share mine = share_of(p, task);
    const int first_plane = mine.first_plane, v_from = mine.v_from, v_to = mine.v_to;
    const axis *z = &p->depth, *y = &p->height;
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2, dim = a->dim, dim_v = a->dim_v, ld = p->ld;
    const int64_t next = a->step[2] * p->group;
    const int64_t width = 2 * a->reach[2] + 1;
    const int dtype = (int)a->dtype;

    const tensor lse = {
        a->lse,
        a->length[0] * a->length[1] * a->length[2] * a->heads,
        {a->length[1] * a->length[2] * a->heads, a->length[2] * a->heads, a->heads},
        1,
    };
    FN(planes) plane;
    FN(planes_of)(p, &a->query, first_plane, a->heads, plane.query);
    FN(planes_of)(p, &a->key, first_plane, a->heads_kv, plane.key);
    FN(planes_of)(p, &a->value, first_plane, a->heads_kv, plane.value);
    FN(planes_of)(p, &a->out, first_plane, a->heads, plane.out);
    FN(planes_of)(p, &lse, first_plane, a->heads, plane.lse);
    if (!forward) {
        FN(planes_of)(p, &a->grad_out, first_plane, a->heads, plane.grad_out);
        FN(planes_of)(p, &a->grad_query, first_plane, a->heads, plane.grad_query);
        FN(planes_of)(p, &a->grad_key, first_plane, a->heads, plane.grad_key);
        FN(planes_of)(p, &a->grad_value, first_plane, a->heads, plane.grad_value);
    }

    const int64_t ring_rows = p->layers * p->ring, row_scores = MOST_ROWS * p->most_columns * LANES;
    float *ring = scratch, *tile_a = ring + ring_rows * p->ring_row, *tile_b = tile_a + MOST_ROWS * dim * LANES;
    float *sum_a = tile_b + MOST_ROWS * dim_v * LANES, *sum_b = sum_a + MOST_ROWS * dim * LANES;
    float *score = sum_b + MOST_ROWS * dim_v * LANES, *grad = score + p->block * row_scores;
    float *bias = grad + p->block * row_scores, *grad_bias = bias + (a->bias ? p->entries * LANES : 0);
    key_row *key = (key_row *)(grad_bias + (a->bias ? p->entries * LANES : 0));
    float zero[LANES] = {0};

    if (a->bias)
        for (int lane = 0; lane < LANES; lane++) {
            int i = first_plane + lane % p->group;
            const float *from = (const float *)(intptr_t)a->bias + i % a->heads * p->entries;
            for (int64_t e = 0; e < p->entries; e++) bias[e * LANES + lane] = from[e] * LOG2E;
        }
    if (p->partial) memset(grad_bias, 0, p->entries * LANES * sizeof(float));
    /* A lane per key looks at queries, so its offsets are those of the bias mirrored. */
    const int64_t mirror = pass == BACKWARD_KEY ? -1 : 1;
    const int64_t bias_row = a->bias ? -mirror * width * LANES : 0, bias_next = a->bias ? mirror * LANES : 0;

    /* Columns beside the map are computed with and masked: what was there might be denormal, a hundred times as slow. */
    memset(ring, 0, ring_rows * p->ring_row * sizeof(float));
    int filled = 0;
    for (int t = mine.tile_from; t < mine.tile_to; t++) {
        const int start = p->tile[t].start, rows = p->tile[t].rows;
        const int low = y->low[start], high = y->high[start + rows - 1];
        for (filled = filled > low ? filled : low; filled < high; filled++)
            for (int layer = mine.layer_from; layer < mine.layer_to; layer++)
                FN(fill_row)(
                    p, &plane, &lse, z->position[layer], y->position[filled], v_from, v_to,
                    ring + ((layer - mine.layer_from) * p->ring + filled % p->ring) * p->ring_row);

        for (int zi = mine.z_from; zi < mine.z_to; zi++) {
            const int keys = list_rows(p, &mine, &p->tile[t], zi, ring, key);
            for (int v = v_from; v < v_to; v++) {
                const columns *c = &p->columns[v];
                const int64_t at = (int64_t)(v - v_from) * LANES + c->first * next,
                              row_size = (int64_t)c->count * LANES;
                const uint32_t valid = FN(valid_lanes)(p, first_plane, v);
                char *lane[LANES];
                V most[MOST_ROWS], total[MOST_ROWS], row_lse[MOST_ROWS], delta[MOST_ROWS];
                for (int r = 0; r < rows; r++) {
                    const int depth_at = z->position[zi], height_at = y->position[start + r];
                    float *to_a = tile_a + r * dim * LANES, *to_b = tile_b + r * dim_v * LANES;
                    const int keyed = pass == BACKWARD_KEY;
                    FN(lanes_of)(
                        p, keyed ? &a->key : &a->query, keyed ? plane.key : plane.query, depth_at, height_at, v, size,
                        lane);
                    FN(gather)(lane, dim, (float)a->scale * LOG2E, to_a, LANES, dtype);
                    FN(prefetch)(
                        p, keyed ? &a->key : &a->query, keyed ? plane.key : plane.query, depth_at, height_at, v + 1,
                        dim * size, size);
                    most[r] = ALL(-INFINITY);
                    total[r] = ALL(0);
                    if (forward) continue;
                    FN(lanes_of)(
                        p, keyed ? &a->value : &a->grad_out, keyed ? plane.value : plane.grad_out, depth_at, height_at,
                        v, size, lane);
                    FN(gather)(lane, dim_v, 1, to_b, LANES, dtype);
                    if (keyed) continue;
                    FN(lanes_of)(p, &a->out, plane.out, depth_at, height_at, v, size, lane);
                    FN(gather)(lane, dim_v, 1, sum_b, LANES, dtype);
                    delta[r] = ALL(0);
                    for (int64_t d = 0; d < dim_v; d++) delta[r] += load(to_b + d * LANES) * load(sum_b + d * LANES);
                    FN(lanes_of)(p, &lse, plane.lse, depth_at, height_at, v, 4, lane);
                    row_lse[r] = FN(gather_one)(lane) * LOG2E;
                    if (a->grad_lse) {
                        for (int i = 0; i < LANES; i++) lane[i] += a->grad_lse - a->lse;
                        delta[r] -= FN(gather_one)(lane);
                        for (int i = 0; i < LANES; i++) lane[i] -= a->grad_lse - a->lse;
                    }
                    for (int i = 0; i < LANES; i++) lane[i] += a->delta - a->lse;
                    FN(scatter_one)(delta[r], lane, valid);
                }
                if (pass != FORWARD) memset(sum_a, 0, rows * dim * LANES * sizeof(float));
                if (pass != BACKWARD_QUERY) memset(sum_b, 0, rows * dim_v * LANES * sizeof(float));

                for (int from = 0; from < keys; from += (int)p->block) {
                    const key_row *k = key + from;
                    const int held = keys - from < p->block ? keys - from : (int)p->block;
                    for (int i = 0; i < held; i++) {
                        const int seen = k[i].to - k[i].from;
                        key[from + i].weight = (int64_t)i * rows * row_size;
                        const int64_t skip = (int64_t)i * rows + k[i].from;
                        const float *b =
                            a->bias ? bias + (k[i].bias + mirror * c->first) * LANES + k[i].from * bias_row : zero;
                        FN(scores)(
                            seen, c->count, dim, tile_a + k[i].from * dim * LANES, k[i].a + at, ld, next, b, bias_row,
                            bias_next, score + skip * row_size, row_size);
                        if (!forward)
                            FN(scores)(
                                seen, c->count, dim_v, tile_b + k[i].from * dim_v * LANES, k[i].b + at, ld, next, zero,
                                0, 0, grad + skip * row_size, row_size);
                    }
                    if (forward)
                        for (int r = 0; r < rows; r++)
                            FN(softmax)(
                                k, held, r, rows, c->count, c->mask, score, from == 0, &most[r], &total[r],
                                sum_b + r * dim_v * LANES, dim_v);
                    else
                        FN(score_gradients)(p, k, held, rows, c, at, next, score, grad, row_lse, delta);

                    if (pass != BACKWARD_QUERY)
                        FN(weighted)(
                            rows, dim_v, k, held, 0, c->count, at, ld, next, c->mask, score, row_size, sum_b,
                            dim_v * LANES);
                    if (pass != FORWARD)
                        FN(weighted)(
                            rows, dim, k, held, 1, c->count, at, ld, next, c->mask, grad, row_size, sum_a,
                            dim * LANES);
                    if (p->partial)
                        for (int i = 0; i < held; i++)
                            for (int r = k[i].from; r < k[i].to; r++) {
                                const float *g = grad + ((int64_t)i * rows + r) * row_size;
                                float *to = grad_bias + (k[i].bias + c->first - r * width) * LANES;
                                for (int64_t s = 0; s < row_size; s += LANES) store(to + s, load(to + s) + load(g + s));
                            }
                }

                for (int r = 0; r < rows; r++) {
                    const int depth_at = z->position[zi], height_at = y->position[start + r];
                    float factor[LANES];
                    if (forward) {
                        store(factor, ALL(1) / total[r]);
                        FN(lanes_of)(p, &a->out, plane.out, depth_at, height_at, v, size, lane);
                        FN(scatter)(sum_b + r * dim_v * LANES, dim_v, factor, lane, valid, dtype);
                        if (!a->lse) continue;
                        FN(lanes_of)(p, &lse, plane.lse, depth_at, height_at, v, 4, lane);
                        for (int i = 0; i < LANES; i++)
                            if (valid >> i & 1) *(float *)lane[i] = most[r][i] * LN2 + logf(total[r][i]);
                        continue;
                    }
                    store(factor, ALL(a->scale));
                    const tensor *to = pass == BACKWARD_KEY ? &a->grad_key : &a->grad_query;
                    FN(lanes_of)(
                        p, to, pass == BACKWARD_KEY ? plane.grad_key : plane.grad_query, depth_at, height_at, v, size,
                        lane);
                    FN(scatter)(sum_a + r * dim * LANES, dim, factor, lane, valid, dtype);
                    if (pass != BACKWARD_KEY) continue;
                    store(factor, ALL(1));
                    FN(lanes_of)(p, &a->grad_value, plane.grad_value, depth_at, height_at, v, size, lane);
                    FN(scatter)(sum_b + r * dim_v * LANES, dim_v, factor, lane, valid, dtype);
                }
            }
        }
    }
    if (p->partial)
        for (int g = 0; g < p->group; g++) {
            float *to = p->partial + ((int64_t)mine.part * p->groups * p->group + first_plane + g) * p->entries;
            for (int64_t e = 0; e < p->entries; e++) {
                float sum = 0;
                for (int lane = g; lane < LANES; lane += p->group) sum += grad_bias[e * LANES + lane];
                to[e] = sum;
            }
        }
}

/* Read the weights that queries have for the lanes' keys. */
INLINE void FN(read_pairs_as)(
    const char *row, const columns *c, int group, const int64_t *plane, float *to, const int dtype) {
    for (int64_t n = 0; n < (int64_t)c->count * LANES; n += LANES)
        for (int l = 0; l < LANES; l++) {
            const int64_t slot = c->slot[n + l], at = slot + plane[l % group];
            if (dtype == FLOAT32) to[n + l] = slot < 0 ? 0 : ((const float *)row)[at];
            if (dtype == FLOAT16) to[n + l] = slot < 0 ? 0 : half_to_float(((const uint16_t *)row)[at]);
            if (dtype == BFLOAT16) {
                uint32_t bits = slot < 0 ? 0 : (uint32_t)((const uint16_t *)row)[at] << 16;
                memcpy(to + n + l, &bits, 4);
            }
        }
}

static void FN(read_pairs)(
    const char *row, const columns *c, int group, const int64_t *plane, float *to, int dtype) {
    if (dtype == FLOAT32) FN(read_pairs_as)(row, c, group, plane, to, FLOAT32);
    if (dtype == FLOAT16) FN(read_pairs_as)(row, c, group, plane, to, FLOAT16);
    if (dtype == BFLOAT16) FN(read_pairs_as)(row, c, group, plane, to, BFLOAT16);
}

/* Where the weights of a key row begin among those by slot of a tile's rows: at the first row that sees it. */
INLINE int64_t FN(slot_of)(
    const plan *p, const key_row *key, int zi, int start, int64_t slots_y, int64_t slots_x, int64_t slots) {
    const int64_t slot_z = key->layer - p->depth.first[zi], slot_y = key->row - p->height.first[start + key->from];
    return key->from * slots + (slot_z * slots_y + slot_y) * slots_x;
}

/* Write the scores of one row of keys, by offset and lane, to each query's run of slots at `to`. */
static void FN(write_runs)(
    const float *x, const columns *c, char *const *to, float *spare, uint32_t valid, int dtype) {
#if LANES == 16
    if (dtype == FLOAT32 && c->count <= LANES) {
        V row[LANES];
        EACH (i, LANES) {
            row[i] = ALL(0);
            if (i < c->count) row[i] = load(x + i * LANES);
        }
        FN(transpose)(row);
        EACH (l, LANES)
            if (valid >> l & 1) {
                const uint32_t run = (1u << c->run[3 * l + 2]) - 1;
                _mm512_mask_storeu_ps(
                    to[l], (__mmask16)run, _mm512_maskz_compress_ps((__mmask16)(run << c->run[3 * l + 1]), row[l]));
            }
        return;
    }
#endif
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    float one[LANES];
    char *lane[LANES];
    store(one, ALL(1));
    for (int l = 0; l < LANES; l++) lane[l] = (char *)spare + l * c->count * size;
    FN(scatter)(x, c->count, one, lane, valid, dtype);
    for (int l = 0; l < LANES; l++)
        if (valid >> l & 1) memcpy(to[l], lane[l] + c->run[3 * l + 1] * size, c->run[3 * l + 2] * size);
}

/* Read each query's run of slots at `from` as weights by offset and lane, 0 where a lane has none. */
static void FN(read_runs)(float *x, const columns *c, char *const *from, float *spare, int dtype) {
#if LANES == 16
    if (dtype == FLOAT32 && c->count <= LANES) {
        V row[LANES];
        EACH (l, LANES) {
            const uint32_t run = (1u << c->run[3 * l + 2]) - 1;
            row[l] = _mm512_maskz_expand_ps(
                (__mmask16)(run << c->run[3 * l + 1]), _mm512_maskz_loadu_ps((__mmask16)run, from[l]));
        }
        FN(transpose)(row);
        EACH (i, LANES)
            if (i < c->count) store(x + i * LANES, row[i]);
        return;
    }
#endif
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    char *lane[LANES];
    memset(spare, 0, (int64_t)c->count * LANES * sizeof(float));
    for (int l = 0; l < LANES; l++) {
        lane[l] = (char *)spare + l * c->count * size;
        memcpy(lane[l] + c->run[3 * l + 1] * size, from[l], c->run[3 * l + 2] * size);
    }
    FN(gather)(lane, c->count, 1, x, LANES, dtype);
}

/* A product of unfused attention. `key` is what lies in the ring: keys, values, or what is scattered; `value` are the
 * weights or scores, by slot; `query` is read for scores, `out` written else. */
static void FN(product)(plan *p, int task, float *scratch) {
    const call *a = p->a;
    const int pass = p->pass, dtype = (int)a->dtype;
    const share mine = share_of(p, task);
    const axis *z = &p->depth, *y = &p->height;
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2, dim = a->dim, ld = p->ld, next = a->step[2] * p->group;
    const int64_t slots_y = a->reach[1] + 1, slots_x = a->reach[2] + 1, slots = (a->reach[0] + 1) * slots_y * slots_x;
    FN(planes) plane;
    FN(planes_of)(p, &a->query, mine.first_plane, a->heads, plane.query);
    FN(planes_of)(p, &a->key, mine.first_plane, a->heads, plane.key);
    FN(planes_of)(p, &a->value, mine.first_plane, a->heads, plane.value);
    FN(planes_of)(p, &a->out, mine.first_plane, a->heads, plane.out);
    float *ring = scratch, *tile_a = ring + p->layers * p->ring * p->ring_row;
    float *sum = tile_a + MOST_ROWS * dim * LANES, *score = sum + MOST_ROWS * dim * LANES;
    float *held = score + p->block * MOST_ROWS * p->most_columns * LANES;
    key_row *key = (key_row *)(held + MOST_ROWS * (slots + p->most_columns) * LANES);
    float zero[LANES] = {0}, one[LANES];
    store(one, ALL(1));
    memset(ring, 0, p->layers * p->ring * p->ring_row * sizeof(float)); /* see `run` */

    int filled = 0;
    for (int t = mine.tile_from; t < mine.tile_to; t++) {
        const int start = p->tile[t].start, rows = p->tile[t].rows;
        const int low = y->low[start], high = y->high[start + rows - 1];
        for (filled = filled > low ? filled : low; filled < high; filled++)
            for (int layer = mine.layer_from; layer < mine.layer_to; layer++)
                FN(fill_row)(
                    p, &plane, NULL, z->position[layer], y->position[filled], mine.v_from, mine.v_to,
                    ring + ((layer - mine.layer_from) * p->ring + filled % p->ring) * p->ring_row);
        /* How far a row's window is from that of the row before it; -1 if that differs within the tile. */
        int step = rows > 1 ? y->first[start + 1] - y->first[start] : 0;
        for (int r = 2; r < rows; r++)
            if (y->first[start + r] - y->first[start + r - 1] != step) step = -1;
        for (int zi = mine.z_from; zi < mine.z_to; zi++) {
            const int keys = list_rows(p, &mine, &p->tile[t], zi, ring, key);
            for (int v = mine.v_from; v < mine.v_to; v++) {
                const columns *c = &p->columns[v];
                const int64_t at = (int64_t)(v - mine.v_from) * LANES + c->first * next,
                              row_size = (int64_t)c->count * LANES;
                const uint32_t valid = FN(valid_lanes)(p, mine.first_plane, v);
                char *lane[LANES];
                /* Where all lanes have the same slots, and rows advance evenly, the arithmetic works on the weights by
                 * slot, of one row after another; else on offsets, in `score`. */
                const int by_slot = pass != SCATTER && !c->mask && step >= 0;
                const int64_t slot_row = by_slot ? (slots - step * slots_x) * LANES : row_size;
                if (pass == SCORES) {
                    if (by_slot && (c->count < slots_x || z->high[zi] - z->low[zi] <= a->reach[0] ||
                                    y->high[start] - y->low[start] <= a->reach[1]))
                        memset(held, 0, rows * slots * LANES * sizeof(float)); /* some slots have no key */
                    for (int r = 0; r < rows; r++) {
                        FN(lanes_of)(
                            p, &a->query, plane.query, z->position[zi], y->position[start + r], v, size, lane);
                        FN(gather)(lane, dim, 1, tile_a + r * dim * LANES, LANES, dtype);
                    }
                    for (int i = 0; i < keys; i++)
                        FN(scores)(
                            key[i].to - key[i].from, c->count, dim, tile_a + key[i].from * dim * LANES, key[i].a + at,
                            ld, next, zero, 0, 0,
                            by_slot ? held + FN(slot_of)(p, &key[i], zi, start, slots_y, slots_x, slots) * LANES
                                    : score + ((int64_t)i * rows + key[i].from) * row_size,
                            slot_row);
                }
                for (int r = 0; r < rows; r++) {
                    if (by_slot) {
                        float *row = held + r * slots * LANES;
                        FN(lanes_of)(
                            p, &a->value, plane.value, z->position[zi], y->position[start + r], v, size, lane);
                        if (pass == SCORES) FN(scatter)(row, slots, one, lane, valid, dtype);
                        if (pass == VALUES) FN(gather)(lane, slots, 1, row, LANES, dtype);
                        continue;
                    }
                    for (int i = 0; i < keys; i++) {
                        if (r < key[i].from || r >= key[i].to) continue;
                        float *x = score + ((int64_t)i * rows + r) * row_size;
                        int depth = zi, height = start + r, slot_z = key[i].layer - z->first[zi],
                            slot_y = key[i].row - y->first[start + r];
                        if (pass == SCATTER) {
                            depth = key[i].layer;
                            height = key[i].row;
                            slot_z = zi - z->first[depth];
                            slot_y = start + r - y->first[height];
                        }
                        char *row = (char *)(intptr_t)a->value.data +
                                    (z->position[depth] * a->value.position[0] +
                                     y->position[height] * a->value.position[1] +
                                     (slot_z * slots_y + slot_y) * slots_x) *
                                        size;
                        if (pass == SCATTER) {
                            FN(read_pairs)(row, c, p->group, plane.value, x, dtype);
                            continue;
                        }
                        for (int l = 0; l < LANES; l++)
                            lane[l] = row + (c->run[3 * l] + plane.value[l % p->group]) * size;
                        if (pass == SCORES) FN(write_runs)(x, c, lane, held, valid, dtype);
                        if (pass == VALUES) FN(read_runs)(x, c, lane, held, dtype);
                    }
                }
                if (pass == SCORES) continue;
                memset(sum, 0, rows * dim * LANES * sizeof(float));
                for (int i = 0; i < keys; i++)
                    key[i].weight =
                        by_slot ? FN(slot_of)(p, &key[i], zi, start, slots_y, slots_x, slots) * LANES - key[i].from * slot_row
                                : (int64_t)i * rows * row_size;
                FN(weighted)(
                    rows, dim, key, keys, 1, c->count, at, ld, next, c->mask, by_slot ? held : score, slot_row, sum,
                    dim * LANES);
                for (int r = 0; r < rows; r++) {
                    FN(lanes_of)(p, &a->out, plane.out, z->position[zi], y->position[start + r], v, size, lane);
                    FN(scatter)(sum + r * dim * LANES, dim, one, lane, valid, dtype);
                }
            }
        }
    }
}

#undef V
#undef I
#undef U
#undef load
#undef store
#undef ALL
#undef IN_REGISTER
#undef ISA
#undef LANES
#undef MOST_ROWS
#undef MOST_COLUMNS
#undef MOST_DIMS
#endif
