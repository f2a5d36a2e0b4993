/* y = x W^T from the kernel layout: tables of each token's inputs, then look-ups of the signs of each tile of rows. Matrices of
 * one input share the parallel regions: their products are too small for one each. */
#include <string.h>

#include "sab_cpu.h"

enum {
    TASK_TOKENS = 16,            /* tokens that one task takes: a tile's codes stay in the nearest cache for all of them */
    CHUNK_TOKENS = 64,           /* tokens whose tables exist at a time, at most */
    CHUNK_BYTES = 4 << 20,       /* and the memory that their tables may take */
    /* Less work than this many weights * tokens is done sooner than another thread takes its part of it: */
    TEAM_WEIGHTS = 512 << 10,    /* a thread of PyTorch's team, mostly awake */
    WORKER_WEIGHTS = 16 << 20,   /* a sleeping worker of our own */
    TABLE_WEIGHTS = 32,          /* making the tables of a column takes as long as looking up so many weights */
    TASKS_PER_THREAD = 4,
    MOST_MATRICES = 8,           /* that share parallel regions; more take turns */
};

typedef struct {
    const uint8_t *codes;
    const uint16_t *row_scale, *col_scale;
    int64_t columns, column_bytes, most_outliers;
    int64_t tables, scales, outliers; /* where they begin in a token's part of the scratch memory */
} plane; /* one of a matrix: full ones, then the residual one */

typedef struct {
    const sab_kernels *kernels;
    const sab_matrix *matrix;
    const char *x;
    char *y;
    int64_t x_stride, first_token, tokens; /* tokens of this chunk */
    int dtype, exact;
    char *memory; /* of token t: memory + t * token_bytes: inputs, scaled inputs, sizes, then tables and scales by plane */
    int64_t token_bytes, scaled, sizes;
    plane *planes;
    int32_t *significant; /* column of each significant column, ascending */
    int64_t tiles_per_task, tile_tasks, tasks;
} call;

typedef struct {
    call calls[MOST_MATRICES];
    int64_t count, tokens; /* tokens of this chunk */
} group;

static size_t element_size(int dtype) { return dtype == SAB_FLOAT32 ? 4 : 2; }

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static int64_t bytes_of(int64_t columns) { return (columns + 7) / 8; }

int64_t sab_cpu_layout_bytes(int64_t rows, int64_t columns) { return round_up(rows, SAB_TILE) * bytes_of(columns); }

static int64_t num_planes(const call *c) { return c->matrix->planes + (c->matrix->significant > 0); }

/* What is kept of a token's and plane's outliers, at most `most` of them, in memory from `start` on. */
typedef struct {
    int64_t *count;
    int32_t *list;
    float *values, *tables;
    int64_t end; /* bytes */
} outliers;

static outliers outliers_at(const call *c, char *start, int64_t most) {
    int64_t list = 64, values = list + round_up(most * (int64_t)sizeof(int32_t), 64);
    int64_t tables = values + round_up(8 * most * (int64_t)sizeof(float), 64);
    int64_t end = tables + round_up(2 * c->kernels->exact_entries * most * (int64_t)sizeof(float), 64);
    if (start == NULL) return (outliers){.end = end};
    return (outliers){(int64_t *)start, (int32_t *)(start + list), (float *)(start + values), (float *)(start + tables), end};
}

