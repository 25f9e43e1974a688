/* What a DiT's blocks do between products, on one core: one pass over memory each, in float32 registers.

   Compiled where it runs (cpu_native.py). Tensors are contiguous; kind says what is in an array that may be one of several.
   table [., width] is float32, and index[r] its line for row r: shifts, scales and gates. Where x has fewer rows than index,
   rows share it: row r reads row r mod sources. A token's bits do not depend on other tokens.

   Compile without contraction of a * b + c: where it pays, it is asked for (MULTIPLY_ADD); guided_step has to round as the
   reference engine does. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16 /* floats in a register */
#define ROWS 8   /* of a product's tile: with 3 registers of columns, 24 of the 32 registers hold sums */
#define REGISTERS 3
#define MULTIPLY_ADD(a, b, c) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#else
#define LANES 8
#define ROWS 6 /* 12 of the 16 registers */
#define REGISTERS 2
#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) ((floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#define HAS_FLOAT32 0
#endif
#endif
#ifndef HAS_FLOAT32
#define HAS_FLOAT32 1
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
/* What is in an array that may be one of several. */
#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT64 2

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float quarter __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE floats all(float value) { return value - (floats){0}; }
INLINE int count(long left) { return left < LANES ? (int)left : LANES; }

/* One move for a whole register. Not by memcpy, which Clang would make one call with the other. */
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));

INLINE void copy(void *to, const void *from, int n, size_t size) {
    if (n < LANES)
        memcpy(to, from, (size_t)n * size);
    else if (size == 4)
        *(loose_floats *)to = *(const loose_floats *)from;
    else
        *(loose_halves *)to = *(const loose_halves *)from;
}

/* Values start .. start + n of an array; zeros in the lanes after them. */
INLINE floats load(const void *array, long start, int n, int kind) {
    if (kind == BFLOAT16) {
        halves half = {0};
        copy(&half, (const uint16_t *)array + start, n, 2);
        return (floats)(__builtin_convertvector(half, bits) << 16);
    }
    floats value = {0};
    copy(&value, (const float *)array + start, n, 4);
    return value;
}

/* The nearest bfloat16, ties to even, in the low half of each lane; a NaN stays one. */
INLINE bits halved(floats value) {
    bits word = (bits)value, is_nan = (bits)(value != value);
    return (((word + 0x7fff + ((word >> 16) & 1)) >> 16) & ~is_nan) | (0x7fc0 & is_nan);
}

INLINE void store(void *array, long start, int n, floats value, int kind) {
    if (kind == BFLOAT16) {
        halves half = __builtin_convertvector(halved(value), halves);
        copy((uint16_t *)array + start, &half, n, 2);
        return;
    }
    copy((float *)array + start, &value, n, 4);
}

INLINE floats choose(ints mask, floats yes, floats no) { return (floats)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* The first n lanes of a value, and `other` in those after them. */
INLINE floats only(floats value, int n, float other) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (n == LANES) return value;
    ints lane;
    memcpy(&lane, lanes, sizeof lane);
    return choose(lane < n, value, all(other));
}

