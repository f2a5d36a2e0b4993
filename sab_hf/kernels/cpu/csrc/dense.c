/* The kernel layout from the canonical bits, and dense rows for products that are better left to a matrix library. */
#include <string.h>

#include "sab_cpu.h"

enum { TASK_ROWS = 16 };

typedef struct {
    const uint8_t *bits;
    uint8_t *codes;
    int64_t rows, column_bytes;
} layout_call;

/* Task: one tile. Codes as described in sab_cpu.h, for both nibbles of a byte at once; missing rows are 0. */
static void lay_out_tile(void *argument, int64_t tile) {
    const layout_call *c = argument;
    uint8_t *codes = c->codes + tile * SAB_TILE * c->column_bytes;
    for (int64_t r = 0; r < SAB_TILE; r++) {
        int64_t row = tile * SAB_TILE + r;
        uint8_t *column = codes + SAB_POSITION(r);
        const uint8_t *bits = row < c->rows ? c->bits + row * c->column_bytes : NULL;
        for (int64_t byte = 0; byte < c->column_bytes; byte++) {
            unsigned here = bits == NULL ? 0 : bits[byte];
            column[SAB_TILE * byte] = (uint8_t)(here ^ ((here & 0x88) >> 3) * 7);
        }
    }
}

void sab_cpu_layout(const uint8_t *bits, int64_t rows, int64_t columns, uint8_t *codes, int threads) {
    layout_call c = {bits, codes, rows, (columns + 7) / 8};
    sab_parallel(lay_out_tile, &c, (rows + SAB_TILE - 1) / SAB_TILE, threads);
}

int sab_has_sizes(const sab_matrix *matrix) {
    return matrix->rows >= 0 && matrix->columns >= 0 && matrix->columns <= INT32_MAX && matrix->planes >= 0 &&
           matrix->significant >= 0 && matrix->significant <= matrix->columns;
}

void sab_list_significant(const sab_matrix *matrix, int32_t *list) {
    int64_t count = 0;
    for (int64_t j = 0; j < matrix->columns && count < matrix->significant; j++)
        if (matrix->significant_columns[j >> 3] >> (j & 7) & 1) list[count++] = (int32_t)j;
    while (count < matrix->significant) list[count++] = 0; /* a mask of too few bits: no reads outside the input */
}

typedef struct {
    const sab_kernels *kernels;
    const sab_matrix *matrix;
    int64_t first_row, rows;
    float *out, *col_scale; /* col_scale: all planes, then the residual plane */
    int32_t *significant;
} dense_call;

static void dense_row(const dense_call *c, int64_t row, float *out) {
    const sab_matrix *matrix = c->matrix;
    const int64_t row_bytes = (matrix->columns + 7) / 8, residual_bytes = (matrix->significant + 7) / 8;
    float r;
    if (matrix->planes == 0) memset(out, 0, (size_t)matrix->columns * sizeof(float));
    for (int64_t k = 0; k < matrix->planes; k++) {
        c->kernels->to_float(matrix->row_scale + k * matrix->rows + row, SAB_FLOAT16, 1, &r);
        c->kernels->dense_row(matrix->signs + (k * matrix->rows + row) * row_bytes, matrix->columns,
                              c->col_scale + k * matrix->columns, r, k > 0, out);
    }
    if (matrix->significant == 0) return;
    const uint8_t *bits = matrix->residual_signs + row * residual_bytes;
    const float *scale = c->col_scale + matrix->planes * matrix->columns;
    c->kernels->to_float(matrix->residual_row_scale + row, SAB_FLOAT16, 1, &r);
    for (int64_t j = 0; j < matrix->significant; j++)
        out[c->significant[j]] += scale[j] * (bits[j >> 3] >> (j & 7) & 1 ? r : -r);
}

/* Task: TASK_ROWS rows. */
static void dense_rows(void *argument, int64_t index) {
    const dense_call *c = argument;
    for (int64_t row = index * TASK_ROWS; row < c->rows && row < (index + 1) * TASK_ROWS; row++)
        dense_row(c, c->first_row + row, c->out + row * c->matrix->columns);
}

/* out [rows][columns] float32: rows first_row to first_row + rows of the matrix. Returns 0, or one of
 * `sab_failure`. */
int sab_cpu_dense(const sab_matrix *matrix, int64_t first_row, int64_t rows, float *out, int threads) {
    if (!sab_has_sizes(matrix) || first_row < 0 || rows < 0 || rows > matrix->rows - first_row) return SAB_BAD_SIZES;
    const int64_t scales = matrix->planes * matrix->columns + matrix->significant;
    dense_call c = {sab_active_kernels(), matrix, first_row, rows, out, NULL, NULL};
    c.col_scale = sab_scratch((size_t)scales * sizeof(float) + (size_t)matrix->significant * sizeof(int32_t) + 64);
    if (c.col_scale == NULL) return SAB_NO_MEMORY;
    c.significant = (int32_t *)(c.col_scale + scales);
    c.kernels->to_float(matrix->col_scale, SAB_FLOAT16, matrix->planes * matrix->columns, c.col_scale);
    if (matrix->significant > 0) {
        c.kernels->to_float(matrix->residual_col_scale, SAB_FLOAT16, matrix->significant,
                            c.col_scale + matrix->planes * matrix->columns);
        sab_list_significant(matrix, c.significant);
    }
    sab_parallel(dense_rows, &c, (rows + TASK_ROWS - 1) / TASK_ROWS, threads);
    return 0;
}
