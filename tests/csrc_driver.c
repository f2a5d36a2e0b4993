/* Every kernel over sizes that divide by nothing, against products in double: for a run under the address and undefined behaviour
 * sanitizers, and for one under emulation. All memory is of the exact size, so that a read or write beyond it is seen. Prints
 * a sum, so that nothing is optimized away. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "sab_cpu.h"

/* y [rows] += the product of one plane with a token's inputs, bound [rows] += the error that look-up may make in it, and
 * rounding [rows] the one of float32. columns: which inputs are taken, ascending; NULL for all. */
static void add_plane(const uint8_t *signs, const uint16_t *row_scale, const uint16_t *col_scale, int64_t rows, int64_t count,
                      const int32_t *columns, const float *x, double *y, double *bound, double *rounding) {
    double *z = calloc((size_t)(count + 128), sizeof(double)), steps = 0, all = 0;
    for (int64_t j = 0; j < count; j++)
        z[j] = (double)x[columns == NULL ? j : columns[j]] * (double)sab_half_to_float(col_scale[j]), all += fabs(z[j]);
    for (int64_t start = 0; start < count; start += 8 * SAB_BLOCK) { /* half a step for each group of 4 columns */
        int64_t bytes = (count - start + 7) / 8;
        double largest = 0;
        for (int64_t j = start; j < start + 8 * SAB_BLOCK; j += 4)
            largest = fmax(largest, fabs(z[j]) + fabs(z[j + 1]) + fabs(z[j + 2]) + fabs(z[j + 3]));
        steps += largest / (2 * SAB_LUT_LIMIT) * 2 * (double)(bytes < SAB_BLOCK ? bytes : SAB_BLOCK);
    }
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *bits = signs + row * ((count + 7) / 8);
        double sum = 0, scale = (double)sab_half_to_float(row_scale[row]);
        for (int64_t j = 0; j < count; j++) sum += bits[j >> 3] >> (j & 7) & 1 ? z[j] : -z[j];
        y[row] += scale * sum, bound[row] += fabs(scale) * steps, rounding[row] += fabs(scale) * all * 1e-6;
    }
    free(z);
}

/* Stop unless what was found for each token is the product: to rounding, or within the bound of look-up. */
static void compare(const sab_matrix *matrix, const float *x, int64_t stride, int64_t tokens, const float *found, int exact) {
    const int64_t rows = matrix->rows, columns = matrix->columns, row_bytes = (columns + 7) / 8;
    int32_t *significant = malloc((size_t)(matrix->significant + 1) * sizeof(int32_t));
    double *expected = malloc(3 * (size_t)rows * sizeof(double) + 1), *bound = expected + rows, *rounding = bound + rows;
    for (int64_t j = 0, count = 0; matrix->significant && j < columns; j++)
        if (matrix->significant_columns[j >> 3] >> (j & 7) & 1) significant[count++] = (int32_t)j;
    for (int64_t token = 0; token < tokens; token++) {
        memset(expected, 0, 3 * (size_t)rows * sizeof(double));
        for (int64_t k = 0; k < matrix->planes; k++)
            add_plane(matrix->signs + k * rows * row_bytes, matrix->row_scale + k * rows, matrix->col_scale + k * columns, rows,
                      columns, NULL, x + token * stride, expected, bound, rounding);
        if (matrix->significant)
            add_plane(matrix->residual_signs, matrix->residual_row_scale, matrix->residual_col_scale, rows, matrix->significant,
                      significant, x + token * stride, expected, bound, rounding);
        for (int64_t row = 0; row < rows; row++) {
            const double error = fabs((double)found[token * rows + row] - expected[row]);
            const double allowed = rounding[row] + 1e-30 + (exact ? 0 : 1.001 * bound[row]);
            if (isfinite(expected[row]) ? error <= allowed : !isfinite(found[token * rows + row])) continue;
            fprintf(stderr, "%s, exact %d, %lld rows of %lld columns: row %lld of token %lld is %g, must be %g, error %g of %g\n",
                    sab_cpu_isa(), exact, (long long)rows, (long long)columns, (long long)row, (long long)token,
                    (double)found[token * rows + row], expected[row], error, allowed);
            exit(1);
        }
    }
    free(significant);
    free(expected);
}

static void *filled(size_t bytes) {
    unsigned char *memory = malloc(bytes ? bytes : 1);
    for (size_t i = 0; i < bytes; i++) memory[i] = (unsigned char)rand();
    return memory;
}

static uint16_t *scales(int64_t count) { /* binary16 numbers between 0.5 and 2, and some subnormal ones */
    uint16_t *memory = malloc(count ? 2 * (size_t)count : 1);
    for (int64_t i = 0; i < count; i++) memory[i] = (uint16_t)(i % 7 == 3 ? rand() & 0x83ff : 0x3800 + (rand() & 0x7ff));
    return memory;
}

