/* A whole DiT from its tokens to its output, and the steps of a call, for cpu_dit.py: layers of its own products, and a team of
   threads that share one call. */

#include "cpu_attention.c"
#include "cpu_kernels.c"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define INT8 3 /* a layer's kind */

/* A linear layer, its weight [N, K] packed into panels of COLUMNS columns: float32 [N / COLUMNS, K, COLUMNS], bfloat16
   [N / COLUMNS, K / 2, COLUMNS, 2] or int8 [N / COLUMNS, K / 4, COLUMNS, 4]. In int8 there are the columns' scales, and `start`,
   which takes back the 128 that is in every activation: -128 times a column's sum. N and K are filled up with zeros, and
   the bias to as many columns as N. */
typedef struct {
    const void *weight;
    const int32_t *start;
    const float *scale, *bias;
    long N, K, kind;
} Layer;

/* What a layer reads: values [M, pitch] of its kind, or, for an int8 one, whole [M, pitch] and scale [M] of `quantise`. */
typedef struct {
    void *values;
    uint8_t *whole;
    float *scale;
} Tokens;

#define COLUMNS (REGISTERS * LANES)

INLINE long filled(long N) { return (N + COLUMNS - 1) / COLUMNS * COLUMNS; }
INLINE long fours(long K) { return (K + 3) / 4 * 4; }
INLINE long pitch(long kind, long K) { return kind == INT8 ? fours(K) : kind == BFLOAT16 ? (K + 1) / 2 * 2 : K; }
INLINE long larger_of(long a, long b) { return a > b ? a : b; }

#ifdef __AVX512VNNI__
#define HAS_INT8 1
/* Products of whole [rows, K], with a scale for each row, and an int8 panel. Sums are of whole numbers, so nothing depends on
   their order. */
INLINE void whole_tile(const uint8_t *whole, const float *scale, const Layer *layer, long n, float *y, long stride, long K,
                       int rows) {
    const int8_t *panel = (const int8_t *)layer->weight + n * K;
    ints sums[ROWS][REGISTERS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < REGISTERS; j++)
        memcpy(&sums[m][j], layer->start + n + j * LANES, sizeof(ints));
    for (long k = 0; k < K; k += 4) {
        ints columns[REGISTERS];
        UNROLL for (int j = 0; j < REGISTERS; j++) memcpy(&columns[j], panel + k * COLUMNS + j * 4 * LANES, sizeof(ints));
        UNROLL for (int m = 0; m < rows; m++) {
            int32_t four;
            memcpy(&four, whole + m * K + k, 4);
            ints token = four - (ints){0};
            /* GCC copies the sums to memory and back around the intrinsic for this, which takes three times as long */
            UNROLL for (int j = 0; j < REGISTERS; j++)
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[m][j]) : "v"(token), "v"(columns[j]));
        }
    }
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int j = 0; j < REGISTERS; j++) {
        floats value = __builtin_convertvector(sums[m][j], floats) * load(layer->scale, n + j * LANES, LANES, FLOAT32);
        store(y, m * stride + j * LANES, LANES, value * scale[m] + load(layer->bias, n + j * LANES, LANES, FLOAT32), FLOAT32);
    }
}

static void any_whole_tile(const uint8_t *whole, const float *scale, const Layer *layer, long n, float *y, long stride, long K,
                           long rows) {
    switch (rows) {
#define OF_ROWS(rows) case rows: whole_tile(whole, scale, layer, n, y, stride, K, rows); break;
        OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5) OF_ROWS(6) OF_ROWS(7) OF_ROWS(8)
    }
}
#else
#define HAS_INT8 0
#define any_whole_tile(...)
#endif

/* A panel is read so many k at a time: with more, it would leave the second cache between two tiles. */
INLINE long chunk_of(const Layer *layer) { return layer->kind == INT8 ? layer->K : layer->kind == BFLOAT16 ? 3072 : 1536; }
INLINE long chunks_of(const Layer *layer) { return (layer->K + chunk_of(layer) - 1) / chunk_of(layer); }

/* y [rows, stride] = the layer of rows m .. m + rows of `in`, for the panel of column n, of the chunk of k; where it is the first
   tile of that panel, the next one, which may have to come from memory, is fetched meanwhile. */
