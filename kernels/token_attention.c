/* Attention of few tokens on CPU cores, forward, float32: a lane is a query, and all is read where it lies.
 *
 * The tokens of a call lie in up to three axes of a batch, and within it in rows and columns: whole maps, sequences, or
 * the windows of a map. A task is some queries of one head.
 *
 * Nothing here knows torch.
 */
#include "query_lanes.h"

/* Address and strides in numbers; a head's channels lie side by side. */
typedef struct {
    int64_t data, batch[3], head, row, column;
} tensor;

/* One call, as token_attention_native.py packs it: eight bytes a field. */
typedef struct {
    int64_t threads, parallel, batch[3], heads, queries, query_width, keys, key_width, dim, dim_v;
    double scale;
    tensor query, key, value, out, bias; /* rows of the bias are queries, columns keys; its address may be 0 */
} call;

typedef struct {
    team team;
    const call *a;
    int64_t chunks, chunk; /* of the queries of a head: how many, and of how many queries */
} job;

INLINE float *at(const tensor *t, const int64_t *place, int64_t head) {
    return (float *)(intptr_t)t->data + place[0] * t->batch[0] + place[1] * t->batch[1] + place[2] * t->batch[2] +
           head * t->head;
}

INLINE void find_keys(const call *a, int64_t *key_at, int64_t *value_at) {
    for (int64_t n = 0, row = 0; n < a->keys; row++)
        for (int64_t column = 0; column < a->key_width && n < a->keys; column++, n++) {
            key_at[n] = row * a->key.row + column * a->key.column;
            value_at[n] = row * a->value.row + column * a->value.column;
        }
}

static void attend(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t number = task % j->chunks, head = task / j->chunks % a->heads, image = task / j->chunks / a->heads;
    const int64_t place[3] = {
        image / a->batch[2] / a->batch[1], image / a->batch[2] % a->batch[1], image % a->batch[2]};
    const int64_t from = number * j->chunk, end = from + j->chunk < a->queries ? from + j->chunk : a->queries;
    const grid in = {a->query.row, a->query.column, a->query_width}, to = {a->out.row, a->out.column, a->query_width};
    query_block b = lay_out_block(scratch, a->keys, a->dim, a->dim_v);
    b.key = at(&a->key, place, head), b.value = at(&a->value, place, head);
    find_keys(a, b.key_at, b.value_at);
    for (int64_t first = from; first < end; first += BLOCK) {
        const int64_t count = end - first < BLOCK ? end - first : BLOCK;
        take_queries(at(&a->query, place, head), in, first, count, a->dim, b.query);
        if (a->bias.data) {
            const score_bias bias = {at(&a->bias, place, head) + first * a->bias.row, a->bias.row, a->bias.column};
            attend_block(&b, &bias, (float)a->scale, count, 1);
        } else {
            attend_block(&b, NULL, (float)a->scale, count, 0);
        }
        put_queries(b.sums, at(&a->out, place, head), to, first, count, a->dim_v);
    }
}

EXPORTED(foveate_token_attention)(const call *a) {
    job j = {.team.run = attend, .a = a};
    const int64_t planes = a->batch[0] * a->batch[1] * a->batch[2] * a->heads, blocks = (a->queries + BLOCK - 1) / BLOCK;
    j.chunks = parts_of(planes, a->threads, blocks);
    j.chunk = (blocks + j.chunks - 1) / j.chunks * BLOCK; /* of the last ones nothing may be left */
    j.team.tasks = planes * j.chunks;
    j.team.scratch = scratch_of_block(a->keys, a->dim, a->dim_v);
    return share_out(a->parallel, a->threads, &j.team);
}