static uint8_t *mask_of(int64_t columns, int64_t significant) {
    uint8_t *mask = calloc((size_t)(columns + 7) / 8, 1);
    for (int64_t j = 0; j < significant; j++) {
        int64_t column = columns - 1 - j; /* the last ones */
        mask[column >> 3] = (uint8_t)(mask[column >> 3] | 1 << (column & 7));
    }
    return mask;
}

/* Ten matrices of one input, more than share a parallel region: the given one, and its first rows, of which some have none.
 * All give `alone`, what the given one gives by itself. */
static void run_several(const sab_matrix *matrix, const char *x, int64_t stride, int dtype, int64_t tokens,
                        const unsigned char *alone, int exact, int threads) {
    enum { COUNT = 10 };
    const size_t size = dtype == SAB_FLOAT32 ? 4 : 2;
    sab_matrix matrices[COUNT];
    void *y[COUNT];
    for (int i = 0; i < COUNT; i++) {
        matrices[i] = *matrix;
        if (matrix->planes == 1 && i % 3 == 1) matrices[i].rows = i % 2 ? 0 : (matrix->rows + 1) / 2;
        y[i] = malloc(size * (size_t)(tokens * matrices[i].rows) + 1);
    }
    if (sab_cpu_linears(matrices, COUNT, x, stride, dtype, tokens, y, exact, threads) != 0) abort();
    for (int i = 0; i < COUNT; i++) {
        const size_t row_bytes = size * (size_t)matrices[i].rows;
        for (int64_t token = 0; token < tokens; token++) {
            const char *of_token = (char *)y[i] + row_bytes * (size_t)token;
            if (memcmp(of_token, alone + size * (size_t)(matrix->rows * token), row_bytes) != 0) abort();
        }
        free(y[i]);
    }
}

/* `special`: some inputs are infinite or no numbers. `marked`: the mask has as many bits as there are significant columns. */
static double run(const sab_matrix *matrix, int64_t tokens, int64_t stride, int dtype, int special, int marked) {
    const size_t size = dtype == SAB_FLOAT32 ? 4 : 2;
    double sum = 0;
    char *x = malloc(size * (size_t)(tokens ? (tokens - 1) * stride + matrix->columns : 0) + 1);
    for (int64_t i = 0; tokens && i < (tokens - 1) * stride + matrix->columns; i++) {
        float value = (float)(rand() % 2000 - 1000) / 300;
        uint16_t half = (uint16_t)(0x3000 + (rand() & 0x8fff));
        if (special && i % 11 == 4) value = i % 2 ? INFINITY : NAN, half = (uint16_t)(rand() | 0x7f80);
        memcpy(x + size * (size_t)i, dtype == SAB_FLOAT32 ? (void *)&value : (void *)&half, size);
    }
    for (int exact = 0; exact < 2; exact++)
        for (int threads = 1; threads < 4; threads += 2) {
            unsigned char *y = malloc(size * (size_t)(tokens * matrix->rows) + 1);
            void *into[] = {y};
            if (sab_cpu_linears(matrix, 1, x, stride, dtype, tokens, into, exact, threads) != 0) abort();
            for (size_t i = 0; i < size * (size_t)(tokens * matrix->rows); i++) sum += y[i];
            if (dtype == SAB_FLOAT32 && marked && threads == 1 && tokens <= 5)
                compare(matrix, (float *)x, stride, tokens, (float *)y, exact);
            run_several(matrix, x, stride, dtype, tokens, y, exact, threads);
            free(y);
        }
    free(x);
    return sum;
}

static double dense_sum(const sab_matrix *matrix, int64_t first, int64_t rows) {
    float *dense = malloc(sizeof(float) * (size_t)(rows * matrix->columns));
    double sum = 0;
    if (sab_cpu_dense(matrix, first, rows, dense, 3) != 0) abort();
    for (int64_t i = 0; i < rows * matrix->columns; i++) sum += dense[i];
    free(dense);
    return sum;
}

