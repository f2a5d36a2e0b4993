/* Kernels for NEON (AArch64): the int8 look-up and its tables. The exact one is portable.c's. */
#include <arm_neon.h>
#include <string.h>

#include "portable.h"
#include "steps.h"

static void to_float(const void *x, int dtype, int64_t count, float *out) {
    const uint16_t *half = x;
    int64_t i = 0;
    if (dtype == SAB_FLOAT16)
        for (; i + 4 <= count; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + i))));
    if (dtype == SAB_BFLOAT16)
        for (; i + 4 <= count; i += 4) vst1q_f32(out + i, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(half + i), 16)));
    size_t size = dtype == SAB_FLOAT32 ? 4 : 2;
    sab_portable_to_float((const char *)x + size * (size_t)i, dtype, count - i, out + i);
}

static void byte_sizes(const float *z, int64_t column_bytes, float *sizes) {
    int64_t byte = 0;
    for (; byte + 2 <= column_bytes; byte += 2, z += 16) {
        float32x4_t first = vpaddq_f32(vabsq_f32(vld1q_f32(z)), vabsq_f32(vld1q_f32(z + 4)));
        float32x4_t second = vpaddq_f32(vabsq_f32(vld1q_f32(z + 8)), vabsq_f32(vld1q_f32(z + 12)));
        float32x4_t sums = vpaddq_f32(first, second);        /* low and high nibble of either byte */
        sums = vaddq_f32(sums, vsubq_f32(sums, sums));       /* infinity - infinity is NaN */
        vst1_f32(sizes + byte, vget_low_f32(vpmaxq_f32(sums, sums))); /* NaN if one of both is */
    }
    sab_portable_byte_sizes(z, column_bytes - byte, sizes + byte);
}

/* The table of 4 columns: entries for the codes 0 to 7, then minus those. */
static inline uint8x16_t lut_table(const float *z, float inverse) {
    const float32x4_t sign0 = {-1, 1, -1, 1}, sign1 = {-1, -1, 1, 1};
    float32x4_t first = vfmaq_n_f32(vmulq_n_f32(sign0, z[0]), sign1, z[1]);
    float32x4_t low = vaddq_f32(first, vdupq_n_f32(-z[2] - z[3])), high = vaddq_f32(first, vdupq_n_f32(z[2] - z[3]));
    int16x4_t low_words = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(low, inverse))); /* NaN becomes 0 */
    int16x4_t high_words = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(high, inverse)));
    int8x8_t entries = vmovn_s16(vcombine_s16(low_words, high_words));
    return vreinterpretq_u8_s8(vaddq_s8(vcombine_s8(entries, vneg_s8(entries)), vdupq_n_s8(SAB_LUT_OFFSET)));
}

static void lut_tables(const float *z, const float *sizes, int64_t column_bytes, uint8_t *tables, float *scales) {
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        float sum, largest = sab_largest(sizes + start, bytes, &sum), inverse = sab_lut_inverse(largest);
        *scales++ = sab_lut_scale(largest);
        for (int64_t group = 0; group < 2 * bytes; group++, z += 4, tables += 16) vst1q_u8(tables, lut_table(z, inverse));
    }
}

/* sums[0..7] += scale * (words - zero) */
static inline void add_scaled(float *sums, uint16x8_t words, int16x8_t zero, float scale) {
    int16x8_t value = vsubq_s16(vreinterpretq_s16_u16(words), zero);
    float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(value))), high = vcvtq_f32_s32(vmovl_high_s16(value));
    vst1q_f32(sums, vfmaq_n_f32(vld1q_f32(sums), low, scale));
    vst1q_f32(sums + 4, vfmaq_n_f32(vld1q_f32(sums + 4), high, scale));
}

/* As in avx2.c: two lookups fit a byte, even and odd bytes are summed apart in 16 bits. 16 bytes are the rows r to r+7 and
 * r+16 to r+23 of the tile; `parts` of them at a time, as many as the registers hold for all tokens. */
static inline __attribute__((always_inline)) void lut_tokens(const uint8_t *codes, int64_t column_bytes,
                                                             const uint8_t *tables, int64_t table_stride,
                                                             const float *scales, int64_t scale_stride, const int tokens,
                                                             const int parts, float *sums) {
    memset(sums, 0, (size_t)tokens * SAB_TILE * sizeof(float));
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK, scales++) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        const int16x8_t zero = vdupq_n_s16((int16_t)(2 * SAB_LUT_OFFSET * bytes));
        for (int part = 0; part < 4; part += parts) {
            uint16x8_t all[SAB_GROUP_TOKENS][4], odd[SAB_GROUP_TOKENS][4];
            for (int token = 0; token < tokens; token++)
                for (int i = 0; i < parts; i++) all[token][i] = odd[token][i] = vdupq_n_u16(0);
            for (int64_t byte = start; byte < start + bytes; byte++) {
                uint8x16_t low[4], high[4];
                for (int i = 0; i < parts; i++) {
                    uint8x16_t code = vld1q_u8(codes + SAB_TILE * byte + 16 * (part + i));
                    low[i] = vandq_u8(code, vdupq_n_u8(15)), high[i] = vshrq_n_u8(code, 4);
                }
                for (int token = 0; token < tokens; token++) {
                    const uint8_t *table = tables + token * table_stride + 32 * byte;
                    uint8x16_t table0 = vld1q_u8(table), table1 = vld1q_u8(table + 16);
                    for (int i = 0; i < parts; i++) {
                        uint8x16_t sum = vaddq_u8(vqtbl1q_u8(table0, low[i]), vqtbl1q_u8(table1, high[i]));
                        uint16x8_t found = vreinterpretq_u16_u8(sum);
                        all[token][i] = vaddq_u16(all[token][i], found);
                        odd[token][i] = vsraq_n_u16(odd[token][i], found, 8);
                    }
                }
            }
            for (int token = 0; token < tokens; token++)
                for (int i = 0; i < parts; i++) {
                    float *into = sums + SAB_TILE * token + 32 * ((part + i) / 2) + 8 * ((part + i) % 2);
                    const float scale = scales[token * scale_stride];
                    add_scaled(into, vsubq_u16(all[token][i], vshlq_n_u16(odd[token][i], 8)), zero, scale);
                    add_scaled(into + 16, odd[token][i], zero, scale);
                }
        }
    }
}

static void lut_one(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, const float *scales, float *sums) {
    lut_tokens(codes, column_bytes, tables, 0, scales, 0, 1, 4, sums);
}

static void lut_group(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, int64_t table_stride,
                      const float *scales, int64_t scale_stride, float *sums) {
    lut_tokens(codes, column_bytes, tables, table_stride, scales, scale_stride, SAB_GROUP_TOKENS, 2, sums);
}

const sab_kernels sab_kernels_neon = {
    .name = "neon",
    .exact_entries = 16,
    .has_lut = 1,
    .to_float = to_float,
    .from_float = sab_portable_from_float,
    .byte_sizes = byte_sizes,
    .lut_tables = lut_tables,
    .exact_tables = sab_portable_exact_tables,
    .lut_one = lut_one,
    .lut_group = lut_group,
    .exact_tile = sab_portable_exact_tile,
    .dense_row = sab_portable_dense_row,
    .run_steps = sab_run_steps_portable,
    .levels = sab_levels_portable,
};