/* The second where either is a NaN, as the instructions have it. */
#if defined(__AVX512F__)
INLINE floats larger(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE floats smaller(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
INLINE floats larger(floats a, floats b) { return (floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE floats smaller(floats a, floats b) { return (floats)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE floats larger(floats a, floats b) { return choose(a > b, a, b); }
INLINE floats smaller(floats a, floats b) { return choose(a < b, a, b); }
#endif

/* Of a register's lanes. Halves are added and compared as the portable code does. */
#ifdef __AVX512F__
INLINE float sum(floats value) {
    __m512 all = (__m512)value;
    __m128 four = _mm512_castps512_ps128(all);
    four = _mm_add_ps(four, _mm512_extractf32x4_ps(all, 1));
    four = _mm_add_ps(four, _mm512_extractf32x4_ps(all, 2));
    four = _mm_add_ps(four, _mm512_extractf32x4_ps(all, 3));
    four = _mm_add_ps(four, _mm_movehdup_ps(four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehl_ps(four, four)));
}

INLINE float largest(floats value) {
    __m512 all = (__m512)value, half = _mm512_max_ps(all, _mm512_shuffle_f32x4(all, all, 0xee));
    __m128 four = _mm512_castps512_ps128(half);
    four = _mm_max_ps(four, _mm512_extractf32x4_ps(half, 1));
    four = _mm_max_ps(four, _mm_movehdup_ps(four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehl_ps(four, four)));
}

INLINE int32_t largest_whole(ints value) { return _mm512_reduce_max_epi32((__m512i)value); }
#else
INLINE float sum(floats value) {
    quarter part[LANES / 4];
    memcpy(part, &value, sizeof value);
    for (int i = 1; i < LANES / 4; i++) part[0] += part[i];
    return part[0][0] + part[0][1] + (part[0][2] + part[0][3]);
}

INLINE float largest(floats value) {
    float part[LANES];
    memcpy(part, &value, sizeof value);
    for (int half = LANES / 2; half >= 4; half /= 2)
        for (int lane = 0; lane < half; lane++) part[lane] = part[lane] > part[lane + half] ? part[lane] : part[lane + half];
    float one = part[0] > part[1] ? part[0] : part[1], other = part[2] > part[3] ? part[2] : part[3];
    return one > other ? one : other;
}

INLINE int32_t largest_whole(ints value) {
    int32_t part[LANES];
    memcpy(part, &value, sizeof value);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) part[lane] = part[lane] > part[lane + half] ? part[lane] : part[lane + half];
    return part[0];
}
#endif

/* Magnitudes are compared as whole numbers, in whose order a NaN is the largest: it must not be lost. */
INLINE ints larger_magnitude(floats a, ints most) {
    ints size = (ints)a & 0x7fffffff;
    return (ints)choose(size > most, (floats)size, (floats)most);
}

INLINE float largest_magnitude(ints value) {
    int32_t whole = largest_whole(value);
    float most;
    memcpy(&most, &whole, sizeof most);
    return most;
}

/* The nearest whole number, ties to even, of |value| < 2^22: the sum has no bits for a fraction. */
#define WHOLE 12582912.0f

/* 2^t to 2 units in the last place, for t from -125 to 127 and of those for any other; a NaN stays one. 2^n p(f), n whole,
   |f| <= 1/2; p - 1 is f times the polynomial that leaves the least relative error, 2e-9. */
INLINE floats power(floats t) {
    t = larger(all(-125), smaller(all(127), t));
    floats shifted = t + WHOLE, n = shifted - WHOLE, f = t - n;
    floats p = MULTIPLY_ADD(all(1.53533620e-4f), f, all(1.33988750e-3f));
    p = MULTIPLY_ADD(p, f, all(9.61843692e-3f));
    p = MULTIPLY_ADD(p, f, all(5.55033237e-2f));
    p = MULTIPLY_ADD(p, f, all(2.40226477e-1f));
    p = MULTIPLY_ADD(p, f, all(6.93147182e-1f));
    p = MULTIPLY_ADD(p, f, all(1));
#ifdef __AVX512F__
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return (floats)((bits)p + ((bits)shifted << 23)) + (t - t); /* the sum of bits may be a number where t is none */
#endif
}

/* 1 / x to a unit in the last place, for x of no extreme size; half the time of a division. */
INLINE floats reciprocal(floats x) {
#ifdef __AVX512F__
    floats r = (floats)_mm512_rcp14_ps((__m512)x);
    return r * MULTIPLY_ADD(-x, r, all(2));
#else
    return 1.0f / x;
#endif
}

/* The low byte of n lanes. */
INLINE void narrow(uint8_t *to, int n, ints value) {
#ifdef __AVX512F__
    if (n == LANES) /* several times as fast as with a mask */
        _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)value));
    else
        _mm512_mask_cvtepi32_storeu_epi8(to, (__mmask16)((1u << n) - 1), (__m512i)value);
#else
    for (int lane = 0; lane < n; lane++) to[lane] = (uint8_t)value[lane];
#endif
}

#define LOG2_E 1.44269504f

/* tanh-GELU as x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE floats gelu(floats x) {
    floats t = x * MULTIPLY_ADD(x * x, all(-0.0713548162726f * LOG2_E), all(-1.5957691216f * LOG2_E));
    return x * reciprocal(1.0f + power(t));
}

/* Tokens that go through adaLN together: of one alone, each pass would wait for the sum of the pass before. */
#define TOGETHER 8

/* A token's mean, one over its deviation, and what of adaLN is then done with n <= LANES of its values. */
INLINE float mean_of(const void *x, long at, long D, int kind) {
    floats total = {0};
    for (long d = 0; d < D; d += LANES) total += load(x, at + d, count(D - d), kind);
    return sum(total) / (float)D;
}

INLINE float factor_of(const void *x, long at, long D, float mean, float eps, int kind) {
    floats square = {0};
    for (long d = 0; d < D; d += LANES) {
        int n = count(D - d);
        floats centred = only(load(x, at + d, n, kind) - mean, n, 0);
        square += centred * centred;
    }
    return 1 / sqrtf(sum(square) / (float)D + eps);
}

/* Returns its largest magnitudes, one a lane, for int8. */
INLINE ints modulate(const void *x, long at, const float *shift, const float *scale, void *out, long to, long D, float mean,
                     float factor, int kind, int to_kind) {
    ints most = {0};
    for (long d = 0; d < D; d += LANES) {
        int n = count(D - d);
        floats normal = (load(x, at + d, n, kind) - mean) * factor;
        floats value = normal * (1.0f + load(scale, d, n, 0)) + load(shift, d, n, 0);
        store(out, to + d, n, value, to_kind);
        most = larger_magnitude(only(value, n, 0), most);
    }
    return most;
}

/* adaLN: out = (x - mean) / sqrt(var + eps) (1 + scale) + shift.  x [sources, T, D], out [R, T, D] of one kind. */
INLINE void adaln(const void *x, const float *table, const int32_t *index, void *out, long R, long sources, long T, long D,
                  long width, long shift_column, long scale_column, float eps, int kind) {
    for (long r = 0; r < R; r++) {
        const float *line = table + index[r] * width, *shift = line + shift_column, *scale = line + scale_column;
        for (long t = 0; t < T; t += TOGETHER) {
            long at = (r % sources * T + t) * D, to = (r * T + t) * D, some = T - t < TOGETHER ? T - t : TOGETHER;
            float mean[TOGETHER], factor[TOGETHER];
            for (long i = 0; i < some; i++) mean[i] = mean_of(x, at + i * D, D, kind);
            for (long i = 0; i < some; i++) factor[i] = factor_of(x, at + i * D, D, mean[i], eps, kind);
            for (long i = 0; i < some; i++)
                modulate(x, at + i * D, shift, scale, out, to + i * D, D, mean[i], factor[i], kind, kind);
        }
    }
}

void fastcfg_adaln(const void *x, const float *table, const int32_t *index, void *out, long R, long sources, long T, long D,
                   long width, long shift_column, long scale_column, float eps, int kind) {
    if (kind == BFLOAT16)
        adaln(x, table, index, out, R, sources, T, D, width, shift_column, scale_column, eps, BFLOAT16);
    else
        adaln(x, table, index, out, R, sources, T, D, width, shift_column, scale_column, eps, 0);
}

/* out = residual + gate y.  y, out [R, T, D], which may be one array, and residual [sources, T, D], of one kind. */
void fastcfg_gate(const void *y, const void *residual, const float *table, const int32_t *index, void *out, long R,
                  long sources, long T, long D, long width, long gate_column, int kind) {
    for (long r = 0; r < R; r++) {
        const float *line = table + index[r] * width + gate_column;
        for (long t = 0; t < T; t++) {
            long in = (r % sources * T + t) * D, to = (r * T + t) * D;
            for (long d = 0; d < D; d += LANES) {
                int n = count(D - d);
                floats value = load(line, d, n, 0) * load(y, to + d, n, kind);
                store(out, to + d, n, load(residual, in + d, n, kind) + value, kind);
            }
        }
    }
}

/* int8: whole = round(127 h / s) + 128 of K values whose largest magnitude is s. */
INLINE void quantise_token(const void *h, long at, float s, uint8_t *whole, long K, int kind) {
    float factor = s > 0 ? 127 / s : 0;
    for (long k = 0; k < K; k += LANES) {
        int n = count(K - k);
        floats shifted = load(h, at + k, n, kind) * factor + (WHOLE + 128.0f);
        narrow(whole + k, n, (ints)shifted);
    }
}

/* Tokens as an int8 product reads them: whole as above, and scale = s / 127 of each.  h [M, K], whole [M, stride], scale [M]. */
INLINE void quantise(const void *h, uint8_t *whole, long stride, float *scale, long M, long K, int kind) {
    for (long m = 0; m < M; m++) {
        ints most = {0};
        for (long k = 0; k < K; k += LANES) most = larger_magnitude(load(h, m * K + k, count(K - k), kind), most);
        float s = largest_magnitude(most);
        scale[m] = s / 127;
        quantise_token(h, m * K, s, whole + m * stride, K, kind);
    }
}

void fastcfg_quantise(const void *h, uint8_t *whole, float *scale, long M, long K, int kind) {
    quantise(h, whole, K, scale, M, K, kind);
}

/* gelu(scale y + bias), or of y without a bias, for K columns, as an int8 product reads it; scale becomes the result's.
   token [K]: scratch, which may be y. */
INLINE void hidden_token(const float *y, float *scale, const float *bias, float *token, uint8_t *whole, long K) {
    ints most = {0};
    for (long k = 0; k < K; k += LANES) {
        int n = count(K - k);
        floats value = load(y, k, n, 0);
        if (bias) value = value * *scale + load(bias, k, n, 0);
        value = gelu(value);
        most = larger_magnitude(value, most);
        store(token, k, n, value, 0);
    }
    float s = largest_magnitude(most);
    *scale = s / 127;
    quantise_token(token, 0, s, whole, K, 0);
}

/* Where a layer's result joins the stream: residual + gate v, as in fastcfg_gate; without a residual, v. */
typedef struct {
    const void *residual;
    const float *table;
    const int32_t *index;
    void *out;
    long sources, T, D, width, column;
    int kind;
} Stream;

/* v = scale y + bias of an int8 product's D columns, or y without a bias, for token m of all, into the stream. */
INLINE void stream_token(const Stream *to, long m, const float *y, float scale, const float *bias) {
    long r = m / to->T, D = to->D, in = (r % to->sources * to->T + m % to->T) * D;
    const float *gate = to->residual ? to->table + to->index[r] * to->width + to->column : 0;
    for (long d = 0; d < D; d += LANES) {
        int n = count(D - d);
        floats value = load(y, d, n, 0);
        if (bias) value = value * scale + load(bias, d, n, 0);
        if (gate) value = load(to->residual, in + d, n, to->kind) + load(gate, d, n, 0) * value;
        store(to->out, m * D + d, n, value, to->kind);
    }
}

/* What lies between fc1 and fc2: hidden_token of y [M, K], a product that is made elsewhere.  scale [M], token [K] scratch. */
void fastcfg_hidden(const float *y, float *scale, const float *bias, float *token, uint8_t *whole, long M, long K) {
    for (long m = 0; m < M; m++) hidden_token(y + m * K, scale + m, bias, token, whole + m * K, K);
}

/* The result of a product that is made elsewhere: stream_token of y [M, D], which may be out of float32.  scale [M]. */
void fastcfg_dequantise(const float *y, const float *scale, const float *bias, const Stream *to, long M) {
    for (long m = 0; m < M; m++) stream_token(to, m, y + m * to->D, scale[m], bias);
}

/* C = start + A B for `rows` rows and `registers` of columns, start being `apart` values further for the next row: C itself, a
   row for all, or zeros. ahead: what will be read like B next, if it is to be fetched meanwhile. */
INLINE void tile(const float *A, long lda, const float *B, long ldb, float *C, long ldc, long K, int rows, int registers,
                 const float *start, long apart, const float *ahead) {
    floats sums[ROWS][REGISTERS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < registers; j++)
        sums[m][j] = start ? load(start, m * apart + j * LANES, LANES, 0) : all(0);
    for (long k = 0; k < K; k++) {
        floats columns[REGISTERS];
        UNROLL for (int j = 0; j < registers; j++) columns[j] = load(B, k * ldb + j * LANES, LANES, 0);
        if (ahead) {
            UNROLL for (int j = 0; j < registers; j++) __builtin_prefetch(ahead + k * ldb + j * LANES, 0, 2);
        }
        UNROLL for (int m = 0; m < rows; m++) {
            floats a = all(A[m * lda + k]);
            UNROLL for (int j = 0; j < registers; j++) sums[m][j] = MULTIPLY_ADD(a, columns[j], sums[m][j]);
        }
    }
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < registers; j++)
        store(C, m * ldc + j * LANES, LANES, sums[m][j], 0);
}