/* Plane `index` of the matrix, the residual plane after the full ones, and where a token's tables for it lie. */
static plane plane_at(const call *c, int64_t index) {
    const sab_matrix *matrix = c->matrix;
    int64_t table_bytes = c->exact ? (int64_t)sizeof(float) * 2 * c->kernels->exact_entries : 32;
    int64_t full_bytes = bytes_of(matrix->columns);
    int64_t full_size = round_up(table_bytes * full_bytes, 64);
    int64_t blocks = c->exact ? 0 : round_up(full_bytes, SAB_BLOCK) / SAB_BLOCK;
    int64_t scale_size = round_up(blocks * (int64_t)sizeof(float), 64);
    int64_t outlier_size = c->exact ? 0 : outliers_at(c, NULL, SAB_BLOCK_OUTLIERS * blocks).end;
    plane p = {.columns = index < matrix->planes ? matrix->columns : matrix->significant};
    p.column_bytes = bytes_of(p.columns);
    if (index < matrix->planes) {
        p.codes = matrix->codes + index * sab_cpu_layout_bytes(matrix->rows, matrix->columns);
        p.row_scale = matrix->row_scale + index * matrix->rows;
        p.col_scale = matrix->col_scale + index * matrix->columns;
    } else {
        p.codes = matrix->residual_codes;
        p.row_scale = matrix->residual_row_scale;
        p.col_scale = matrix->residual_col_scale;
    }
    /* The residual plane is never wider than a full one. */
    p.tables = c->sizes + round_up(full_bytes * (int64_t)sizeof(float), 64) + index * (full_size + scale_size + outlier_size);
    p.scales = p.tables + full_size;
    p.outliers = p.scales + scale_size;
    p.most_outliers = SAB_BLOCK_OUTLIERS * blocks;
    return p;
}

/* All tables of one token. */
static void make_tables(const call *c, int64_t token) {
    const sab_matrix *matrix = c->matrix;
    char *own = c->memory + token * c->token_bytes;
    float *inputs = (float *)own, *scaled = (float *)(own + c->scaled), *sizes = (float *)(own + c->sizes);
    const char *x = c->x + element_size(c->dtype) * (size_t)((c->first_token + token) * c->x_stride);
    c->kernels->to_float(x, c->dtype, matrix->columns, inputs);
    for (int64_t index = 0; index < num_planes(c); index++) {
        const plane p = c->planes[index];
        c->kernels->to_float(p.col_scale, SAB_FLOAT16, p.columns, scaled);
        if (index < matrix->planes)
            for (int64_t j = 0; j < p.columns; j++) scaled[j] *= inputs[j];
        else
            for (int64_t j = 0; j < p.columns; j++) scaled[j] *= inputs[c->significant[j]];
        for (int64_t j = p.columns; j < 8 * p.column_bytes; j++) scaled[j] = 0;
        if (c->exact) {
            c->kernels->exact_tables(scaled, p.column_bytes, (float *)(own + p.tables));
            continue;
        }
        outliers out = outliers_at(c, own + p.outliers, p.most_outliers);
        c->kernels->byte_sizes(scaled, p.column_bytes, sizes);
        *out.count = sab_take_outliers(scaled, sizes, p.column_bytes, out.list, out.values);
        c->kernels->exact_tables(out.values, *out.count, out.tables);
        c->kernels->lut_tables(scaled, sizes, p.column_bytes, (uint8_t *)(own + p.tables), (float *)(own + p.scales));
    }
}

/* sums[tokens][64] of one plane and tile; one token, or with look-up SAB_GROUP_TOKENS. */
static void sum_tile(const call *c, const plane *p, int64_t tile, int64_t token, int tokens, float *sums) {
    const uint8_t *codes = p->codes + tile * SAB_TILE * p->column_bytes;
    char *own = c->memory + token * c->token_bytes;
    if (!c->exact) {
        const uint8_t *tables = (const uint8_t *)(own + p->tables);
        const float *scales = (const float *)(own + p->scales);
        if (tokens == 1)
            c->kernels->lut_one(codes, p->column_bytes, tables, scales, sums);
        else
            c->kernels->lut_group(codes, p->column_bytes, tables, c->token_bytes, scales,
                                  c->token_bytes / (int64_t)sizeof(float), sums);
        for (int i = 0; i < tokens; i++, own += c->token_bytes) {
            outliers out = outliers_at(c, own + p->outliers, p->most_outliers);
            if (*out.count == 0) continue;
            float apart[SAB_TILE];
            c->kernels->exact_tile(codes, out.list, *out.count, out.tables, apart);
            for (int r = 0; r < SAB_TILE; r++) sums[SAB_TILE * i + r] += apart[r];
        }
        return;
    }
    for (int i = 0; i < tokens; i++, own += c->token_bytes)
        c->kernels->exact_tile(codes, NULL, p->column_bytes, (const float *)(own + p->tables), sums + SAB_TILE * i);
}

