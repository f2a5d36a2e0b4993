/* CPU kernels for `sab::linear`: shared declarations. Plain C11; no Python and no PyTorch.
 *
 * A matrix of `rows` x `columns` is a sum of sign planes. One plane contributes r * (B (c * x)) to the output, with B of
 * +1 and -1, r a scale for each row and c a scale for each column. The canonical bits are specified in packing.py.
 *
 * Kernel layout ("codes") of one plane: uint8 [tiles][column_bytes][64], tiles = ceil(rows/64), column_bytes =
 * ceil(columns/8). A byte holds the signs of one row in 8 adjacent columns as two 4-bit codes, the first 4 columns in the
 * low nibble. A code is a table index: with sign bits s0..s3 (1 is +1), code = s0 s1 s2 in bits 0..2 if s3 is 0, and
 * 8 | ~(s0 s1 s2) if s3 is 1. So entry 8|q of any table is minus entry q, and 8 entries are enough where lookups are wide.
 * The 64 rows of a tile lie in the order of SAB_POSITION: even bytes of each half are its first 16 rows, odd bytes the
 * next 16, because the look-up kernel adds up even and odd bytes apart.
 */
#ifndef SAB_CPU_H
#define SAB_CPU_H

#include <stddef.h>
#include <stdint.h>

#define SAB_CPU_ABI 6         /* must equal sab_hf.kernels.library.ABI; raise both when anything below changes */
#define SAB_TILE 64           /* rows of one tile of the kernel layout */
#define SAB_BLOCK 16          /* column bytes (128 columns) that share one scale of the int8 tables */
#define SAB_LUT_LIMIT 63      /* table entries are integers in [-63, 63], stored plus SAB_LUT_OFFSET */
#define SAB_LUT_OFFSET 64
#define SAB_BLOCK_OUTLIERS 2  /* column bytes of a block that may be looked up in float32 instead */
#define SAB_GROUP_TOKENS 4    /* tokens that one call of lut_group takes */

/* Where row `row` of a tile lies among its 64 bytes. */
#define SAB_POSITION(row) (((row) & 32) | (((row) & 15) << 1) | (((row) >> 4) & 1))

#define SAB_HIDDEN __attribute__((visibility("hidden")))
#define SAB_EXPORT __attribute__((visibility("default")))

/* What the kernels return: 0, or why they computed nothing. */
enum sab_failure { SAB_NO_MEMORY = 1, SAB_BAD_SIZES = 2 };

enum sab_dtype { SAB_FLOAT32 = 0, SAB_BFLOAT16 = 1, SAB_FLOAT16 = 2 };

/* A packed matrix: pointers into the canonical tensors, and the kernel layout of its planes. */
typedef struct {
    int64_t rows, columns, planes, significant;
    const uint8_t *signs;               /* [planes][rows][ceil(columns/8)] */
    const uint16_t *row_scale;          /* [planes][rows] binary16 */
    const uint16_t *col_scale;          /* [planes][columns] binary16 */
    const uint8_t *significant_columns; /* [ceil(columns/8)], or NULL if significant is 0; likewise below */
    const uint8_t *residual_signs;      /* [rows][ceil(significant/8)] */
    const uint16_t *residual_row_scale; /* [rows] */
    const uint16_t *residual_col_scale; /* [significant] */
    const uint8_t *codes;               /* [planes] kernel layouts; NULL for sab_cpu_dense */
    const uint8_t *residual_codes;
} sab_matrix;

/* A matrix of trainable signs, float32: its planes' scales as training found them and now, [planes][rows] and [planes][columns].
 * Either `weight` gets the level nearest to each latent; or, where that is NULL, the gradient at the weight is handed on: a step
 * of Adam for the latents, gradients at the scales, and 0 in its place. */
typedef struct {
    int64_t rows, columns, planes;
    const float *row_start, *column_start, *row_scale, *column_scale;
    float *latent, *weight, *gradient, *first, *second, *row_gradient, *column_gradient;
    float rate, correction1, correction2, beta1, beta2, epsilon;
} sab_levels;

struct sab_step; /* steps.h */

/* What an instruction set provides. Tables of one plane and token: `tables` of int8 look-up, uint8 [column_bytes][2][16]
 * with `scales` float [ceil(column_bytes/16)]; of exact look-up, float [column_bytes][2][exact_entries]. */
