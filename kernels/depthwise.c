/* The gradients of a depthwise convolution on CPU cores, float32. A lane is a channel.
 *
 * Those of the weights are for each place of the kernel the sum of products of the output's gradient and of the inputs
 * that it saw there. A task is some channels of some rows of an image. It copies each row of the map once, with the
 * padding around it, beside the rows before it that the kernel still sees, so that products read lines of the nearest
 * cache at distances that the compiler knows.
 *
 * Of a 3x3 kernel that keeps the map's size all gradients are made at once: the same nine neighbors of the output's
 * gradient are weighted for the map's, and weight an input for the weights'. It is memory that takes the time: each map is
 * read once. A task is some rows of an image.
 *
 * Nothing here knows torch.
 */
#include "lanes.h"

#define STEP 64   /* channels of a task */
#define NEAR 4096 /* numbers of a row that a walk goes through, vector by vector, before it goes on */
#define LEAST 16  /* columns that it goes through at least */

/* Address and strides in numbers; channels lie side by side. */
typedef struct {
    int64_t data, image, row, column;
} tensor;

/* One call, as depthwise_native.py packs it: eight bytes a field. */
typedef struct {
    int64_t threads, parallel, images, channels, height, width, out_height, out_width, kernel_height, kernel_width;
    int64_t pad_y, pad_x, stride_y, stride_x;
    tensor x, grad;
    int64_t parts, sums; /* parts of an image's rows; [images][parts][kernel + 1][channels], the bias's behind */
} call;

typedef struct {
    team team;
    const call *a;
    int64_t groups, rows; /* of channels, and of a part */
} job;

/* What a task works on, and in: rows of padded columns, each of STEP channels, as many in the ring as in the kernel. */
typedef struct {
    int64_t image, channel, channels, wide;
    float *ring, *grad, *sums;
} task;

INLINE const float *row_of(const tensor *map, const task *t, int64_t y) {
    return (const float *)(intptr_t)map->data + t->image * map->image + y * map->row + t->channel;
}

/* The row of the ring that is so many behind its `first`. */
INLINE float *ring_row(const call *a, const task *t, int64_t first, int64_t k) {
    k += first;
    return t->ring + (k < a->kernel_height ? k : k - a->kernel_height) * t->wide * STEP;
}

/* Copy row `y` of the padded map to its place. */
INLINE void take_row(const call *a, const task *t, int64_t y) {
    float *to = ring_row(a, t, y % a->kernel_height, 0) + a->pad_x * STEP;
    if (y < a->pad_y || y >= a->pad_y + a->height) {
        memset(to, 0, a->width * STEP * sizeof(float));
        return;
    }
    const float *x = row_of(&a->x, t, y - a->pad_y);
    for (int64_t i = 0; i < a->width; i++, x += a->x.column, to += STEP) memcpy(to, x, t->channels * sizeof(float));
}

/* Copy row `y` of the output's gradient, and add it to the bias's. */
INLINE void take_grad(const call *a, const task *t, int64_t y, float *bias) {
    const float *x = row_of(&a->grad, t, y);
    float *to = t->grad;
    for (int64_t i = 0; i < a->out_width; i++, x += a->grad.column, to += STEP) {
        memcpy(to, x, t->channels * sizeof(float));
        EACH(v, STEP / LANES) store(bias + v * LANES, load(bias + v * LANES) + load(to + v * LANES));
    }
}

/* Add to `taps` sums the products of a row of gradients and of each one's inputs, so far apart. */
INLINE void sum_taps(const float *const *x, int64_t apart, const float *grad, int64_t width, float *sum, const int taps) {
    V sums[4][3] = {0}; /* of every fourth column: one would wait for itself */
    int64_t i = 0;
    for (; i + 4 <= width; i += 4)
        EACH(n, 4) {
            const V g = load(grad + (i + n) * STEP);
            EACH(k, taps) sums[n][k] += g * load(x[k] + (i + n) * apart);
        }
    for (; i < width; i++) {
        const V g = load(grad + i * STEP);
        EACH(k, taps) sums[0][k] += g * load(x[k] + i * apart);
    }
    EACH(k, taps) store(sum + k * STEP, load(sum + k * STEP) + ((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k])));
}

/* Add what a row of gradients makes of a vector; row `first` of the ring is the first that the kernel saw. */
INLINE void sum_row(const call *a, const task *t, int64_t first, int64_t channel) {
    const int64_t apart = a->stride_x * STEP, taps = a->kernel_height * a->kernel_width;
    for (int64_t n = 0, y = 0, x = 0; n < taps; n += 3) {
        const float *inputs[3];
        const int count = taps - n < 3 ? (int)(taps - n) : 3;
        for (int k = 0; k < count; k++) {
            inputs[k] = ring_row(a, t, first, y) + x * STEP + channel;
            if (++x == a->kernel_width) x = 0, y++;
        }
        float *sum = t->sums + n * STEP + channel;
        const float *grad = t->grad + channel;
        if (count == 3)
            sum_taps(inputs, apart, grad, a->out_width, sum, 3);
        else if (count == 2)
            sum_taps(inputs, apart, grad, a->out_width, sum, 2);
        else
            sum_taps(inputs, apart, grad, a->out_width, sum, 1);
    }
}