/* One tile of rows of the output, for the tokens from `first` to `last`. */
static void finish_tile(const call *c, int64_t tile, int64_t first, int64_t last) {
    const int64_t row = tile * SAB_TILE, left = c->matrix->rows - row, rows = left < SAB_TILE ? left : SAB_TILE;
    float total[TASK_TOKENS][SAB_TILE], sums[SAB_GROUP_TOKENS * SAB_TILE], row_scale[SAB_TILE] = {0};
    memset(total, 0, (size_t)(last - first) * sizeof total[0]);
    for (int64_t index = 0; index < num_planes(c); index++) {
        const plane *p = &c->planes[index];
        c->kernels->to_float(p->row_scale + row, SAB_FLOAT16, rows, row_scale);
        const int group = c->exact ? 1 : SAB_GROUP_TOKENS;
        for (int64_t token = first; token < last;) {
            int tokens = last - token >= group ? group : 1;
            sum_tile(c, p, tile, token, tokens, sums);
            for (int i = 0; i < tokens; i++, token++)
                for (int r = 0; r < SAB_TILE; r++) total[token - first][r] += row_scale[r] * sums[SAB_TILE * i + r];
        }
    }
    for (int64_t token = first; token < last; token++) {
        size_t place = (size_t)((c->first_token + token) * c->matrix->rows + row);
        c->kernels->from_float(total[token - first], c->dtype, rows, c->y + element_size(c->dtype) * place);
    }
}

/* A run of tiles for up to TASK_TOKENS tokens. */
static void finish_tiles(const call *c, int64_t index) {
    int64_t tiles = (c->matrix->rows + SAB_TILE - 1) / SAB_TILE;
    int64_t start = index % c->tile_tasks * c->tiles_per_task, stop = start + c->tiles_per_task;
    int64_t first = index / c->tile_tasks * TASK_TOKENS, last = first + TASK_TOKENS;
    for (int64_t tile = start; tile < stop && tile < tiles; tile++)
        finish_tile(c, tile, first, last < c->tokens ? last : c->tokens);
}

/* Task: the tables of one token for one of the matrices. */
static void tables_task(void *argument, int64_t index) {
    const group *g = argument;
    make_tables(&g->calls[index / g->tokens], index % g->tokens);
}

/* Task: some tiles of one of the matrices. */
static void tiles_task(void *argument, int64_t index) {
    const call *c = ((const group *)argument)->calls;
    for (; index >= c->tasks; c++) index -= c->tasks;
    finish_tiles(c, index);
}

static void run_chunk(group *g, int64_t first_token, int64_t tokens, int threads) {
    int64_t work = 0, table_work = 0, all_tiles = 0, tasks = 0;
    int64_t least = sab_has_team() ? TEAM_WEIGHTS : WORKER_WEIGHTS, runs = (tokens + TASK_TOKENS - 1) / TASK_TOKENS;
    for (const call *c = g->calls; c < g->calls + g->count; c++) {
        work += c->matrix->rows * c->matrix->columns * num_planes(c) * tokens;
        table_work += TABLE_WEIGHTS * c->matrix->columns * num_planes(c) * tokens;
        all_tiles += (c->matrix->rows + SAB_TILE - 1) / SAB_TILE;
    }
    int row_threads = work >= least ? threads : 1;
    int64_t per_task = all_tiles * runs / (row_threads * TASKS_PER_THREAD);
    for (call *c = g->calls; c < g->calls + g->count; c++) {
        int64_t tiles = (c->matrix->rows + SAB_TILE - 1) / SAB_TILE;
        c->first_token = first_token, c->tokens = tokens;
        c->tiles_per_task = per_task < 1 ? 1 : per_task > tiles ? tiles : per_task;
        c->tile_tasks = (tiles + c->tiles_per_task - 1) / c->tiles_per_task;
        tasks += c->tasks = c->tile_tasks * runs;
    }
    g->tokens = tokens;
    sab_parallel(tables_task, g, g->count * tokens, table_work >= least ? threads : 1);
    sab_parallel(tiles_task, g, tasks, row_threads);
}

