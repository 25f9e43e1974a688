/* A register of float32 values, for AVX-512, AVX2 and whatever else GCC and Clang have vectors for.

   Arrays may hold other kinds of values, which are converted on their way. Compile without contraction of a * b + c: where it
   pays, it is asked for (MULTIPLY_ADD). */

#pragma once

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
