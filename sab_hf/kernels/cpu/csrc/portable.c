/* Kernels in plain C, for machines without special ones and as the reading version of the others. */
#include <math.h>
#include <string.h>

#include "half.h"
#include "portable.h"
#include "steps.h"

void sab_portable_to_float(const void *x, int dtype, int64_t count, float *out) {
    const uint16_t *short_x = x;
    if (dtype == SAB_FLOAT32)
        memcpy(out, x, (size_t)count * sizeof(float));
    else if (dtype == SAB_BFLOAT16)
        for (int64_t i = 0; i < count; i++) out[i] = sab_bfloat_to_float(short_x[i]);
    else
        for (int64_t i = 0; i < count; i++) out[i] = sab_half_to_float(short_x[i]);
}

void sab_portable_from_float(const float *x, int dtype, int64_t count, void *out) {
    uint16_t *short_out = out;
    if (dtype == SAB_FLOAT32)
        memcpy(out, x, (size_t)count * sizeof(float));
    else if (dtype == SAB_BFLOAT16)
        for (int64_t i = 0; i < count; i++) short_out[i] = sab_float_to_bfloat(x[i]);
    else
        for (int64_t i = 0; i < count; i++) short_out[i] = sab_float_to_half(x[i]);
}

/* The first 8 entries of the table of 4 columns; entry 8|q is minus entry q. */
static void half_table(const float *z, float *entries) {
    for (int q = 0; q < 8; q++)
        entries[q] = ((q & 1 ? z[0] : -z[0]) + (q & 2 ? z[1] : -z[1])) + ((q & 4 ? z[2] : -z[2]) - z[3]);
}

void sab_portable_exact_tables(const float *z, int64_t column_bytes, float *tables) {
    for (int64_t group = 0; group < 2 * column_bytes; group++, tables += 16) {
        half_table(z + 4 * group, tables);
        for (int q = 0; q < 8; q++) tables[8 + q] = -tables[q];
    }
}

void sab_portable_byte_sizes(const float *z, int64_t column_bytes, float *sizes) {
    for (int64_t byte = 0; byte < column_bytes; byte++, z += 8) {
        float low = (fabsf(z[0]) + fabsf(z[1])) + (fabsf(z[2]) + fabsf(z[3]));
        float high = (fabsf(z[4]) + fabsf(z[5])) + (fabsf(z[6]) + fabsf(z[7]));
        sizes[byte] = (low > high ? low : high) + ((low - low) + (high - high)); /* infinity - infinity is NaN */
    }
}

void sab_portable_exact_tile(const uint8_t *codes, const int32_t *list, int64_t column_bytes, const float *tables,
                             float *sums) {
    float by_position[SAB_TILE] = {0};
    for (int64_t byte = 0; byte < column_bytes; byte++, tables += 32) {
        const uint8_t *here = codes + SAB_TILE * (list == NULL ? byte : list[byte]);
        for (int i = 0; i < SAB_TILE; i++) by_position[i] += tables[here[i] & 15] + tables[16 + (here[i] >> 4)];
    }
    sab_to_row_order(by_position, sums);
}

void sab_portable_dense_row(const uint8_t *bits, int64_t columns, const float *c, float r, int add, float *out) {
    for (int64_t j = 0; j < columns; j++) {
        float value = c[j] * r;
        value = bits[j >> 3] >> (j & 7) & 1 ? value : -value;
        out[j] = add ? out[j] + value : value;
    }
}

const sab_kernels sab_kernels_portable = {
    .name = "portable",
    .exact_entries = 16,
    .to_float = sab_portable_to_float,
    .from_float = sab_portable_from_float,
    .exact_tables = sab_portable_exact_tables,
    .exact_tile = sab_portable_exact_tile,
    .dense_row = sab_portable_dense_row,
    .run_steps = sab_run_steps_portable,
    .levels = sab_levels_portable,
};