static void sum_products(const team *team, int64_t number, float *scratch) {
    const job *j = (const job *)team;
    const call *a = j->a;
    const int64_t taps = a->kernel_height * a->kernel_width, part = number / j->groups % a->parts;
    const int64_t from = part * j->rows, end = from + j->rows < a->out_height ? from + j->rows : a->out_height;
    task t = {.image = number / j->groups / a->parts, .channel = number % j->groups * STEP};
    t.channels = a->channels - t.channel < STEP ? a->channels - t.channel : STEP;
    t.wide = a->width + 2 * a->pad_x;
    t.ring = scratch, t.grad = t.ring + a->kernel_height * t.wide * STEP, t.sums = t.grad + a->out_width * STEP;
    memset(scratch, 0, j->team.scratch * sizeof(float)); /* padding, channels that there aren't, and sums */
    for (int64_t y = from, taken = from * a->stride_y; y < end; y++) {
        const int64_t first = y * a->stride_y;
        for (taken = taken < first ? first : taken; taken < first + a->kernel_height; taken++) take_row(a, &t, taken);
        take_grad(a, &t, y, t.sums + taps * STEP);
        for (int64_t c = 0; c < t.channels; c += LANES) sum_row(a, &t, first % a->kernel_height, c);
    }
    float *to = (float *)(intptr_t)a->sums + (t.image * a->parts + part) * (taps + 1) * a->channels + t.channel;
    for (int64_t k = 0; k <= taps; k++, to += a->channels)
        memcpy(to, t.sums + k * STEP, t.channels * sizeof(float));
}

EXPORTED(foveate_depthwise_weights)(const call *a) {
    job j = {.team.run = sum_products, .a = a};
    j.groups = (a->channels + STEP - 1) / STEP;
    j.rows = (a->out_height + a->parts - 1) / a->parts;
    j.team.tasks = a->images * j.groups * a->parts;
    j.team.scratch = (a->kernel_height * (a->width + 2 * a->pad_x + a->kernel_width) + a->out_width + 1) * STEP;
    return share_out(a->parallel, a->threads, &j.team);
}

/* One call for a 3x3 kernel, as depthwise_native.py packs it: eight bytes a field. */
typedef struct {
    int64_t threads, parallel, images, channels, height, width;
    tensor x, grad, to;          /* the map, and the gradients of the output and of the map */
    int64_t weight, parts, sums; /* [9][channels]; as above */
} square_call;

typedef struct {
    team team;
    const square_call *a;
    int64_t rows; /* of a part */
} square_job;

/* Write some columns of a row of a vector of the map's gradient, from three rows of the output's, and add to the ten
 * sums. */
INLINE void walk_columns(
    const square_call *a, const float *const *grad, const int64_t *apart, const float *x, float *to, int64_t from,
    int64_t end, int64_t channel, const float *weight, float *sums) {
    const int64_t channels = a->channels;
    const float *const row[3] = {grad[0] + channel, grad[1] + channel, grad[2] + channel};
    V sum[10], left[3], here[3], right[3];
    weight += channel, sums += channel;
    EACH(k, 10) sum[k] = load(sums + k * channels);
    EACH(r, 3) left[r] = from ? load(row[r] + (from - 1) * apart[r]) : all(0), here[r] = load(row[r] + from * apart[r]);
    x += from * a->x.column + channel, to += from * a->to.column + channel;
    for (int64_t i = from; i < end; i++, x += a->x.column, to += a->to.column) {
        const int last = i + 1 == a->width;
        EACH(r, 3) right[r] = last ? all(0) : load(row[r] + (i + 1) * apart[r]);
        const V input = load(x);
        V of_row[3];
        EACH(r, 3) { /* what lies a row above the input saw it a row below its centre */
            const int k = 3 * (2 - r);
            of_row[r] = load(weight + k * channels) * right[r] + load(weight + (k + 1) * channels) * here[r] +
                        load(weight + (k + 2) * channels) * left[r];
            sum[k] += input * right[r], sum[k + 1] += input * here[r], sum[k + 2] += input * left[r];
        }
        sum[9] += here[1];
        store(to, (of_row[0] + of_row[1]) + of_row[2]);
        EACH(r, 3) left[r] = here[r], here[r] = right[r];
    }
    EACH(k, 10) store(sums + k * channels, sum[k]);
}

static void walk(const team *team, int64_t number, float *scratch) {
    const square_job *j = (const square_job *)team;
    const square_call *a = j->a;
    const int64_t image = number / a->parts, part = number % a->parts, channels = a->channels;
    const int64_t from = part * j->rows, end = from + j->rows < a->height ? from + j->rows : a->height;
    const float *weight = (const float *)(intptr_t)a->weight, *x = (const float *)(intptr_t)a->x.data + image * a->x.image;
    const float *grad = (const float *)(intptr_t)a->grad.data + image * a->grad.image;
    float *to = (float *)(intptr_t)a->to.data + image * a->to.image, *nothing = scratch;
    float *sums = (float *)(intptr_t)a->sums + number * 10 * channels;
    memset(nothing, 0, channels * sizeof(float));
    memset(sums, 0, 10 * channels * sizeof(float));
    const int64_t columns = NEAR / channels > LEAST ? NEAR / channels : LEAST;
    for (int64_t y = from; y < end; y++) {
        const float *row[3];
        int64_t apart[3];
        for (int r = 0; r < 3; r++) {
            const int64_t at = y - 1 + r;
            const int inside = at >= 0 && at < a->height;
            row[r] = inside ? grad + at * a->grad.row : nothing;
            apart[r] = inside ? a->grad.column : 0;
        }
        for (int64_t left = 0; left < a->width; left += columns) {
            const int64_t right = left + columns < a->width ? left + columns : a->width;
            for (int64_t c = 0; c < channels; c += LANES)
                walk_columns(a, row, apart, x + y * a->x.row, to + y * a->to.row, left, right, c, weight, sums);
        }
    }
}

EXPORTED(foveate_depthwise_square)(const square_call *a) {
    square_job j = {.team.run = walk, .team.tasks = a->images * a->parts, .team.scratch = a->channels, .a = a};
    j.rows = (a->height + a->parts - 1) / a->parts;
    return share_out(a->parallel, a->threads, &j.team);
}