static void layer_tile(const Layer *layer, const Tokens *in, long m, long n, long chunk, float *y, long stride, long rows,
                       int first) {
    long K = pitch(layer->kind, layer->K), k = chunk * chunk_of(layer), some = K - k < chunk_of(layer) ? K - k : chunk_of(layer);
    long from = n * K + k * COLUMNS, next = from + K * COLUMNS, apart = chunk ? stride : 0;
    const float *start = chunk ? y : layer->bias + n, *panels = layer->weight;
    const uint32_t *pairs = layer->weight;
    if (HAS_INT8 && layer->kind == INT8)
        any_whole_tile(in->whole + m * K, in->scale + m, layer, n, y, stride, K, rows);
    else if (layer->kind == BFLOAT16)
        any_pair_tile((const uint16_t *)in->values + m * K + k, K, pairs + from / 2, COLUMNS, y, stride, some / 2, rows,
                      REGISTERS, start, apart, first ? pairs + next / 2 : 0);
    else
        any_tile((const float *)in->values + m * K + k, K, panels + from, COLUMNS, y, stride, some, rows, REGISTERS, start, apart,
                 first ? panels + next : 0);
}

/* So many tiles share a panel, and their results the innermost caches; more where a layer's weight has to come from memory. */
INLINE long block_of(const Layer *layer) { return layer->N * layer->K > 1 << 17 ? 32 : 4; }

/* Floats of scratch memory that a layer needs. */
long fastcfg_layer_scratch(const Layer *layer) { return block_of(layer) * ROWS * filled(layer->N); }

/* Tiles first .. last of a layer, to y [rows, stride]. */
static void multiply(const Layer *layer, const Tokens *in, float *y, long stride, Range some, long first, long last) {
    long from = tile_begins(first, some);
    for (long chunk = 0; chunk < chunks_of(layer); chunk++)
        for (long n = 0; n < layer->N; n += COLUMNS)
            for (long t = first; t < last; t++) {
                long m = tile_begins(t, some), rows = tile_begins(t + 1, some) - m;
                layer_tile(layer, in, m, n, chunk, y + (m - from) * stride + n, stride, rows, t == first);
            }
}

/* A layer on some of its tokens. Behind it, token by token: to hidden, if there is one, gelu of the result, as a layer of the
   same kind reads it; else into the stream, if there is one.  y: of fastcfg_layer_scratch. */
static void run_layer(const Layer *layer, const Tokens *in, const Tokens *hidden, const Stream *to, float *y, Range some) {
    long tiles = tiles_of(some), N = layer->N, stride = filled(N), block = block_of(layer);
    int direct = to && !to->residual && N == stride; /* there is nothing to be done behind it */
    for (long first = 0; first < tiles; first += block) {
        long last = first + block < tiles ? first + block : tiles, from = tile_begins(first, some);
        multiply(layer, in, direct ? (float *)to->out + from * N : y, stride, some, first, last);
        for (long m = from; m < tile_begins(last, some) && !direct; m++) {
            float *token = y + (m - from) * stride;
            if (to)
                stream_token(to, m, token, 1, 0);
            else if (!hidden)
                continue;
            else if (layer->kind == INT8)
                hidden_token(token, hidden->scale + m, 0, token, hidden->whole + m * fours(N), N);
            else
                for (long k = 0; k < N; k += LANES) {
                    int n = count(N - k);
                    store(hidden->values, m * pitch(layer->kind, N) + k, n, gelu(load(token, k, n, FLOAT32)), (int)layer->kind);
                }
        }
    }
}

typedef struct {
    Layer qkv, proj, fc1, fc2;
    float eps1, eps2;
} Block;

/* A DiT, whose D 4 divides. embedding [C p p, D] and position [T, D], to which the patches' bias is added; width: of the table of
   shifts, scales and gates, six of a block, one after the other, and two of the last layer; side: patches of a row; outputs: C
   or 2 C. */
typedef struct {
    const float *embedding, *position;
    const Block *blocks;
    Layer last;
    float last_eps;
    long depth, T, D, H, heads, width, side, p, C, outputs;
} Network;

/* Scratch memory: y and attention are a thread's own, the rest is for all M = R T tokens and shared. */
typedef struct {
    float *stream, *qkv, *wide, *scale, *patches, *y, *attention;
    void *hidden, *normed;
    uint8_t *whole;
} Scratch;