typedef struct sab_kernels {
    const char *name;
    int exact_entries;
    int has_lut;      /* 0: the exact kernel does both */
    void (*to_float)(const void *x, int dtype, int64_t count, float *out);
    void (*from_float)(const float *x, int dtype, int64_t count, void *out);
    /* sizes [column_bytes]: of each byte of z [8 * column_bytes] the larger sum of 4 absolute values, NaN unless all are finite */
    void (*byte_sizes)(const float *z, int64_t column_bytes, float *sizes);
    /* z: zero beyond the columns; sizes: of its bytes */
    void (*lut_tables)(const float *z, const float *sizes, int64_t column_bytes, uint8_t *tables, float *scales);
    void (*exact_tables)(const float *z, int64_t column_bytes, float *tables);
    /* sums [64], one for each row of the tile, of one token; and [SAB_GROUP_TOKENS][64], table_stride and scale_stride between
     * tokens, in elements. All instruction sets give the same bits. */
    void (*lut_one)(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, const float *scales, float *sums);
    void (*lut_group)(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, int64_t table_stride,
                      const float *scales, int64_t scale_stride, float *sums);
    /* of all column bytes, or of the `column_bytes` ones listed; tables are those of the bytes taken, one after the other */
    void (*exact_tile)(const uint8_t *codes, const int32_t *list, int64_t column_bytes, const float *tables, float *sums);
    /* out[j] (+)= bit j ? c[j] * r : -c[j] * r */
    void (*dense_row)(const uint8_t *bits, int64_t columns, const float *c, float r, int add, float *out);
    int (*run_steps)(const struct sab_kernels *kernels, const struct sab_step *steps, int64_t count, int threads);
    int (*levels)(const sab_levels *levels, int threads);
} sab_kernels;

SAB_HIDDEN extern const sab_kernels sab_kernels_portable, sab_kernels_avx2, sab_kernels_avx512, sab_kernels_neon;
SAB_HIDDEN const sab_kernels *sab_active_kernels(void);

/* What is compiled once for each instruction set has its name at the end: SAB_ISA. */
#define SAB_JOINED_(name, isa) name##_##isa
#define SAB_JOINED(name, isa) SAB_JOINED_(name, isa)
#define SAB_NAMED(name) SAB_JOINED(name, SAB_ISA)
#define SAB_FOR_EACH(isa)                                                                                                 \
    SAB_HIDDEN int sab_run_steps_##isa(const sab_kernels *kernels, const struct sab_step *steps, int64_t count, int threads); \
    SAB_HIDDEN int sab_levels_##isa(const sab_levels *levels, int threads)
SAB_FOR_EACH(portable);
SAB_FOR_EACH(avx2);
SAB_FOR_EACH(avx512);

/* Whether the sizes are possible: scratch memory is laid out by them. */
SAB_HIDDEN int sab_has_sizes(const sab_matrix *matrix);
/* The column of each significant column, ascending: list [significant]. Each is one of the matrix, whatever the mask marks. */
SAB_HIDDEN void sab_list_significant(const sab_matrix *matrix, int32_t *list);
SAB_HIDDEN int64_t sab_take_outliers(float *z, float *sizes, int64_t column_bytes, int32_t *list, float *values);
SAB_HIDDEN int sab_has_team(void);
/* Calls task(argument, i) for every i below count, on the caller and at most threads - 1 others. */
SAB_HIDDEN void sab_parallel(void (*task)(void *argument, int64_t i), void *argument, int64_t count, int threads);
/* Calls function(argument) on the caller, while the other threads of a team watch for what it hands to sab_parallel. */
SAB_HIDDEN void sab_with_crew(void (*function)(void *argument), void *argument, int threads);
/* Memory of at least `bytes`, 64-byte aligned, owned by the calling thread until its next call; NULL if there is none. */
SAB_HIDDEN void *sab_scratch(size_t bytes);

SAB_EXPORT int sab_cpu_abi(void);
SAB_EXPORT const char *sab_cpu_sources(void);
SAB_EXPORT const char *sab_cpu_isa(void);
SAB_EXPORT int sab_cpu_select(const char *name);
SAB_EXPORT void sab_cpu_use_team(void (*start)(void (*function)(void *), void *argument, unsigned threads, unsigned flags));
SAB_EXPORT int64_t sab_cpu_layout_bytes(int64_t rows, int64_t columns);
SAB_EXPORT void sab_cpu_layout(const uint8_t *bits, int64_t rows, int64_t columns, uint8_t *codes, int threads);
SAB_EXPORT int sab_cpu_linears(const sab_matrix *matrices, int64_t count, const void *x, int64_t x_stride, int dtype,
                               int64_t tokens, void *const *y, int exact, int threads);
SAB_EXPORT int sab_cpu_levels(const sab_levels *levels, int threads);
SAB_EXPORT int sab_cpu_dense(const sab_matrix *matrix, int64_t first_row, int64_t rows, float *out, int threads);

#endif
