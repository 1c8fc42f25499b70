/* Multi-scale deformable attention on CPU cores, forward and backward, float32 and contiguous.
 *
 * A plane is one head of one image. Each of a query's points reads the four pixels around it, whose channels lie side by
 * side, and no sample is kept: the backward pass reads the pixels again. Planes are shared out among threads, in the
 * forward pass in pieces of queries; nothing is added to by two threads, so gradients are deterministic.
 *
 * A point that is not finite gives values that are not numbers. Nothing here knows torch.
 */
#include "lanes.h"

#define PIECE 256 /* queries that a thread takes at once in the forward pass */

/* One call, as deformable_native.py packs it: eight bytes a field. */
typedef struct {
    int64_t threads, parallel, batch, pixels, heads, dim, queries, levels, points;
    int64_t shapes; /* int64 [levels][2], height and width */
    int64_t value, locations, weights, out;
    int64_t grad_out, grad_value, grad_locations, grad_weights; /* 0 in the forward pass */
} call;

typedef struct {
    team team;
    const call *a;
    int64_t pieces; /* of queries, for each plane */
} job;

/* The four pixels around a point: where they begin, and the point's share in each; 0 outside of the map. */
typedef struct {
    int64_t at[4];
    float x, y, inside_x[2], inside_y[2];
} corners;

/* Return 0 if no pixel is near. */
INLINE int find(corners *c, float x, float y, int64_t height, int64_t width, int64_t start, int64_t stride) {
    if (!(x > -1 && y > -1 && x < width && y < height)) return 0;
    int64_t left = (int64_t)floorf(x), top = (int64_t)floorf(y);
    c->x = x - left, c->y = y - top;
    c->inside_x[0] = left >= 0, c->inside_x[1] = left + 1 < width;
    c->inside_y[0] = top >= 0, c->inside_y[1] = top + 1 < height;
    for (int i = 0; i < 4; i++) {
        int64_t row = top + i / 2, column = left + i % 2;
        row = row < 0 ? 0 : row >= height ? height - 1 : row;
        column = column < 0 ? 0 : column >= width ? width - 1 : column;
        c->at[i] = (start + row * width + column) * stride;
    }
    return 1;
}

INLINE void shares(const corners *c, float *share) {
    float across[2] = {(1 - c->x) * c->inside_x[0], c->x * c->inside_x[1]};
    float down[2] = {(1 - c->y) * c->inside_y[0], c->y * c->inside_y[1]};
    for (int i = 0; i < 4; i++) share[i] = across[i % 2] * down[i / 2];
}

INLINE void add(float *out, const float *x, float factor, int64_t dim) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) *(V *)(out + d) += *(const V *)(x + d) * factor;
    for (; d < dim; d++) out[d] += x[d] * factor;
}

INLINE float dot(const float *a, const float *b, int64_t dim) {
    V sums = {0};
    float sum = 0;
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) sums += *(const V *)(a + d) * *(const V *)(b + d);
    for (; d < dim; d++) sum += a[d] * b[d];
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

static void forward(const call *a, int64_t plane, int64_t begin, int64_t end) {
    const int64_t image = plane / a->heads, head = plane % a->heads, stride = a->heads * a->dim;
    const int64_t *shapes = (const int64_t *)(intptr_t)a->shapes;
    const float *value = (const float *)(intptr_t)a->value + image * a->pixels * stride + head * a->dim;
    for (int64_t query = begin; query < end; query++) {
        int64_t row = (image * a->queries + query) * a->heads + head, point = row * a->levels * a->points, start = 0;
        float *out = (float *)(intptr_t)a->out + row * a->dim;
        memset(out, 0, a->dim * sizeof(float));
        for (int64_t level = 0; level < a->levels; level++) {
            int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
            for (int64_t i = 0; i < a->points; i++, point++) {
                const float *location = (const float *)(intptr_t)a->locations + 2 * point;
                float x = location[0] * width - 0.5f, y = location[1] * height - 0.5f, share[4];
                float weight = ((const float *)(intptr_t)a->weights)[point];
                corners c;
                if (!isfinite(x) || !isfinite(y)) {
                    for (int64_t d = 0; d < a->dim; d++) out[d] = NAN;
                } else if (find(&c, x, y, height, width, start, stride)) {
                    shares(&c, share);
                    for (int k = 0; k < 4; k++) add(out, value + c.at[k], share[k] * weight, a->dim);
                }
            }
            start += height * width;
        }
    }
}

static void backward(const call *a, int64_t plane) {
    const int64_t image = plane / a->heads, head = plane % a->heads, stride = a->heads * a->dim;
    const int64_t *shapes = (const int64_t *)(intptr_t)a->shapes;
    const int64_t first = image * a->pixels * stride + head * a->dim;
    const float *value = (const float *)(intptr_t)a->value + first;
    float *grad_value = (float *)(intptr_t)a->grad_value + first;
    for (int64_t query = 0; query < a->queries; query++) {
        int64_t row = (image * a->queries + query) * a->heads + head, point = row * a->levels * a->points, start = 0;
        const float *grad = (const float *)(intptr_t)a->grad_out + row * a->dim;
        for (int64_t level = 0; level < a->levels; level++) {
            int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
            for (int64_t i = 0; i < a->points; i++, point++) {
                const float *location = (const float *)(intptr_t)a->locations + 2 * point;
                float *grad_location = (float *)(intptr_t)a->grad_locations + 2 * point;
                float *grad_weight = (float *)(intptr_t)a->grad_weights + point;
                float x = location[0] * width - 0.5f, y = location[1] * height - 0.5f, share[4], found[4];
                float weight = ((const float *)(intptr_t)a->weights)[point];
                corners c;
                *grad_weight = grad_location[0] = grad_location[1] = 0;
                if (!isfinite(x) || !isfinite(y)) {
                    *grad_weight = grad_location[0] = grad_location[1] = NAN;
                    continue;
                }
                if (!find(&c, x, y, height, width, start, stride)) continue;
                shares(&c, share);
                for (int k = 0; k < 4; k++) {
                    found[k] = dot(grad, value + c.at[k], a->dim);
                    *grad_weight += share[k] * found[k];
                    found[k] *= c.inside_x[k % 2] * c.inside_y[k / 2];
                    add(grad_value + c.at[k], grad, share[k] * weight, a->dim);
                }
                grad_location[0] = weight * width * ((1 - c.y) * (found[1] - found[0]) + c.y * (found[3] - found[2]));
                grad_location[1] = weight * height * ((1 - c.x) * (found[2] - found[0]) + c.x * (found[3] - found[1]));
            }
            start += height * width;
        }
    }
}

static void run(const team *team, int64_t task, float *scratch) {
    const job *j = (const job *)team;
    const int64_t plane = task / j->pieces, begin = task % j->pieces * PIECE, end = begin + PIECE;
    (void)scratch;
    if (j->a->grad_out)
        backward(j->a, plane);
    else
        forward(j->a, plane, begin, end < j->a->queries ? end : j->a->queries);
}

EXPORTED(foveate_deformable)(const call *a) {
    job j = {.team.run = run, .a = a, .pieces = a->grad_out ? 1 : (a->queries + PIECE - 1) / PIECE};
    j.team.tasks = a->batch * a->heads * j.pieces;
    return share_out(a->parallel, a->threads, &j.team);
}