/* Scratch of R rows from `start` on, for thread `rank`; returns its floats for so many threads. */
static long lay_out(const Network *net, long R, long threads, float *start, long rank, Scratch *to) {
    long M = R * net->T, D = net->D, largest_y = fastcfg_layer_scratch(&net->last), used = 0;
    for (const Block *block = net->blocks; block < net->blocks + net->depth; block++) {
        const Layer *layers[] = {&block->qkv, &block->proj, &block->fc1, &block->fc2};
        for (int l = 0; l < 4; l++) largest_y = larger_of(largest_y, fastcfg_layer_scratch(layers[l]));
    }
#define SHARED(name, type, floats) to->name = (type *)(start + used), used += up(floats)
    SHARED(stream, float, M * D);
    SHARED(qkv, float, M * 3 * D);
    SHARED(hidden, void, M * (net->H + 3)); /* float32, or fewer bytes */
    SHARED(normed, void, M * D);
    SHARED(wide, float, M * D); /* what the last layer reads: a token has its place in normed by another layer's kind */
    SHARED(scale, float, M);
    SHARED(patches, float, M * net->last.N);
    SHARED(whole, uint8_t, M * fours(D) / 4);
#undef SHARED
    long own = up(largest_y) + up(fastcfg_attention_scratch(net->T, D / net->heads));
    to->y = start + used + rank * own;
    to->attention = to->y + up(largest_y);
    return used + threads * own;
}

long fastcfg_denoise_scratch(const Network *net, long R, long threads) {
    Scratch ignored;
    return lay_out(net, R, threads, 0, 0, &ignored);
}

/* One forward of R rows: tokens [B, T, D], rows r and r mod B of one sample; table [., width] and index [R]; out
   [R, outputs, side p, side p]; memory: of fastcfg_denoise_scratch, for as many threads as a team may have. */
typedef struct {
    const Network *net;
    const float *tokens, *table;
    const int32_t *index;
    float *out, *memory;
    long R, B, threads;
} Job;

/* Threads that share jobs: a leader, who makes the team and posts the jobs, and helpers who have come to help, until they are
   dismissed. A job's rows are shared in `parts` that whoever is free takes, so that a helper may come late; where the threads do
   not divide them, by tokens and heads, among those `members` that are there when it is posted (parts 0). */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t posted;
    Job job;
    long members;
    _Atomic long helpers, jobs, parts, waiting, turns, done;
    _Atomic uint64_t next; /* part of the job, whose number is in the upper half */
    _Atomic int dismissed;
} Team;

#define PART_TOKENS 400 /* of whole rows that are computed together: more would leave the caches */
#define SPINS 4000 /* pauses, of 10 to 140 cycles: what a leader needs between two steps, and less than it takes to wake */
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() sched_yield()
#endif

INLINE void spin(long spins) {
    if (spins < SPINS)
        PAUSE();
    else
        sched_yield();
}

/* Takes the lock, which is never held for long: going to sleep for it and being woken would take longer. */
static void take(pthread_mutex_t *lock) {
    for (long spins = 0; pthread_mutex_trylock(lock); spins++) spin(spins);
}

/* Goes on once all members have come here. */
static void meet(Team *team, long members) {
    if (!team || members == 1) return;
    long turn = atomic_load(&team->turns);
    if (atomic_fetch_add(&team->waiting, 1) + 1 == members) {
        atomic_store(&team->waiting, 0);
        atomic_store(&team->turns, turn + 1);
        return;
    }
    for (long spins = 0; atomic_load(&team->turns) == turn; spins++) spin(spins);
}

/* adaLN of x [sources, T, D] for a layer to read: of the table, the two columns from `column` on. */
INLINE void condition(const Job *job, const float *x, long sources, long column, float eps, const Layer *layer,
                      const Tokens *out, Range some) {
    int kind = layer->kind == BFLOAT16 ? BFLOAT16 : FLOAT32;
    long T = job->net->T, D = job->net->D, width = job->net->width;
    for (long m = some.begin, n; m < some.end; m += n) {
        n = some.end - m < TOGETHER ? some.end - m : TOGETHER;
        ints most[TOGETHER];
        adaln(x, job->table, job->index, out->values, most, m, n, sources, T, D, width, column, column + D, eps, FLOAT32, kind);
        for (long i = m; i < m + n && layer->kind == INT8; i++) {
            float s = largest_magnitude(most[i - m]);
            out->scale[i] = s / 127;
            quantise_token(out->values, i * D, s, out->whole + i * fours(D), D, FLOAT32);
        }
    }
}