static int64_t significant_bytes(const call *c) { return round_up(c->matrix->significant * (int64_t)sizeof(int32_t), 64); }

static int64_t planes_bytes(const call *c) { return round_up(num_planes(c) * (int64_t)sizeof(plane), 64); }

/* The products of `g`, whose calls have all but memory and tokens. Returns 0, or SAB_NO_MEMORY. */
static int run_group(group *g, int64_t tokens, int threads) {
    int64_t token_bytes = 0, kept_bytes = 0;
    for (call *c = g->calls; c < g->calls + g->count; c++) {
        c->exact = c->exact || !c->kernels->has_lut;
        c->scaled = round_up(8 * bytes_of(c->matrix->columns) * (int64_t)sizeof(float), 64);
        c->sizes = 2 * c->scaled;
        token_bytes += c->token_bytes = plane_at(c, num_planes(c)).tables; /* where one more plane would begin */
        kept_bytes += significant_bytes(c) + planes_bytes(c);
    }
    int64_t chunk = CHUNK_BYTES / (token_bytes + 1);
    chunk = chunk < TASK_TOKENS ? TASK_TOKENS : chunk > CHUNK_TOKENS ? CHUNK_TOKENS : chunk;
    if (chunk > tokens) chunk = tokens;
    char *memory = sab_scratch((size_t)(kept_bytes + chunk * token_bytes + 64));
    if (memory == NULL) return SAB_NO_MEMORY;
    for (call *c = g->calls; c < g->calls + g->count; c++) {
        c->significant = (int32_t *)memory;
        if (c->matrix->significant > 0) sab_list_significant(c->matrix, c->significant);
        c->planes = (plane *)(memory + significant_bytes(c));
        for (int64_t index = 0; index < num_planes(c); index++) c->planes[index] = plane_at(c, index);
        c->memory = memory + significant_bytes(c) + planes_bytes(c);
        memory = c->memory + chunk * c->token_bytes;
    }
    for (int64_t first = 0; first < tokens; first += chunk)
        run_chunk(g, first, tokens - first < chunk ? tokens - first : chunk, threads);
    return 0;
}

/* y[i] [tokens][rows of matrix i] = x [tokens][columns] times the transposed matrix i, for `count` matrices of as many
 * columns; sums in float32, rounded once. What is computed for a matrix does not depend on the others.
 *
 * x_stride is the distance of tokens in elements; the numbers of a token are adjacent. exact: 1 for float32 tables, 0 for
 * int8 ones where the instruction set has them. Returns 0, or one of `sab_failure`; nothing is computed then if the sizes of
 * a matrix are impossible. */
int sab_cpu_linears(const sab_matrix *matrices, int64_t count, const void *x, int64_t x_stride, int dtype, int64_t tokens,
                    void *const *y, int exact, int threads) {
    group g = {.count = 0};
    for (int64_t i = 0; i < count; i++)
        if (!sab_has_sizes(&matrices[i]) || matrices[i].columns != matrices[0].columns) return SAB_BAD_SIZES;
    for (int64_t i = 0; i < count && tokens > 0; i++) {
        if (matrices[i].rows > 0)
            g.calls[g.count++] = (call){.kernels = sab_active_kernels(), .matrix = &matrices[i], .x = x, .y = y[i],
                                        .x_stride = x_stride, .dtype = dtype, .exact = exact};
        if (g.count < MOST_MATRICES && i + 1 < count) continue;
        if (g.count > 0 && run_group(&g, tokens, threads) != 0) return SAB_NO_MEMORY;
        g.count = 0;
    }
    return 0;
}