/* tile of bfloat16 that comes in pairs of k, which are in a word in B: A [rows, lda], lda even, B [pairs, ldb]. */
INLINE void pair_tile(const uint16_t *A, long lda, const uint32_t *B, long ldb, float *C, long ldc, long pairs, int rows,
                      int registers, const float *start, long apart, const uint32_t *ahead) {
    floats sums[ROWS][REGISTERS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < registers; j++)
        sums[m][j] = start ? load(start, m * apart + j * LANES, LANES, FLOAT32) : all(0);
    for (long k = 0; k < pairs; k++) {
        bits columns[REGISTERS];
        UNROLL for (int j = 0; j < registers; j++) columns[j] = (bits)load(B, k * ldb + j * LANES, LANES, FLOAT32);
        if (ahead) {
            UNROLL for (int j = 0; j < registers; j++) __builtin_prefetch(ahead + k * ldb + j * LANES, 0, 2);
        }
        UNROLL for (int m = 0; m < rows; m++) {
            uint32_t two;
            memcpy(&two, A + m * lda + 2 * k, 4);
            bits pair = two - (bits){0};
            UNROLL for (int j = 0; j < registers; j++)
#ifdef __AVX512BF16__
                /* GCC copies the sums to memory and back around the intrinsic for this, which takes three times as long */
                __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums[m][j]) : "v"(pair), "v"(columns[j]));
#else
                sums[m][j] = MULTIPLY_ADD((floats)(pair << 16), (floats)(columns[j] << 16),
                                          MULTIPLY_ADD((floats)(pair & 0xffff0000), (floats)(columns[j] & 0xffff0000), sums[m][j]));
#endif
        }
    }
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < registers; j++)
        store(C, m * ldc + j * LANES, LANES, sums[m][j], FLOAT32);
}