/* Patches [p, p, outputs] of some tokens to their places in out. */
INLINE void unpatchify(const Job *job, const float *patches, Range some) {
    long p = job->net->p, side = job->net->side, outputs = job->net->outputs;
    for (long m = some.begin; m < some.end; m++) {
        long r = m / job->net->T, i = m % job->net->T / side, j = m % side;
        const float *patch = patches + m * p * p * outputs;
        for (long c = 0; c < outputs; c++)
            for (long a = 0; a < p; a++)
                for (long b = 0; b < p; b++)
                    job->out[((r * outputs + c) * side * p + i * p + a) * side * p + j * p + b] = patch[(a * p + b) * outputs + c];
    }
}

INLINE Range share(long n, long rank, long members) { return (Range){rank * n / members, (rank + 1) * n / members}; }

/* What one of `members` threads does of a job: its tokens, which depend on others of their row in attention alone, and its
   heads there. team: with whom it has to meet for that; without one, the `rank`th of so many parts, of whole rows, is its.
   place: of its own scratch. */
static void work(const Job *job, Team *team, long rank, long members, long place) {
    const Network *net = job->net;
    Scratch s;
    lay_out(net, job->R, job->threads, job->memory, place, &s);
    long T = net->T, D = net->D, R = job->R, column = 0, sources = job->B;
    Range rows = share(R, rank, members), some = {rows.begin * T, rows.end * T};
    Range heads = {rows.begin * net->heads, rows.end * net->heads};
    if (team) some = share(R * T, rank, members), heads = share(R * net->heads, rank, members);
    Tokens normed = {s.normed, s.whole, s.scale}, hidden = {s.hidden, (uint8_t *)s.hidden, s.scale};
    const float *x = job->tokens;
    int kind = net->blocks->qkv.kind == BFLOAT16 ? BFLOAT16 : FLOAT32;
    for (long m = some.begin; m < some.end && kind == BFLOAT16 && net->H % 2; m++)
        ((uint16_t *)s.hidden)[m * (net->H + 1) + net->H] = 0; /* what fills up a token, and nothing writes to */
    for (const Block *block = net->blocks; block < net->blocks + net->depth; block++, column += 6 * D) {
        Stream plain = {0, 0, 0, s.qkv, R, T, 3 * D, 0, 0, FLOAT32};
        condition(job, x, sources, column, block->eps1, &block->qkv, &normed, some);
        run_layer(&block->qkv, &normed, 0, &plain, s.y, some);
        meet(team, members);
        for (long h = heads.begin; h < heads.end; h++)
            attend_head(s.qkv, s.normed, s.attention, h / net->heads, h % net->heads, T, net->heads, D / net->heads, FLOAT32, kind);
        meet(team, members);
        if (block->proj.kind == INT8)
            quantise((float *)s.normed + some.begin * D, s.whole + some.begin * fours(D), fours(D), s.scale + some.begin,
                     some.end - some.begin, D, FLOAT32);
        Stream joined = {x, job->table, job->index, s.stream, sources, T, D, net->width, column + 2 * D, FLOAT32};
        run_layer(&block->proj, &normed, 0, &joined, s.y, some);
        x = s.stream;
        sources = R;
        condition(job, x, sources, column + 3 * D, block->eps2, &block->fc1, &normed, some);
        run_layer(&block->fc1, &normed, &hidden, 0, s.y, some);
        Stream again = {x, job->table, job->index, s.stream, sources, T, D, net->width, column + 5 * D, FLOAT32};
        run_layer(&block->fc2, &hidden, 0, &again, s.y, some);
    }
    Stream end = {0, 0, 0, s.patches, R, T, net->last.N, 0, 0, FLOAT32};
    Tokens wide = {s.wide, 0, 0};
    condition(job, x, sources, column, net->last_eps, &net->last, &wide, some);
    run_layer(&net->last, &wide, 0, &end, s.y, some);
    unpatchify(job, s.patches, some);
}

