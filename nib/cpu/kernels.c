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
#define LATER 384  /* prefetch distance in a row of W, in numbers, with 8 rows of x and float32 weights */
#define BLOCK 768  /* numbers of a row taken together with 8 rows of x and smaller weights, so that x stays cached */
#define LINE 64    /* bytes of a cache line */
#define PART 24    /* rows of W that a thread takes at a time: all rows of x use them while they are cached */

typedef float floats __attribute__((vector_size(4 * LANES)));

static inline floats load_float32(const float *at) {
    floats v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline floats load_bfloat16(const uint16_t *at) { /* the upper half of a float32 */
#if defined(__AVX512F__)
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
#else
    typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    halves v;
    memcpy(&v, at, sizeof v);
    return (floats)(__builtin_convertvector(v, words) << 16);
#endif
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

/* The totals of eight vectors: the same additions as in `total`, but eight at a time. */
static inline void totals(const floats *v, float *out) {
#if defined(__AVX512F__)
    __m512 halves[4], quarters[2], pairs;
    float sums[16];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 a = (__m512)v[2 * j], b = (__m512)v[2 * j + 1];
        halves[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        __m512 a = halves[2 * j], b = halves[2 * j + 1];
        quarters[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    }
    pairs = _mm512_add_ps(_mm512_shuffle_ps(quarters[0], quarters[1], 0x44),
                          _mm512_shuffle_ps(quarters[0], quarters[1], 0xEE));
    _mm512_storeu_ps(sums, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1)));
    for (int j = 0; j < 8; j++) out[j] = sums[j % 4 * 4 + j / 4 * 2];
#else
    for (int j = 0; j < 8; j++) out[j] = total(v[j]);
#endif
}

#define INLINE static inline __attribute__((always_inline)) /* so that the numbers of rows are constants */

/* Load a vector once, into a register. GCC would load it from memory again for each use. */
#if defined(__AVX512F__)
#define HOLD(v, condition) \
    if (condition) __asm__("" : "+v"(v))
#else
#define HOLD(v, condition)
#endif

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

/* The products of ROWS rows of x and COLUMNS rows of W, of their numbers from `begin` to `end`. If that is the last
   number, k, the sums go to y[r * n + c], otherwise to `partial`, from which the next call with the same rows begins. */
INLINE void tile(const int ROWS, const int COLUMNS, const float *x, const char *w, const int size, float *y, long n,
                 long k, long begin, long end, floats *partial) {
    const int SUMS = ROWS * COLUMNS;
    floats sum[8 * WIDE] = {0}, weights[WIDE];
    const char *next = w + COLUMNS * k * size + AHEAD;
    long i = begin;
    if (begin) {
#pragma GCC unroll 32
        for (int j = 0; j < SUMS; j++) sum[j] = partial[j];
    }
    for (; i + LANES <= end; i += LANES, next += COLUMNS * LANES * size) {
        if (ROWS < 8) /* in the order in which W lies; for a single use, so that other data stays cached */
            for (int b = 0; b < COLUMNS * LANES * size; b += LINE) __builtin_prefetch(next + b, 0, 0);
        else if (i * size % LINE == 0) { /* in the order in which it is taken */
            const char *in_tile = w + (i + LATER + (i + LATER < k ? 0 : (COLUMNS - 1) * k)) * size;
            const char *later = size == 4 ? in_tile : w + (i + COLUMNS * k) * size;
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; c++) __builtin_prefetch(later + c * k * size, 0, 0);
        }
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) weights[c] = load_weights(w + (c * k + i) * size, size);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            floats v = load_float32(x + r * k + i);
            HOLD(v, COLUMNS > 1 && (size != 2 || ROWS == 8));
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; c++) sum[r * COLUMNS + c] += v * weights[c];
        }
    }
    if (end < k) {
#pragma GCC unroll 32
        for (int j = 0; j < SUMS; j++) partial[j] = sum[j];
        return;
    }
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS && i < k; c++) {
        weights[c] = load_last_weights(w + (c * k + i) * size, size, k - i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r * COLUMNS + c] += load_last(x + r * k + i, k - i) * weights[c];
    }
    float sums[8 * WIDE];
#pragma GCC unroll 32
    for (int j = 0; j < SUMS; j++) {
        if (SUMS % 8) sums[j] = total(sum[j]);
        else if (j % 8 == 0) totals(sum + j, sums + j);
    }
#pragma GCC unroll 32
    for (int j = 0; j < SUMS; j++) y[j / COLUMNS * n + j % COLUMNS] = sums[j];
}

/* ROWS rows of x times the rows of W from `begin` to `end`, COLUMNS at a time and what is left one by one. */
INLINE void rows(const int ROWS, const int COLUMNS, const float *x, const char *w, const int size, float *y, long n,
                 long k, long begin, long end) {
    const int blocks = ROWS == 8 && size < 4;
    floats partial[8 * PART];
    long first = 0;
    do {
        long last = blocks && first + BLOCK < k ? first + BLOCK : k, j = begin;
        floats *at = partial;
        for (; j + COLUMNS <= end; j += COLUMNS, at += ROWS * COLUMNS)
            tile(ROWS, COLUMNS, x, w + j * k * size, size, y + j, n, k, first, last, at);
        for (; j < end; j++, at += ROWS) tile(ROWS, 1, x, w + j * k * size, size, y + j, n, k, first, last, at);
        first = last;
    } while (blocks && first < k);
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