/* Both for any number of rows and registers that there is. */
#if REGISTERS > 2
#define OF_ROW(OF, rows) OF(rows, 1) OF(rows, 2) OF(rows, 3)
#define OF_MORE(OF) OF_ROW(OF, 7) OF_ROW(OF, 8)
#else
#define OF_ROW(OF, rows) OF(rows, 1) OF(rows, 2)
#define OF_MORE(OF)
#endif
#define OF_ALL(OF) OF_ROW(OF, 1) OF_ROW(OF, 2) OF_ROW(OF, 3) OF_ROW(OF, 4) OF_ROW(OF, 5) OF_ROW(OF, 6) OF_MORE(OF)

static void any_tile(const float *A, long lda, const float *B, long ldb, float *C, long ldc, long K, long rows, long registers,
                     const float *start, long apart, const float *ahead) {
    switch (rows * 4 + registers) {
#define OF_TILE(rows, registers) \
    case rows * 4 + registers: tile(A, lda, B, ldb, C, ldc, K, rows, registers, start, apart, ahead); break;
        OF_ALL(OF_TILE)
    }
}

static void any_pair_tile(const uint16_t *A, long lda, const uint32_t *B, long ldb, float *C, long ldc, long pairs, long rows,
                          long registers, const float *start, long apart, const uint32_t *ahead) {
    switch (rows * 4 + registers) {
#define OF_PAIRS(rows, registers) \
    case rows * 4 + registers: pair_tile(A, lda, B, ldb, C, ldc, pairs, rows, registers, start, apart, ahead); break;
        OF_ALL(OF_PAIRS)
    }
}

