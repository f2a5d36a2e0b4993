/* Pieces of the AVX2 kernels that AVX-512 uses as they are. */
#ifndef SAB_AVX2_H
#define SAB_AVX2_H

#include "sab_cpu.h"

SAB_HIDDEN void sab_avx2_to_float(const void *x, int dtype, int64_t count, float *out);
SAB_HIDDEN void sab_avx2_byte_sizes(const float *z, int64_t column_bytes, float *sizes);
SAB_HIDDEN void sab_avx2_lut_tables(const float *z, const float *sizes, int64_t column_bytes, uint8_t *tables,
                                    float *scales);

#endif
