/* Kernels for AVX-512 (F, BW, VL, DQ). A lookup finds 64 bytes, or 16 floats of a table that one register holds. VNNI and
 * VBMI are not used: a dot product of bytes takes 64 weights an instruction and a lookup 256, and the larger tables of
 * VBMI would need codes of 5 or more bits, another layout. */
#include <immintrin.h>

#include "avx2.h"
#include "portable.h"
#include "steps.h"

static void exact_tables(const float *z, int64_t column_bytes, float *tables) {
    const __mmask16 plus0 = 0x55aa, plus1 = 0x33cc, plus2 = 0x0ff0, plus3 = 0xff00; /* codes where column i counts + */
    const __m512 none = _mm512_setzero_ps();
    for (int64_t group = 0; group < 2 * column_bytes; group++, z += 4) {
        __m512 z0 = _mm512_set1_ps(z[0]), z1 = _mm512_set1_ps(z[1]), z2 = _mm512_set1_ps(z[2]), z3 = _mm512_set1_ps(z[3]);
        __m512 first = _mm512_add_ps(_mm512_mask_sub_ps(z0, (__mmask16)~plus0, none, z0),
                                     _mm512_mask_sub_ps(z1, (__mmask16)~plus1, none, z1));
        __m512 second = _mm512_add_ps(_mm512_mask_sub_ps(z2, (__mmask16)~plus2, none, z2),
                                      _mm512_mask_sub_ps(z3, (__mmask16)~plus3, none, z3));
        _mm512_store_ps(tables + 16 * group, _mm512_add_ps(first, second));
    }
}

static void exact_tile(const uint8_t *codes, const int32_t *list, int64_t column_bytes, const float *tables, float *sums) {
    __m512 total[4][2];
    for (int i = 0; i < 4; i++) total[i][0] = total[i][1] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < column_bytes; byte++, tables += 32) {
        const uint8_t *here = codes + SAB_TILE * (list == NULL ? byte : list[byte]);
        __m512 table0 = _mm512_load_ps(tables), table1 = _mm512_load_ps(tables + 16);
        _mm_prefetch((const char *)here + 4096, _MM_HINT_T0);
        for (int i = 0; i < 4; i++) { /* a permutation looks at the low 4 bits of its index only */
            __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(here + 16 * i)));
            total[i][0] = _mm512_add_ps(total[i][0], _mm512_permutexvar_ps(code, table0));
            total[i][1] = _mm512_add_ps(total[i][1], _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), table1));
        }
    }
    float by_position[SAB_TILE];
    for (int i = 0; i < 4; i++) _mm512_storeu_ps(by_position + 16 * i, _mm512_add_ps(total[i][0], total[i][1]));
    sab_to_row_order(by_position, sums);
}

/* low and high: 16 sums each += scale * (words - zero), 32 signed words. */
static inline void add_scaled(__m512 *low, __m512 *high, __m512i words, __m512i zero, __m512 scale) {
    words = _mm512_sub_epi16(words, zero);
    __m512i low_words = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(words));
    __m512i high_words = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1));
    *low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_words), scale, *low);
    *high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high_words), scale, *high);
}

