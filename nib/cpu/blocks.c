/* All blocks of model.py for a few new positions of rows whose keys and values are cached, in one call.

   It computes what model.Block does, for every kind of norm, MLP and attention in model.GPTConfig; nib/cpu/fused_blocks.py
   compares the two before it is used. Between the matmuls there is so little work that calling torch for it would take
   longer than the arithmetic. R rows of hidden states, one for each new position; other letters as in model.py. The
   result of a row depends only on its own positions, bit for bit. */

#include <math.h>
#include <omp.h>

#include "kernels.c"

#define NEXT 16 /* keys are prefetched so many positions ahead */

enum mlp { GELU, GELU_TANH, RELU, RELU2, SWIGLU };

struct norm {
    const float *weight, *bias;
};

struct block {
    struct norm attention_norm, q_norm, k_norm; /* the latter two with a null weight: there are none */
    struct matrix qkv, out;
    struct norm mlp_norm;
    struct matrix up, down;
};

struct shape {
    long blocks, width, heads, kv_heads, head_size, hidden, window, mlp, rms;
    float eps;
};

struct batch {
    long count, tokens;     /* R, and T, how many of them belong to one row of the cache */
    long places;            /* R, or T when the positions are the same for all rows of the cache */
    const long *positions;  /* (places,) */
    const float *cos, *sin; /* of the positions (places, D), or null */
    float *keys, *values;   /* (blocks, B, K, length, D) */
    long length;
};

static float dot(const float *a, const float *b, long n) {
    floats sum = {0};
    long i = 0;
    for (; i + LANES <= n; i += LANES) sum += load_float32(a + i) * load_float32(b + i);
    if (i < n) sum += load_last(a + i, n - i) * load_last(b + i, n - i);
    return total(sum);
}

/* exp(x) within two units of the last place: 2^n times the series of exp(x - n ln 2), |x - n ln 2| < 0.35. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first of few digits */
    float sum = 1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f));
    sum = 1.0f + r * (1.0f + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * sum))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23; /* of NaN any, as `sum` is NaN */
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

static void normalise(struct norm norm, int rms, float eps, const float *x, float *y, long n) {
    float mean = 0;
    if (!rms) {
        for (long i = 0; i < n; i++) y[i] = 1;
        mean = dot(x, y, n) / n;
    }
    for (long i = 0; i < n; i++) y[i] = x[i] - mean;
    float factor = 1 / sqrtf(dot(y, y, n) / n + eps);
    for (long i = 0; i < n; i++) y[i] = y[i] * factor * norm.weight[i];
    for (long i = 0; norm.bias && i < n; i++) y[i] += norm.bias[i];
}

/* Normalise and rotate a query or key, as the model does. */
static void prepare(const float *x, float *y, struct norm norm, const float *cos, const float *sin, long size, float eps) {
    float normalised[size];
    if (norm.weight) {
        normalise(norm, 1, eps, x, normalised, size);
        x = normalised;
    }
    long half = size / 2;
    if (!cos)
        memcpy(y, x, 4 * size);
    else
        for (long i = 0; i < half; i++) {
            y[i] = x[i] * cos[i] + x[i + half] * sin[i];
            y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
        }
}

/* VECTORS vectors of the sum of `count` values, `size` numbers each, times their scores, to y. */
INLINE void weighted_sum(const int VECTORS, const float *values, const float *scores, float *y, long count, long size) {
    floats sum[4] = {0};
    for (long s = 0; s < count; s++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[v] += scores[s] * load_float32(values + s * size + v * LANES);
    memcpy(y, sum, 4 * VECTORS * LANES);
}

/* softmax(q K^T / sqrt(D)) V over `count` positions; `scores` has room for them. */
static void attend(const float *q, const float *keys, const float *values, float *y, float *scores, long count,
                   long size) {
    float most = -INFINITY, sum = 0, factor = 1 / sqrtf(size);
    for (long s = 0; s < count; s++) {
        for (long i = 0; i < size; i += LINE / 4) { /* nothing of this is cached */
            if (s + NEXT < count) __builtin_prefetch(keys + (s + NEXT) * size + i, 0, 0);
            __builtin_prefetch(values + s * size + i, 0, 0);
        }
        scores[s] = dot(q, keys + s * size, size) * factor;
        most = scores[s] > most ? scores[s] : most;
    }
    for (long s = 0; s < count; s++) scores[s] = exponential(scores[s] - most);
    for (long s = 0; s < count; s++) sum += scores[s];
    long i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) weighted_sum(4, values + i, scores, y + i, count, size);
    for (; i + LANES <= size; i += LANES) weighted_sum(1, values + i, scores, y + i, count, size);
    for (; i < size; i++) {
        y[i] = 0;
        for (long s = 0; s < count; s++) y[i] += scores[s] * values[s * size + i];
    }
    for (i = 0; i < size; i++) y[i] /= sum;
}

