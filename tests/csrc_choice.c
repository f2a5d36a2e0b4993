/* The choice between two instruction sets by measuring, with kernels whose order is known. Includes select.c for its static
 * functions; the instruction sets themselves are not linked. */
#define SAB_HAVE_AVX2
#define SAB_HAVE_AVX512
#define SAB_SOURCES none
#include <stdio.h>
#include <stdlib.h>

#include "select.c"

const sab_kernels sab_kernels_portable, sab_kernels_avx2, sab_kernels_avx512;

static volatile int work;

static void one_fast(const uint8_t *codes, int64_t bytes, const uint8_t *tables, const float *scales, float *sums) {
    if (bytes <= 0 || !codes || !tables || !scales) abort();
    memset(sums, 0, SAB_TILE * sizeof(float));
}

static void one_slow(const uint8_t *codes, int64_t bytes, const uint8_t *tables, const float *scales, float *sums) {
    one_fast(codes, bytes, tables, scales, sums);
    for (int i = 0; i < 2000; i++) work++;
}

static void group_fast(const uint8_t *codes, int64_t bytes, const uint8_t *tables, int64_t table_stride, const float *scales,
                       int64_t scale_stride, float *sums) {
    if (table_stride != 32 * bytes || scale_stride <= 0) abort();
    for (int token = 0; token < SAB_GROUP_TOKENS; token++) one_fast(codes, bytes, tables, scales, sums + SAB_TILE * token);
}

static void group_slow(const uint8_t *codes, int64_t bytes, const uint8_t *tables, int64_t table_stride, const float *scales,
                       int64_t scale_stride, float *sums) {
    group_fast(codes, bytes, tables, table_stride, scales, scale_stride, sums);
    for (int i = 0; i < 2000; i++) work++;
}

int main(void) {
    for (int slow = 0; slow < 4; slow++) { /* bit 0: one token is slow with the wide kernels, bit 1: a group is */
        const sab_kernels wide = {.name = "wide", .exact_entries = 16, .lut_one = slow & 1 ? one_slow : one_fast,
                                  .lut_group = slow & 2 ? group_slow : group_fast};
        const sab_kernels narrow = {.name = "narrow", .exact_entries = 8, .lut_one = slow & 1 ? one_fast : one_slow,
                                    .lut_group = slow & 2 ? group_fast : group_slow};
        const sab_kernels chosen = faster_of(&wide, &narrow);
        if (chosen.lut_one != one_fast || chosen.lut_group != group_fast) return 1;
        if (chosen.exact_entries != 16 || strcmp(chosen.name, "wide") != 0) return 2; /* all else is of the wide ones */
    }
    return 0;
}