/* Parts of job `number`, as long as there are any. parts: of this job. The team's may be the next one's already. */
static void take_parts(Team *team, uint64_t number, long parts, long place) {
    for (;;) {
        uint64_t next = atomic_load(&team->next);
        long part = (long)(uint32_t)next;
        if (next >> 32 != number || part >= parts) return;
        if (!atomic_compare_exchange_weak(&team->next, &next, next + 1)) continue;
        work(&team->job, 0, part, parts, place);
        atomic_fetch_add(&team->done, 1);
    }
}

long fastcfg_team_size(void) { return sizeof(Team); }

void fastcfg_team(Team *team) {
    memset(team, 0, sizeof(Team));
    pthread_mutex_init(&team->lock, 0);
    pthread_cond_init(&team->posted, 0);
}

/* Takes part in a team's jobs until the leader dismisses it. */
void fastcfg_help(Team *team) {
    take(&team->lock);
    long rank = atomic_fetch_add(&team->helpers, 1) + 1, seen = atomic_load(&team->jobs);
    if (atomic_load(&team->parts)) seen--; /* the job under way can be joined */
    pthread_mutex_unlock(&team->lock);
    for (;;) {
        for (int spins = 0; spins < SPINS && atomic_load(&team->jobs) == seen && !atomic_load(&team->dismissed); spins++) PAUSE();
        take(&team->lock);
        while (atomic_load(&team->jobs) == seen && !atomic_load(&team->dismissed)) pthread_cond_wait(&team->posted, &team->lock);
        long number = atomic_load(&team->jobs), by_parts = atomic_load(&team->parts), members = team->members;
        pthread_mutex_unlock(&team->lock);
        if (atomic_load(&team->dismissed)) return; /* which happens between two jobs */
        seen = number;
        if (by_parts)
            take_parts(team, (uint64_t)number, by_parts, rank);
        else {
            work(&team->job, team, rank, members, rank);
            meet(team, members);
        }
    }
}

void fastcfg_dismiss(Team *team) {
    take(&team->lock);
    atomic_store(&team->dismissed, 1);
    pthread_cond_broadcast(&team->posted);
    pthread_mutex_unlock(&team->lock);
}

/* Does a job with the help of a team, to which `expected` helpers have come or will; without a team, alone. */
void fastcfg_denoise(const Job *job, Team *team, long expected) {
    long members = team ? expected + 1 : 1, parts = members * ((job->R * job->net->T - 1) / (members * PART_TOKENS) + 1);
    if (parts > job->R) parts = job->R;
    if (!team) {
        for (long part = 0; part < parts; part++) work(job, 0, part, parts, 0);
        return;
    }
    long by_parts = job->R % members == 0;
    for (long spins = 0; !by_parts && spins < 2 * SPINS && atomic_load(&team->helpers) < expected; spins++) spin(spins);
    take(&team->lock);
    team->job = *job;
    team->members = members = 1 + atomic_load(&team->helpers);
    atomic_store(&team->done, 0);
    atomic_store(&team->parts, by_parts ? parts : 0);
    uint64_t number = (uint64_t)(atomic_fetch_add(&team->jobs, 1) + 1);
    atomic_store(&team->next, number << 32);
    pthread_cond_broadcast(&team->posted);
    pthread_mutex_unlock(&team->lock);
    if (by_parts) {
        take_parts(team, number, parts, 0);
        for (long spins = 0; atomic_load(&team->done) < parts; spins++) spin(spins);
    } else {
        work(job, team, 0, members, 0);
        meet(team, members);
    }
}

/* Tokens [B, T, D] of x, float64 [B, C, side p, side p]. */
void fastcfg_embed(const Network *net, const double *x, float *tokens, long B) {
    long T = net->T, D = net->D, C = net->C, p = net->p, side = net->side;
    for (long m = 0; m < B * T; m++) {
        long i = m % T / side, j = m % side;
        float *token = tokens + m * D;
        memcpy(token, net->position + m % T * D, sizeof(float) * (size_t)D);
        const float *weight = net->embedding;
        for (long c = 0; c < C; c++)
            for (long a = 0; a < p; a++)
                for (long b = 0; b < p; b++, weight += D) {
                    double value = x[((m / T * C + c) * side * p + i * p + a) * side * p + j * p + b];
                    for (long d = 0; d < D; d += LANES) {
                        int n = count(D - d);
                        floats before = load(token, d, n, FLOAT32);
                        store(token, d, n, MULTIPLY_ADD(all((float)value), load(weight, d, n, FLOAT32), before), FLOAT32);
                    }
                }
    }
}

