/* Attention, a head at a time: its products, and the softmax between them, on blocks that stay in the caches. */

#include "cpu_products.h"

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
            most = larger(only(load(s, m * stride + k, LANES, FLOAT32), count(T - k), -INFINITY), most);
        highest[m] = largest(most);
    }
    for (long m = 0; m < queries; m++) {
        floats total = {0};
        for (long k = 0; k < T; k += LANES) {
            floats weight = power((only(load(s, m * stride + k, LANES, FLOAT32), count(T - k), -INFINITY) - highest[m]) * factor);
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
    UNROLL for (int i = 0; i < LANES; i++) rows[i] = load(from, i * step, LANES, FLOAT32);
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
        store(to, j * stride, LANES, even, FLOAT32);
        store(to, (8 + j) * stride, LANES, odd, FLOAT32);
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
                floats value = load(result, m * wide + i, n, FLOAT32) * weights[m];
                store(out, (r * T + t + m) * D + head * d + i, n, value, to_kind);
            }
    }
}

void fastcfg_attention(const void *qkv, void *out, float *scratch, long R, long T, long heads, long d, int kind) {
    for (long r = 0; r < R; r++)
        for (long head = 0; head < heads; head++) attend_head(qkv, out, scratch, r, head, T, heads, d, kind, kind);
}
