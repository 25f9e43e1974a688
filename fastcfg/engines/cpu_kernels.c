/* What a DiT's blocks do between products, and the end of a step, on one core: one pass over memory each, in float32 registers.

   Compiled where it runs (cpu_native.py). Tensors are contiguous; kind says what is in an array that may be one of several.
   table [., width] is float32, and index[r] its line for row r: shifts, scales and gates. Where x has fewer rows than index,
   rows share it: row r reads row r mod sources. A token's bits do not depend on other tokens. */

#include "cpu_vectors.h"

/* Tokens that go through adaLN together: of one alone, each pass would wait for the sum of the pass before. */
#define TOGETHER 8

/* adaLN's three passes over a token: its mean, one over its deviation, and the result. */
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

/* Returns the result's largest magnitudes, one a lane, for int8. */
INLINE ints modulate(const void *x, long at, const float *shift, const float *scale, void *out, long to, long D, float mean,
                     float factor, int kind, int to_kind) {
    ints most = {0};
    for (long d = 0; d < D; d += LANES) {
        int n = count(D - d);
        floats normal = (load(x, at + d, n, kind) - mean) * factor;
        floats value = normal * (1.0f + load(scale, d, n, FLOAT32)) + load(shift, d, n, FLOAT32);
        store(out, to + d, n, value, to_kind);
        most = larger_magnitude(only(value, n, 0), most);
    }
    return most;
}

/* adaLN: out = (x - mean) / sqrt(var + eps) (1 + scale) + shift, of n tokens from m on, n <= TOGETHER. x [sources, T, D], out
   [R, T, D]; most: of each token's result, as modulate returns it. */
INLINE void adaln(const void *x, const float *table, const int32_t *index, void *out, ints *most, long m, long n, long sources,
                  long T, long D, long width, long shift_column, long scale_column, float eps, int kind, int to_kind) {
    long at[TOGETHER];
    float mean[TOGETHER], factor[TOGETHER];
    for (long i = 0; i < n; i++) {
        at[i] = ((m + i) / T % sources * T + (m + i) % T) * D;
        mean[i] = mean_of(x, at[i], D, kind);
    }
    for (long i = 0; i < n; i++) factor[i] = factor_of(x, at[i], D, mean[i], eps, kind);
    for (long i = 0; i < n; i++) {
        const float *line = table + index[(m + i) / T] * width;
        most[i] = modulate(x, at[i], line + shift_column, line + scale_column, out, (m + i) * D, D, mean[i], factor[i], kind,
                           to_kind);
    }
}

void fastcfg_adaln(const void *x, const float *table, const int32_t *index, void *out, long R, long sources, long T, long D,
                   long width, long shift_column, long scale_column, float eps, int kind) {
    ints unused[TOGETHER];
    for (long m = 0, n; m < R * T; m += n) {
        n = R * T - m < TOGETHER ? R * T - m : TOGETHER;
        if (kind == BFLOAT16)
            adaln(x, table, index, out, unused, m, n, sources, T, D, width, shift_column, scale_column, eps, BFLOAT16, BFLOAT16);
        else
            adaln(x, table, index, out, unused, m, n, sources, T, D, width, shift_column, scale_column, eps, FLOAT32, FLOAT32);
    }
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
                floats value = load(line, d, n, FLOAT32) * load(y, to + d, n, kind);
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
        floats value = load(y, k, n, FLOAT32);
        if (bias) value = value * *scale + load(bias, k, n, FLOAT32);
        value = gelu(value);
        most = larger_magnitude(value, most);
        store(token, k, n, value, FLOAT32);
    }
    float s = largest_magnitude(most);
    *scale = s / 127;
    quantise_token(token, 0, s, whole, K, FLOAT32);
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
        floats value = load(y, d, n, FLOAT32);
        if (bias) value = value * scale + load(bias, d, n, FLOAT32);
        if (gate) value = load(to->residual, in + d, n, to->kind) + load(gate, d, n, FLOAT32) * value;
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