/* Some rows of a matrix, and where the tiles of nearly one height begin that they go in. */
typedef struct {
    long begin, end;
} Range;
INLINE long tiles_of(Range some) { return (some.end - some.begin + ROWS - 1) / ROWS; }
INLINE long tile_begins(long t, Range some) { return some.begin + t * (some.end - some.begin) / tiles_of(some); }

/* Of N registers of columns that are left, how many to take: as many threes as leave no one over. */
INLINE long panel_of(long N) { return REGISTERS == 2 || N == 2 || N == 4 ? (N < 2 ? N : 2) : N < 3 ? N : 3; }

/* C = A B, or C + A B: rows [M, K] [K, N], N a multiple of LANES, as tile or, in bfloat16, pair_tile has them. Tiles share a panel
   of B while it is in the first cache. */
static void product(const void *A, long lda, const void *B, long ldb, float *C, long ldc, long M, long N, long K, int more,
                    int kind) {
    Range rows = {0, M};
    for (long n = 0, wide; n < N; n += wide * LANES) {
        wide = panel_of((N - n) / LANES);
        for (long t = 0; t < tiles_of(rows); t++) {
            long m = tile_begins(t, rows), some = tile_begins(t + 1, rows) - m;
            float *to = C + m * ldc + n, *start = more ? to : 0;
            if (kind == BFLOAT16)
                any_pair_tile((const uint16_t *)A + m * lda, lda, (const uint32_t *)B + n, ldb, to, ldc, (K + 1) / 2, some, wide,
                              start, ldc, 0);
            else
                any_tile((const float *)A + m * lda, lda, (const float *)B + n, ldb, to, ldc, K, some, wide, start, ldc, 0);
        }
    }
}