/* As in avx2.c, with all 64 rows in one register. sums [tokens][4]: rows 0 to 15, 32 to 47, 16 to 31, 48 to 63. */
static inline __attribute__((always_inline)) void add_block(const uint8_t *codes, int64_t bytes, const uint8_t *tables,
                                                            int64_t table_stride, const float *scales,
                                                            int64_t scale_stride, const int tokens, __m512 (*sums)[4]) {
    const __m512i nibble = _mm512_set1_epi8(15), zero = _mm512_set1_epi16((short)(2 * SAB_LUT_OFFSET * bytes));
    __m512i all[SAB_GROUP_TOKENS], odd[SAB_GROUP_TOKENS];
    for (int token = 0; token < tokens; token++) all[token] = odd[token] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < bytes; byte++) {
        const uint8_t *here = codes + SAB_TILE * byte;
        _mm_prefetch((const char *)here + 4096, _MM_HINT_T0);
        __m512i code = _mm512_loadu_si512(here);
        __m512i low = _mm512_and_si512(code, nibble), high = _mm512_and_si512(_mm512_srli_epi16(code, 4), nibble);
#pragma GCC unroll 4
        for (int token = 0; token < tokens; token++) {
            const __m128i *table = (const __m128i *)(tables + token * table_stride + 32 * byte);
            __m512i found = _mm512_add_epi8(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table)), low),
                                            _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table + 1)), high));
            all[token] = _mm512_add_epi16(all[token], found);
            odd[token] = _mm512_add_epi16(odd[token], _mm512_srli_epi16(found, 8));
        }
    }
    for (int token = 0; token < tokens; token++) {
        __m512 scale = _mm512_set1_ps(scales[token * scale_stride]);
        __m512i even = _mm512_sub_epi16(all[token], _mm512_slli_epi16(odd[token], 8));
        add_scaled(&sums[token][0], &sums[token][1], even, zero, scale);
        add_scaled(&sums[token][2], &sums[token][3], odd[token], zero, scale);
    }
}

static inline __attribute__((always_inline)) void lut_tokens(const uint8_t *codes, int64_t column_bytes,
                                                             const uint8_t *tables, int64_t table_stride,
                                                             const float *scales, int64_t scale_stride,
                                                             const int tokens, float *sums) {
    __m512 total[SAB_GROUP_TOKENS][4];
    for (int token = 0; token < tokens; token++)
        for (int i = 0; i < 4; i++) total[token][i] = _mm512_setzero_ps();
    int64_t byte = 0;
    for (; byte + SAB_BLOCK <= column_bytes; byte += SAB_BLOCK)
        add_block(codes + SAB_TILE * byte, SAB_BLOCK, tables + 32 * byte, table_stride, scales++, scale_stride, tokens, total);
    if (byte < column_bytes)
        add_block(codes + SAB_TILE * byte, column_bytes - byte, tables + 32 * byte, table_stride, scales, scale_stride, tokens,
                  total);
    for (int token = 0; token < tokens; token++, sums += SAB_TILE) {
        _mm512_storeu_ps(sums, total[token][0]);
        _mm512_storeu_ps(sums + 16, total[token][2]);
        _mm512_storeu_ps(sums + 32, total[token][1]);
        _mm512_storeu_ps(sums + 48, total[token][3]);
    }
}

static void lut_one(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, const float *scales, float *sums) {
    lut_tokens(codes, column_bytes, tables, 0, scales, 0, 1, sums);
}

static void lut_group(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, int64_t table_stride,
                      const float *scales, int64_t scale_stride, float *sums) {
    lut_tokens(codes, column_bytes, tables, table_stride, scales, scale_stride, SAB_GROUP_TOKENS, sums);
}

static void dense_row(const uint8_t *bits, int64_t columns, const float *c, float r, int add, float *out) {
    const __m512 scale = _mm512_set1_ps(r), minus = _mm512_set1_ps(-r);
    int64_t j = 0;
    for (; j + 16 <= columns; j += 16) {
        __mmask16 plus = (__mmask16)(bits[j >> 3] | bits[(j >> 3) + 1] << 8);
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(c + j), _mm512_mask_blend_ps(plus, minus, scale));
        _mm512_storeu_ps(out + j, add ? _mm512_add_ps(_mm512_loadu_ps(out + j), value) : value);
    }
    sab_portable_dense_row(bits + (j >> 3), columns - j, c + j, r, add, out + j);
}

const sab_kernels sab_kernels_avx512 = {
    .name = "avx512",
    .exact_entries = 16,
    .has_lut = 1,
    .to_float = sab_avx2_to_float,
    .from_float = sab_portable_from_float,
    .byte_sizes = sab_avx2_byte_sizes,
    .lut_tables = sab_avx2_lut_tables,
    .exact_tables = exact_tables,
    .lut_one = lut_one,
    .lut_group = lut_group,
    .exact_tile = exact_tile,
    .dense_row = dense_row,
    .run_steps = sab_run_steps_avx512,
    .levels = sab_levels_avx512,
};