/* Sizes that cannot be are refused before anything is read or written: there is nothing to read or write. */
static void check_refusals(void) {
    const sab_matrix right = {.rows = 5, .columns = 20, .planes = 1, .significant = 3};
    sab_matrix wrong[8];
    for (int i = 0; i < 8; i++) wrong[i] = right;
    wrong[0].significant = 21, wrong[1].significant = 1 << 20, wrong[2].significant = -1, wrong[3].rows = -1;
    wrong[4].planes = -1, wrong[5].columns = -1, wrong[6].columns = (int64_t)1 << 40, wrong[7].significant = INT64_MAX;
    for (int i = 0; i < 8; i++) {
        const sab_matrix two[] = {right, wrong[i]};
        void *y[] = {NULL, NULL};
        for (int exact = 0; exact < 2; exact++)
            for (int first = 0; first < 2; first++)
                if (sab_cpu_linears(two + first, 2 - first, NULL, 20, SAB_FLOAT32, 4, y, exact, 2) != SAB_BAD_SIZES) abort();
        if (sab_cpu_dense(&wrong[i], 0, 1, NULL, 2) != SAB_BAD_SIZES) abort();
    }
    sab_matrix narrow = right;
    narrow.columns = 19;
    const sab_matrix unequal[] = {right, narrow};
    void *y[] = {NULL, NULL};
    if (sab_cpu_linears(unequal, 2, NULL, 20, SAB_FLOAT32, 4, y, 0, 2) != SAB_BAD_SIZES) abort();
    const int64_t rows[][2] = {{0, 6}, {5, 1}, {-1, 2}, {2, -1}, {INT64_MAX, 5}, {5, INT64_MAX}};
    for (int i = 0; i < 6; i++)
        if (sab_cpu_dense(&right, rows[i][0], rows[i][1], NULL, 2) != SAB_BAD_SIZES) abort();
}

static int64_t most_tokens; /* of one product */

static double check(int64_t rows, int64_t columns, int64_t planes, int64_t significant) {
    const int64_t bytes = (columns + 7) / 8, residual = (significant + 7) / 8;
    const int64_t plane_bytes = sab_cpu_layout_bytes(rows, columns);
    sab_matrix matrix = {rows, columns, planes, significant, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    uint8_t *codes = malloc((size_t)(planes * plane_bytes) + 1), *residual_codes = NULL;
    void *owned[] = {filled((size_t)(planes * rows * bytes)), scales(planes * rows), scales(planes * columns),
                     mask_of(columns, significant), filled((size_t)(rows * residual)), scales(rows), scales(significant)};
    matrix.signs = owned[0], matrix.row_scale = owned[1], matrix.col_scale = owned[2];
    if (significant) {
        residual_codes = malloc((size_t)sab_cpu_layout_bytes(rows, significant));
        matrix.significant_columns = owned[3], matrix.residual_signs = owned[4];
        matrix.residual_row_scale = owned[5], matrix.residual_col_scale = owned[6];
        sab_cpu_layout(matrix.residual_signs, rows, significant, residual_codes, 2);
    }
    for (int64_t k = 0; k < planes; k++)
        sab_cpu_layout(matrix.signs + k * rows * bytes, rows, columns, codes + k * plane_bytes, 2);
    matrix.codes = codes, matrix.residual_codes = residual_codes;
    double sum = 0;
    const int64_t tokens[] = {0, 1, 2, 5, 17, 67};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens && tokens[i] <= most_tokens; i++)
        for (int dtype = 0; dtype < 3; dtype++) sum += run(&matrix, tokens[i], columns + dtype, dtype, i == 3, 1);
    for (int mask = 0; significant && mask < 256; mask += 255) { /* no column is marked, or all */
        memset(owned[3], mask, (size_t)bytes);
        sum += run(&matrix, 2, columns, SAB_FLOAT32, 1, 0) + dense_sum(&matrix, 0, rows);
    }
    sum += dense_sum(&matrix, rows / 2, rows - rows / 2);
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(codes);
    free(residual_codes);
    return sum;
}

typedef struct {
    void (*function)(void *);
    void *argument;
} region;

static int regions;

static void *enter(void *argument) {
    region *mine = argument;
    mine->function(mine->argument);
    return NULL;
}

/* What an OpenMP runtime does, with threads that end with the region. */
static void start_team(void (*function)(void *), void *argument, unsigned threads, unsigned flags) {
    region mine = {function, argument};
    pthread_t others[8];
    if (threads < 2 || threads > 8 || flags != 0) abort();
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(&others[i], NULL, enter, &mine) != 0) abort();
    function(argument);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], NULL);
    regions++;
}

/* The only argument, if any, is the largest number of tokens, for runs under emulation. */
int main(int count, char **arguments) {
    most_tokens = count > 1 ? atoi(arguments[1]) : 67;
    const int64_t sizes[][4] = {{1, 1, 1, 0},   {1, 1, 1, 1},    {3, 7, 2, 7},      {63, 9, 1, 8},    {64, 128, 1, 0},
                                {65, 129, 3, 1}, {130, 255, 4, 9}, {257, 1000, 2, 300}, {700, 33, 1, 17}, {5, 2049, 1, 1}};
    const char *names[] = {"portable", "avx2", "avx512", "neon"};
    for (size_t run = 0; run < 2 * sizeof names / sizeof *names; run++) {
        if (sab_cpu_select(names[run / 2]) != 0) continue;
        sab_cpu_use_team(run % 2 ? start_team : NULL);
        const int before = regions;
        double sum = 0;
        check_refusals();
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            sum += check(sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3]);
        if ((regions > before) != (int)(run % 2)) abort();
        printf("%s %g\n", sab_cpu_isa(), sum);
    }
    return 0;
}
