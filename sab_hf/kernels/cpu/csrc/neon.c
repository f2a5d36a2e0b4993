/* Kernels for NEON (AArch64): the int8 look-up. The exact one is portable.c's. */
#include <arm_neon.h>
#include <string.h>

#include "portable.h"
#include "steps.h"

/* sums[0..7] += scale * (words - zero) */
static inline void add_scaled(float *sums, uint16x8_t words, int16x8_t zero, float scale) {
    int16x8_t value = vsubq_s16(vreinterpretq_s16_u16(words), zero);
    float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(value))), high = vcvtq_f32_s32(vmovl_high_s16(value));
    vst1q_f32(sums, vfmaq_n_f32(vld1q_f32(sums), low, scale));
    vst1q_f32(sums + 4, vfmaq_n_f32(vld1q_f32(sums + 4), high, scale));
}

/* As in avx2.c: two lookups fit a byte, even and odd bytes are summed apart in 16 bits. 16 bytes are the rows r to r+7 and
 * r+16 to r+23 of the tile. */
static void lut_token(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, const float *scales, float *sums) {
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        uint16x8_t all[4], odd[4];
        for (int i = 0; i < 4; i++) all[i] = odd[i] = vdupq_n_u16(0);
        for (int64_t byte = start; byte < start + bytes; byte++) {
            uint8x16_t table0 = vld1q_u8(tables + 32 * byte), table1 = vld1q_u8(tables + 32 * byte + 16);
            for (int i = 0; i < 4; i++) {
                uint8x16_t code = vld1q_u8(codes + SAB_TILE * byte + 16 * i);
                uint8x16_t low = vqtbl1q_u8(table0, vandq_u8(code, vdupq_n_u8(15)));
                uint8x16_t high = vqtbl1q_u8(table1, vshrq_n_u8(code, 4));
                uint16x8_t found = vreinterpretq_u16_u8(vaddq_u8(low, high));
                all[i] = vaddq_u16(all[i], found);
                odd[i] = vsraq_n_u16(odd[i], found, 8);
            }
        }
        const int16x8_t zero = vdupq_n_s16((int16_t)(2 * SAB_LUT_OFFSET * bytes));
        for (int i = 0; i < 4; i++) {
            float *into = sums + 32 * (i / 2) + 8 * (i % 2);
            add_scaled(into, vsubq_u16(all[i], vshlq_n_u16(odd[i], 8)), zero, scales[start / SAB_BLOCK]);
            add_scaled(into + 16, odd[i], zero, scales[start / SAB_BLOCK]);
        }
    }
}

static void lut_tile(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, int64_t table_stride,
                     const float *scales, int64_t scale_stride, int tokens, float *sums) {
    memset(sums, 0, (size_t)tokens * SAB_TILE * sizeof(float));
    for (int token = 0; token < tokens; token++)
        lut_token(codes, column_bytes, tables + token * table_stride, scales + token * scale_stride,
                  sums + SAB_TILE * token);
}

const sab_kernels sab_kernels_neon = {
    .name = "neon",
    .exact_entries = 16,
    .group_tokens = 4,
    .has_lut = 1,
    .to_float = sab_portable_to_float,
    .from_float = sab_portable_from_float,
    .lut_tables = sab_portable_lut_tables,
    .exact_tables = sab_portable_exact_tables,
    .lut_tile = lut_tile,
    .exact_tile = sab_portable_exact_tile,
    .dense_row = sab_portable_dense_row,
    .run_steps = sab_run_steps_portable,
};
