/* Products of matrices, as tiles of sums that stay in registers. */

#pragma once

#include "cpu_vectors.h"

/* C = start + A B for `rows` rows and `registers` of columns, start being `apart` values further for the next row: C itself, a
   row for all, or zeros. ahead: what will be read like B next, if it is to be fetched meanwhile. */
INLINE void tile(const float *A, long lda, const float *B, long ldb, float *C, long ldc, long K, int rows, int registers,
                 const float *start, long apart, const float *ahead) {
    floats sums[ROWS][REGISTERS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < registers; j++)
        sums[m][j] = start ? load(start, m * apart + j * LANES, LANES, FLOAT32) : all(0);
    for (long k = 0; k < K; k++) {
        floats columns[REGISTERS];
        UNROLL for (int j = 0; j < registers; j++) columns[j] = load(B, k * ldb + j * LANES, LANES, FLOAT32);
        if (ahead) {
            UNROLL for (int j = 0; j < registers; j++) __builtin_prefetch(ahead + k * ldb + j * LANES, 0, 2);
        }
        UNROLL for (int m = 0; m < rows; m++) {
            floats a = all(A[m * lda + k]);
            UNROLL for (int j = 0; j < registers; j++) sums[m][j] = MULTIPLY_ADD(a, columns[j], sums[m][j]);
        }
    }
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < registers; j++)
        store(C, m * ldc + j * LANES, LANES, sums[m][j], FLOAT32);
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