INLINE long up(long n) { return (n + LANES - 1) / LANES * LANES; }
INLINE long apart(long n) { return up(n) + LANES; } /* rows of k: a power of two would put them all into a few cache sets */

#define QUERIES (4 * ROWS) /* that share k and v while those are in the first cache */
#define KEYS 128           /* of v at a time */

/* Weights e^(factor (s - max s)) of some queries' scores s [queries, stride], of T keys each, filled up to registers, in place: in
   bfloat16 where that is `kind`, a row from where the scores' begins; and one over each one's sum. One after the other, each would
   wait for its largest score. */
INLINE void weigh(float *s, long stride, long queries, long T, float factor, float *weights, int kind) {
    float highest[QUERIES];
    factor *= LOG2_E;
    for (long m = 0; m < queries; m++) {
        floats most = all(-INFINITY);
        for (long k = 0; k < T; k += LANES)
            most = larger(only(load(s, m * stride + k, LANES, 0), count(T - k), -INFINITY), most);
        highest[m] = largest(most);
    }
    for (long m = 0; m < queries; m++) {
        floats total = {0};
        for (long k = 0; k < T; k += LANES) {
            floats weight = power((only(load(s, m * stride + k, LANES, 0), count(T - k), -INFINITY) - highest[m]) * factor);
            total += weight;
            store(s + m * stride, k, LANES, weight, kind);
        }
        weights[m] = 1 / sum(total);
    }
}

/* to [n, stride] of `to_kind` = n tokens' d values of `array`, which are `step` values apart. */
INLINE void gather(const void *array, long start, long step, long n, long d, void *to, long stride, int kind, int to_kind) {
    for (long t = 0; t < n; t++) {
        long i = 0;
        for (; i + LANES <= d; i += LANES) store(to, t * stride + i, LANES, load(array, start + t * step + i, LANES, kind), to_kind);
        if (i < d) store(to, t * stride + i, (int)(d - i), load(array, start + t * step + i, (int)(d - i), kind), to_kind);
    }
}