static void attention(const struct shape *shape, const struct block *block, const struct batch *batch, float *keys,
                      float *values, float *qkv, float *y, float *scores) {
    const long H = shape->heads, K = shape->kv_heads, D = shape->head_size;
#pragma omp for schedule(static)
    for (long i = 0; i < batch->count * (H + K); i++) { /* queries in place, keys and values to the cache */
        long r = i / (H + K), head = i % (H + K), at = r % batch->places, position = batch->positions[at];
        const float *cos = batch->cos ? batch->cos + at * D : 0, *sin = batch->sin ? batch->sin + at * D : 0;
        float *x = qkv + (r * (H + 2 * K) + head) * D, turned[D];
        int is_key = head >= H;
        prepare(x, turned, is_key ? block->k_norm : block->q_norm, cos, sin, D, shape->eps);
        long to = (((r / batch->tokens) * K + head - H) * batch->length + position) * D;
        memcpy(is_key ? keys + to : x, turned, 4 * D);
        if (is_key) memcpy(values + to, x + K * D, 4 * D);
    }
#pragma omp for schedule(static)
    for (long i = 0; i < batch->count * H; i++) {
        long r = i / H, head = i % H, end = batch->positions[r % batch->places] + 1;
        long begin = shape->window && end > shape->window ? end - shape->window : 0;
        long at = (((r / batch->tokens) * K + head / (H / K)) * batch->length + begin) * D;
        attend(qkv + (r * (H + 2 * K) + head) * D, keys + at, values + at, y + i * D, scores, end - begin, D);
    }
}

/* u (R, hidden), or for swiglu (R, 2 hidden), to y (R, hidden). */
static void activate(int kind, const float *u, float *y, long count, long hidden) {
#pragma omp for schedule(static)
    for (long part = 0; part < count * ((hidden + 255) / 256); part++) {
        long r = part % count, begin = part / count * 256, end = begin + 256 < hidden ? begin + 256 : hidden;
        const float *x = u + r * hidden * (kind == SWIGLU ? 2 : 1);
        float *to = y + r * hidden;
        if (kind == SWIGLU)
            for (long i = begin; i < end; i++) to[i] = x[i] / (1 + exponential(-x[i])) * x[i + hidden];
        else if (kind == GELU_TANH) /* (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)) */
            for (long i = begin; i < end; i++)
                to[i] = x[i] / (1 + exponential(-1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
        else if (kind == GELU)
            for (long i = begin; i < end; i++) to[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678f));
        else
            for (long i = begin; i < end; i++) {
                float above = x[i] < 0 ? 0 : x[i]; /* NaN stays */
                to[i] = kind == RELU ? above : above * above;
            }
    }
}

static void norms(const struct shape *shape, struct norm norm, const float *x, float *y, long count) {
#pragma omp for schedule(static)
    for (long r = 0; r < count; r++)
        normalise(norm, shape->rms, shape->eps, x + r * shape->width, y + r * shape->width, shape->width);
}

/* The size of the scratch memory of `blocks`, in floats. */
long scratch(const struct shape *shape, long count, long length, int threads) {
    long widest = shape->width + shape->heads * shape->head_size + (shape->heads + 2 * shape->kv_heads) * shape->head_size;
    return count * (widest + 3 * shape->hidden) + threads * length;
}

/* The hidden states x (R, C) through all blocks, in place. */
void blocks(const struct shape *shape, const struct block *block, const struct batch *batch, float *x, float *memory,
            int threads) {
    const long R = batch->count, D = shape->head_size;
    float *h = memory, *y = h + R * shape->width, *qkv = y + R * shape->heads * D;
    float *u = qkv + R * (shape->heads + 2 * shape->kv_heads) * D, *activated = u + 2 * R * shape->hidden;
    const long layer = R / batch->tokens * shape->kv_heads * batch->length * D;
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < shape->blocks; i++) {
        const struct block *b = block + i;
        float *scores = activated + R * shape->hidden + omp_get_thread_num() * batch->length;
        norms(shape, b->attention_norm, x, h, R);
        product(&b->qkv, h, qkv, 0, R);
        attention(shape, b, batch, batch->keys + i * layer, batch->values + i * layer, qkv, y, scores);
        product(&b->out, y, h, x, R);
        norms(shape, b->mlp_norm, x, h, R);
        product(&b->up, h, u, 0, R);
        activate(shape->mlp, u, activated, R, shape->hidden);
        product(&b->down, activated, h, x, R);
    }
}
