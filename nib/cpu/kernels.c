/* A few rows times a matrix of float32, bfloat16 or 8-bit weights, at the speed at which the matrix is read.

   y (R, N) = x (R, K) W^T * scale + bias, where W (N, K) is row-major, and scale and bias (N,) may be null. One thread
   computes each number of y as one sum, in an order that depends only on K: it is identical for any number of threads
   and any other rows. nib/cpu/build.py compiles this file; measurements: bench/NOTES.md. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16 /* numbers in a vector */
#define WIDE 4   /* rows of W taken together with up to 4 rows of x: so many sums fit into the registers */
#define NARROW 3 /* and with 8 rows of x */
#else
#define LANES 8
#define WIDE 2
#define NARROW 1
#endif
#define AHEAD 2048 /* prefetch distance in W, in bytes after the current rows */
#define LATER 384  /* prefetch distance in a row of W, in numbers, if arithmetic takes as long as memory */
#define LINE 64    /* bytes of a cache line */
#define PART 24    /* rows of W that a thread takes at a time: all rows of x use them while they are cached */

typedef float floats __attribute__((vector_size(4 * LANES)));

static inline floats load_float32(const float *at) {
    floats v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline floats load_bfloat16(const uint16_t *at) { /* the upper half of a float32 */
    typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    halves v;
    memcpy(&v, at, sizeof v);
    return (floats)(__builtin_convertvector(v, words) << 16);
}

static inline floats load_int8(const int8_t *at) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
#else
    floats v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = at[lane];
    return v;
#endif
}

static inline float total(floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
#endif
}

#define INLINE static inline __attribute__((always_inline)) /* so that the numbers of rows are constants */

/* Weights of 4 bytes are float32, of 2 bytes bfloat16, of 1 byte int8. */
INLINE floats load_weights(const char *at, int size) {
    return size == 4   ? load_float32((const float *)at)
           : size == 2 ? load_bfloat16((const uint16_t *)at)
                       : load_int8((const int8_t *)at);
}

/* The same of the last `count` weights of a row, and of x, with zeros after them. */
INLINE floats load_last_weights(const char *at, int size, long count) {
    char padded[4 * LANES] = {0};
    memcpy(padded, at, count * size);
    return load_weights(padded, size);
}

INLINE floats load_last(const float *at, long count) {
    floats v = {0};
    memcpy(&v, at, 4 * count);
    return v;
}

/* ROWS rows of x times COLUMNS rows of W, to y[r * n + c]. */
INLINE void tile(const int ROWS, const int COLUMNS, const float *x, const char *w, const int size, float *y, long n,
                  long k) {
    floats sum[8][WIDE] = {0}, weights[WIDE];
    const char *next = w + COLUMNS * k * size + AHEAD;
    long i = 0;
    for (; i + LANES <= k; i += LANES, next += COLUMNS * LANES * size) {
        if (ROWS < 8 || size < 4) /* in the order in which W lies; for a single use, so that other data stays cached */
            for (int b = 0; b < COLUMNS * LANES * size; b += LINE) __builtin_prefetch(next + b, 0, 0);
        else if (i * size % LINE == 0) { /* in the order in which it is taken, from this tile or the next */
            const char *later = w + (i + LATER + (i + LATER < k ? 0 : (COLUMNS - 1) * k)) * size;
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; c++) __builtin_prefetch(later + c * k * size, 0, 0);
        }
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) weights[c] = load_weights(w + (c * k + i) * size, size);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            floats v = load_float32(x + r * k + i);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; c++) sum[r][c] += v * weights[c];
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++) {
        if (i < k) weights[c] = load_last_weights(w + (c * k + i) * size, size, k - i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            if (i < k) sum[r][c] += load_last(x + r * k + i, k - i) * weights[c];
            y[r * n + c] = total(sum[r][c]);
        }
    }
}

/* ROWS rows of x times the rows of W from `begin` to `end`, COLUMNS at a time and what is left one by one. */
INLINE void rows(const int ROWS, const int COLUMNS, const float *x, const char *w, const int size, float *y, long n,
                 long k, long begin, long end) {
    long j = begin;
    for (; j + COLUMNS <= end; j += COLUMNS) tile(ROWS, COLUMNS, x, w + j * k * size, size, y + j, n, k);
    for (; j < end; j++) tile(ROWS, 1, x, w + j * k * size, size, y + j, n, k);
}

struct matrix {
    const char *weight; /* (N, K) */
    const float *scale, *bias;
    long n, k, size; /* size: bytes of a weight */
};

/* y (R, N) of all threads together, each of which calls this; then it is added to `sum` (R, N), unless that is null. */
INLINE void share(const struct matrix m, const int size, const float *x, float *y, float *sum, long count) {
    const long n = m.n, k = m.k;
    const char *w = m.weight;
#pragma omp for schedule(guided, 4)
    for (long part = 0; part < (n + PART - 1) / PART; part++) {
        long begin = part * PART, end = begin + PART < n ? begin + PART : n, r = 0;
        for (; r + 8 <= count; r += 8) rows(8, NARROW, x + r * k, w, size, y + r * n, n, k, begin, end);
        for (; r + 4 <= count; r += 4) rows(4, WIDE, x + r * k, w, size, y + r * n, n, k, begin, end);
        for (; r + 2 <= count; r += 2) rows(2, WIDE, x + r * k, w, size, y + r * n, n, k, begin, end);
        for (; r < count; r++) rows(1, size == 4 ? 1 : WIDE, x + r * k, w, size, y + r * n, n, k, begin, end);
        for (r = 0; r < count; r++)
            for (long j = begin; j < end; j++) {
                float *at = y + r * n + j;
                if (m.scale) *at *= m.scale[j];
                if (m.bias) *at += m.bias[j];
                if (sum) sum[r * n + j] += *at;
            }
    }
}

static __attribute__((noinline)) void product(const struct matrix *m, const float *x, float *y, float *sum, long count) {
    if (m->size == 4)
        share(*m, 4, x, y, sum, count);
    else if (m->size == 2)
        share(*m, 2, x, y, sum, count);
    else
        share(*m, 1, x, y, sum, count);
}

void linear(const struct matrix *m, const float *x, float *y, long count, int threads) {
#pragma omp parallel num_threads(threads)
    product(m, x, y, 0, count);
}
