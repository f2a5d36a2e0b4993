/* Pieces of the plain C kernels that kernels of other instruction sets use where special ones would gain nothing. */
#ifndef SAB_PORTABLE_H
#define SAB_PORTABLE_H

#include <math.h>

#include "sab_cpu.h"

SAB_HIDDEN void sab_portable_to_float(const void *x, int dtype, int64_t count, float *out);
SAB_HIDDEN void sab_portable_from_float(const float *x, int dtype, int64_t count, void *out);
SAB_HIDDEN void sab_portable_exact_tables(const float *z, int64_t column_bytes, float *tables);
SAB_HIDDEN void sab_portable_byte_sizes(const float *z, int64_t column_bytes, float *sizes);
SAB_HIDDEN void sab_portable_exact_tile(const uint8_t *codes, const int32_t *list, int64_t column_bytes,
                                        const float *tables, float *sums);
SAB_HIDDEN void sab_portable_dense_row(const uint8_t *bits, int64_t columns, const float *c, float r, int add, float *out);

static inline void sab_to_row_order(const float *by_position, float *sums) {
    for (int row = 0; row < SAB_TILE; row++) sums[row] = by_position[SAB_POSITION(row)];
}

/* The largest of the sizes of bytes, and their sum; both NaN where one of them is. Four at a time: a compiler may not reorder. */
static inline float sab_largest(const float *sizes, int64_t count, float *sum) {
    float sums[4] = {0}, largest[4] = {0};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int lane = 0; lane < 4; lane++) {
            sums[lane] += sizes[i + lane];
            largest[lane] = sizes[i + lane] > largest[lane] ? sizes[i + lane] : largest[lane];
        }
    for (; i < count; i++) {
        sums[0] += sizes[i];
        largest[0] = sizes[i] > largest[0] ? sizes[i] : largest[0];
    }
    float low = largest[0] > largest[1] ? largest[0] : largest[1], high = largest[2] > largest[3] ? largest[2] : largest[3];
    *sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return *sum != *sum ? NAN : low > high ? low : high;
}

/* Table entries are value * inverse, rounded; 0 where the block is zero or no number, so that nothing overflows. */
static inline float sab_lut_inverse(float largest) {
    return largest >= 1e-30f && largest <= 3e38f ? SAB_LUT_LIMIT / largest : 0;
}

/* What one step of an entry stands for; NaN where an input was infinite or NaN, so that the output says so. */
static inline float sab_lut_scale(float largest) {
    if (!(largest <= 3e38f)) return NAN;
    return largest >= 1e-30f ? largest / SAB_LUT_LIMIT : 0;
}

#endif