/* Steps first .. last of a plan for B samples, in place in x, as fastcfg_guided_step does them. guided: for each step of the plan,
   whether it has a null half; lines [B or 2B]: where in the table those of row r begin, whose first is for step `start`; noise:
   from step `first` on, or none; channels: that are guided; tokens [B, T, D], out [2B, outputs, side p, side p], index [2B]:
   scratch memory, as in Job; stopped: if there is one, no step begins once it is set. */
typedef struct {
    const Network *net;
    const float *table, *scale, *noise;
    const double *coef;
    const int32_t *lines;
    const uint8_t *guided;
    double *x, *history;
    float *tokens, *out, *memory;
    int32_t *index;
    const int *stopped;
    long B, first, last, start, channels, clip, threads;
} Loop;

void fastcfg_loop(const Loop *loop, Team *team, long expected) {
    const Network *net = loop->net;
    long B = loop->B, C = net->C, S = net->T * net->p * net->p;
    for (long i = loop->first; i < loop->last && !(loop->stopped && __atomic_load_n(loop->stopped, __ATOMIC_RELAXED)); i++) {
        long halves = loop->guided[i] ? 2 : 1;
        for (long r = 0; r < halves * B; r++) loop->index[r] = loop->lines[r] + (int32_t)(i - loop->start);
        fastcfg_embed(net, loop->x, loop->tokens, B);
        Job job = {net, loop->tokens, loop->table, loop->index, loop->out, loop->memory, halves * B, B, loop->threads};
        fastcfg_denoise(&job, team, expected);
        for (long b = 0; b < B; b++) loop->index[b] = (int32_t)i;
        const float *noise = loop->noise && loop->coef[9 * i + 6] != 0 ? loop->noise + (i - loop->first) * B * C * S : 0;
        fastcfg_guided_step(loop->out, loop->x, loop->history, noise, loop->coef, loop->scale, loop->index, halves, B, C,
                            net->outputs, S, loop->channels, (int)loop->clip, FLOAT32);
    }
}

/* For measuring: a layer of M tokens alone, and those of a network of R rows, with its attention or without, on what
   its memory holds. */
void fastcfg_layer_products(const Layer *layer, const Tokens *in, float *y, long M) {
    run_layer(layer, in, 0, 0, y, (Range){0, M});
}

void fastcfg_products(const Network *net, float *memory, long R, int attention) {
    Scratch s;
    lay_out(net, R, 1, memory, 0, &s);
    long M = R * net->T;
    Tokens normed = {s.normed, s.whole, s.scale}, hidden = {s.hidden, (uint8_t *)s.hidden, s.scale};
    for (const Block *block = net->blocks; block < net->blocks + net->depth; block++) {
        fastcfg_layer_products(&block->qkv, &normed, s.y, M);
        for (long h = 0; attention && h < R * net->heads; h++)
            attend_head(s.qkv, s.stream, s.attention, h / net->heads, h % net->heads, net->T, net->heads, net->D / net->heads,
                        FLOAT32, block->proj.kind == BFLOAT16 ? BFLOAT16 : FLOAT32);
        fastcfg_layer_products(&block->proj, &normed, s.y, M);
        fastcfg_layer_products(&block->fc1, &normed, s.y, M);
        fastcfg_layer_products(&block->fc2, &hidden, s.y, M);
    }
    Tokens wide = {s.wide, 0, 0};
    fastcfg_layer_products(&net->last, &wide, s.y, M);
}

/* The columns of a panel. */
long fastcfg_columns(void) { return COLUMNS; }

/* Whether this library has fast products here: in float32 and bfloat16 (by FMA), in int8 (by VNNI). */
int fastcfg_has_float32(void) { return HAS_FLOAT32; }
int fastcfg_has_int8(void) { return HAS_INT8; }