/* Two float32 tokens' values as pairs; without a second one, zeros in its place. */
INLINE void pair(const float *first, const float *second, long d, uint32_t *to) {
    for (long i = 0; i < d; i += LANES) {
        int n = count(d - i);
        bits low = halved(load(first, i, n, FLOAT32)), high = second ? halved(load(second, i, n, FLOAT32)) : (bits){0};
        store(to, i, n, (floats)(low | high << 16), FLOAT32);
    }
}

/* Columns of LANES rows of LANES values, `step` apart, as rows that are `stride` apart. */
INLINE void transpose(const float *from, long step, float *to, long stride) {
    floats rows[LANES];
    UNROLL for (int i = 0; i < LANES; i++) rows[i] = load(from, i * step, LANES, 0);
#ifdef __AVX512F__
    __m512 pairs[16], fours[16], eights[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        __m512d low = (__m512d)pairs[i + j], high = (__m512d)pairs[i + 2 + j];
        fours[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
        fours[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
    UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
        eights[i + j] = _mm512_shuffle_f32x4(fours[i + j], fours[i + 4 + j], 0x88);
        eights[i + 4 + j] = _mm512_shuffle_f32x4(fours[i + j], fours[i + 4 + j], 0xdd);
    }
    UNROLL for (int j = 0; j < 8; j++) {
        floats even = (floats)_mm512_shuffle_f32x4(eights[j], eights[8 + j], 0x88);
        floats odd = (floats)_mm512_shuffle_f32x4(eights[j], eights[8 + j], 0xdd);
        store(to, j * stride, LANES, even, 0);
        store(to, (8 + j) * stride, LANES, odd, 0);
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j * stride + i] = rows[i][j];
#endif
}

/* Floats of scratch memory that attention needs. */
long fastcfg_attention_scratch(long T, long d) {
    long wide = up(d) + LANES;
    return QUERIES * (wide + up(T) + wide) + wide * apart(T) + T * wide + LANES * wide;
}

/* softmax(q k^T / sqrt(d)) v of one head of row r.  qkv [R, T, 3, heads, d] of `kind`, out [R, T, heads, d] of `to_kind`. Its
   products are made in float32; or in bfloat16 where out is and qkv is float32, with k in pairs of values and v in pairs of keys. */
static void attend_head(const void *qkv, void *out, float *scratch, long r, long head, long T, long heads, long d, int kind,
                        int to_kind) {
    int in = kind == FLOAT32 ? to_kind : FLOAT32;
    long pairs = in == BFLOAT16, wide = up(d), words = pairs ? up((d + 1) / 2) : wide; /* of a token of k */
    long values = pairs ? 2 * words : words, keys = up(T), D = heads * d, start = r * T * 3 * D + head * d;
    float *q = scratch, *scores = q + QUERIES * words, *result = scores + QUERIES * keys, *k = result + QUERIES * wide;
    float *v = k + words * apart(T), *few = v + T * wide; /* LANES tokens, on their way to k */
    if (wide != d) memset(v, 0, sizeof(float) * (size_t)(T * wide));
    for (long t = 0; pairs && t < T; t += 2) {
        const float *token = (const float *)qkv + start + 2 * D + t * 3 * D;
        pair(token, t + 1 < T ? token + 3 * D : 0, d, (uint32_t *)v + t / 2 * wide);
    }
    if (!pairs) gather(qkv, start + 2 * D, 3 * D, T, d, v, wide, kind, FLOAT32);
    for (long t = 0; t < T; t += LANES) {
        int n = count(T - t);
        if (n < LANES || values != d) memset(few, 0, sizeof(float) * (size_t)(LANES * words));
        gather(qkv, start + D + t * 3 * D, 3 * D, n, d, few, values, kind, in);
        for (long i = 0; i < words; i += LANES) transpose(few + i, words, k + i * apart(T) + t, apart(T));
    }
    if (values != d) memset(q, 0, sizeof(float) * (size_t)(QUERIES * words));
    for (long t = 0, rows; t < T; t += rows) {
        rows = T - t < QUERIES ? T - t : QUERIES;
        gather(qkv, start + t * 3 * D, 3 * D, rows, d, q, values, kind, in);
        product(q, values, k, apart(T), scores, keys, rows, keys, d, 0, in);
        float weights[QUERIES];
        weigh(scores, keys, rows, T, 1 / sqrtf((float)d), weights, in);
        for (long key = 0; key < T; key += KEYS) {
            const void *some = pairs ? (const void *)((uint16_t *)scores + key) : scores + key;
            product(some, pairs ? 2 * keys : keys, v + (pairs ? key / 2 : key) * wide, wide, result, wide, rows, wide,
                    T - key < KEYS ? T - key : KEYS, key > 0, in);
        }
        for (long m = 0; m < rows; m++)
            for (long i = 0; i < d; i += LANES) {
                int n = count(d - i);
                floats value = load(result, m * wide + i, n, 0) * weights[m];
                store(out, (r * T + t + m) * D + head * d + i, n, value, to_kind);
            }
    }
}

void fastcfg_attention(const void *qkv, void *out, float *scratch, long R, long T, long heads, long d, int kind) {
    for (long r = 0; r < R; r++)
        for (long head = 0; head < heads; head++) attend_head(qkv, out, scratch, r, head, T, heads, d, kind, kind);
}

INLINE double number(const void *array, long at, int kind) {
    return kind == FLOAT64 ? ((const double *)array)[at] : load(array, at, 1, kind)[0];
}

/* The guided step without rescale and learned variance, in float64 and with the reference engine's rounding, in place in x.

   model_out [B or 2B, outputs, S] of `kind`, the null half, if any, behind; x, history or none [B, C, S]; noise or none float32
   [B, C, S]; coef [steps, 9]: of `CpuOperations.step_table`; scale [steps, B]; step [B]. The first `guided` channels are
   guided. */
void fastcfg_guided_step(const void *model_out, double *x, double *history, const float *noise, const double *coef,
                         const float *scale, const int32_t *step, long halves, long B, long C, long outputs, long S,
                         long guided, int clip, int kind) {
    for (long b = 0; b < B; b++) {
        const double *c = coef + 9 * step[b], s = scale[step[b] * B + b];
        for (long i = 0; i < C * S; i++) {
            long out = b * outputs * S + i, in = b * C * S + i;
            double prediction = number(model_out, out, kind);
            if (halves == 2 && s != 1 && i < guided * S) {
                double null = number(model_out, out + B * outputs * S, kind);
                prediction = null + s * (prediction - null);
            }
            double x0 = c[0] * x[in] + c[1] * prediction;
            if (clip) x0 = x0 < -1 ? -1 : x0 > 1 ? 1 : x0;
            x[in] = c[2] * x[in] + c[3] * prediction + c[4] * x0;
            if (history) {
                x[in] += c[5] * history[in];
                history[in] = x0;
            }
            if (noise) x[in] += c[6] * noise[in];
        }
    }
}

/* The first two of the words of `fastcfg.noise.philox` for N elements of each sample, uint32 [B, N] each. */
void fastcfg_philox(const int64_t *seeds, const int64_t *indices, const int32_t *step, uint32_t *first, uint32_t *second, long B,
                    long N) {
    for (long b = 0; b < B; b++) {
        uint64_t seed = (uint64_t)seeds[b], place = (uint64_t)indices[b];
        for (long i = 0; i < N; i++) {
            uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
            uint32_t c0 = (uint32_t)i, c1 = (uint32_t)step[b], c2 = (uint32_t)place, c3 = (uint32_t)(place >> 32);
            for (int round = 0; round < 10; round++) {
                uint64_t product_a = (uint64_t)0xD2511F53u * c0, product_b = (uint64_t)0xCD9E8D57u * c2;
                c0 = (uint32_t)(product_b >> 32) ^ c1 ^ k0;
                c1 = (uint32_t)product_b;
                c2 = (uint32_t)(product_a >> 32) ^ c3 ^ k1;
                c3 = (uint32_t)product_a;
                k0 += 0x9E3779B9u;
                k1 += 0xBB67AE85u;
            }
            first[b * N + i] = c0;
            second[b * N + i] = c1;
        }
    }
}
