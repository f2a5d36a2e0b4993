/* Kernels for AVX2, FMA and F16C. */
#include <immintrin.h>
#include <string.h>

#include "avx2.h"
#include "half.h"
#include "portable.h"
#include "steps.h"

void sab_avx2_to_float(const void *x, int dtype, int64_t count, float *out) {
    const uint16_t *half = x;
    int64_t i = 0;
    if (dtype == SAB_FLOAT16)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
    if (dtype == SAB_BFLOAT16)
        for (; i + 8 <= count; i += 8) {
            __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(half + i)));
            _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
        }
    size_t size = dtype == SAB_FLOAT32 ? 4 : 2;
    sab_portable_to_float((const char *)x + size * (size_t)i, dtype, count - i, out + i);
}

/* Entries of the table of 4 columns for the codes 0 to 7, minus z[3] throughout. */
static inline __m256 half_table(const float *z) {
    const __m256 sign0 = _mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), sign1 = _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1);
    const __m256 sign2 = _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1);
    __m256 first = _mm256_fmadd_ps(sign0, _mm256_broadcast_ss(z), _mm256_mul_ps(sign1, _mm256_broadcast_ss(z + 1)));
    return _mm256_add_ps(first, _mm256_fmsub_ps(sign2, _mm256_broadcast_ss(z + 2), _mm256_broadcast_ss(z + 3)));
}

static void exact_tables(const float *z, int64_t column_bytes, float *tables) {
    for (int64_t group = 0; group < 2 * column_bytes; group++)
        _mm256_store_ps(tables + 8 * group, half_table(z + 4 * group));
}

/* Largest sum of 4 absolute values over the 8 numbers of each byte; NaN where one of them is NaN. */
static float largest_of_block(const float *z, int64_t bytes) {
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 largest = _mm256_setzero_ps(), seen = _mm256_setzero_ps();
    for (int64_t byte = 0; byte < bytes; byte++) {
        __m256 sums = _mm256_and_ps(_mm256_loadu_ps(z + 8 * byte), absolute);
        sums = _mm256_hadd_ps(sums, sums);
        sums = _mm256_hadd_ps(sums, sums);
        largest = _mm256_max_ps(largest, sums);
        seen = _mm256_add_ps(seen, _mm256_sub_ps(sums, sums)); /* 0, or NaN if there was an infinity or a NaN */
    }
    largest = _mm256_add_ps(largest, seen);
    float low = _mm256_cvtss_f32(largest), high = _mm_cvtss_f32(_mm256_extractf128_ps(largest, 1));
    return low != low || high != high ? NAN : low > high ? low : high;
}

void sab_avx2_lut_tables(const float *z, int64_t column_bytes, uint8_t *tables, float *scales) {
    const __m256i offset = _mm256_set1_epi8(SAB_LUT_OFFSET), order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        float largest = largest_of_block(z + 8 * start, bytes);
        __m256 inverse = _mm256_set1_ps(sab_lut_inverse(largest));
        *scales++ = sab_lut_scale(largest);
        for (int64_t byte = 0; byte < bytes; byte++, tables += 32) {
            const float *eight = z + 8 * (start + byte);
            __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(half_table(eight), inverse));
            __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(half_table(eight + 4), inverse));
            __m256i words = _mm256_packs_epi32(low, high); /* low 0..3, high 0..3, low 4..7, high 4..7 */
            __m256i both = _mm256_packs_epi16(words, _mm256_sub_epi16(_mm256_setzero_si256(), words));
            both = _mm256_permutevar8x32_epi32(both, order); /* low, minus low, high, minus high */
            _mm256_storeu_si256((__m256i *)tables, _mm256_add_epi8(both, offset));
        }
    }
}

/* sums[0..15] += scale * (words - zero), 16 signed words. */
static inline void add_scaled(float *sums, __m256i words, __m256i zero, __m256 scale) {
    words = _mm256_sub_epi16(words, zero);
    __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(words)));
    __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(words, 1)));
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(low, scale, _mm256_loadu_ps(sums)));
    _mm256_storeu_ps(sums + 8, _mm256_fmadd_ps(high, scale, _mm256_loadu_ps(sums + 8)));
}

/* Two lookups fit a byte (at most 2 * 127); even and odd bytes are then summed apart in 16 bits: `all` holds both, modulo
 * 2^16, and `odd` the odd ones, so that even = all - 256 * odd. One half of the tile's rows at a time: the sums of both would
 * not fit the registers. */
static inline __attribute__((always_inline)) void lut_tokens(const uint8_t *codes, int64_t column_bytes,
                                                             const uint8_t *tables, int64_t table_stride,
                                                             const float *scales, int64_t scale_stride, const int tokens,
                                                             float *sums) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        const __m256i zero = _mm256_set1_epi16((short)(2 * SAB_LUT_OFFSET * bytes));
        for (int half = 0; half < 2; half++) {
            __m256i all[SAB_GROUP_TOKENS], odd[SAB_GROUP_TOKENS];
            for (int token = 0; token < tokens; token++) all[token] = odd[token] = _mm256_setzero_si256();
            for (int64_t byte = start; byte < start + bytes; byte++) {
                const uint8_t *here = codes + SAB_TILE * byte + 32 * half;
                if (half == 0) _mm_prefetch((const char *)here + 4096, _MM_HINT_T0);
                __m256i both = _mm256_loadu_si256((const __m256i *)here);
                __m256i low = _mm256_and_si256(both, nibble);
                __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                for (int token = 0; token < tokens; token++) {
                    const __m128i *table = (const __m128i *)(tables + token * table_stride + 32 * byte);
                    __m256i table0 = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
                    __m256i table1 = _mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1));
                    __m256i found = _mm256_add_epi8(_mm256_shuffle_epi8(table0, low), _mm256_shuffle_epi8(table1, high));
                    all[token] = _mm256_add_epi16(all[token], found);
                    odd[token] = _mm256_add_epi16(odd[token], _mm256_srli_epi16(found, 8));
                }
            }
            for (int token = 0; token < tokens; token++) {
                __m256 scale = _mm256_set1_ps(scales[token * scale_stride + start / SAB_BLOCK]);
                float *into = sums + SAB_TILE * token + 32 * half;
                __m256i even = _mm256_sub_epi16(all[token], _mm256_slli_epi16(odd[token], 8));
                add_scaled(into, even, zero, scale);
                add_scaled(into + 16, odd[token], zero, scale);
            }
        }
    }
}

static void lut_tile(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, int64_t table_stride,
                     const float *scales, int64_t scale_stride, int tokens, float *sums) {
    memset(sums, 0, (size_t)tokens * SAB_TILE * sizeof(float));
    if (tokens == 1)
        lut_tokens(codes, column_bytes, tables, table_stride, scales, scale_stride, 1, sums);
    else
        lut_tokens(codes, column_bytes, tables, table_stride, scales, scale_stride, SAB_GROUP_TOKENS, sums);
}

/* A code's low 3 bits choose among 8 entries, its bit 3 is the sign of what was found. */
static void exact_tile(const uint8_t *codes, const int32_t *list, int64_t column_bytes, const float *tables, float *sums) {
    const __m256i sign = _mm256_set1_epi32((int)0x80000000);
    __m256 total[8];
    for (int i = 0; i < 8; i++) total[i] = _mm256_setzero_ps();
    for (int64_t byte = 0; byte < column_bytes; byte++, tables += 16) {
        const uint8_t *here = codes + SAB_TILE * (list == NULL ? byte : list[byte]);
        __m256 table0 = _mm256_load_ps(tables), table1 = _mm256_load_ps(tables + 8);
        _mm_prefetch((const char *)here + 4096, _MM_HINT_T0);
        for (int i = 0; i < 8; i++) {
            __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(here + 8 * i)));
            __m256 low = _mm256_permutevar8x32_ps(table0, code);
            __m256 high = _mm256_permutevar8x32_ps(table1, _mm256_srli_epi32(code, 4));
            __m256i low_sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), sign);
            __m256i high_sign = _mm256_and_si256(_mm256_slli_epi32(code, 24), sign);
            low = _mm256_xor_ps(low, _mm256_castsi256_ps(low_sign));
            high = _mm256_xor_ps(high, _mm256_castsi256_ps(high_sign));
            total[i] = _mm256_add_ps(total[i], _mm256_add_ps(low, high));
        }
    }
    float by_position[SAB_TILE];
    for (int i = 0; i < 8; i++) _mm256_storeu_ps(by_position + 8 * i, total[i]);
    sab_to_row_order(by_position, sums);
}

static void dense_row(const uint8_t *bits, int64_t columns, const float *c, float r, int add, float *out) {
    const __m256i places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    const __m256 sign = _mm256_set1_ps(-0.0f), minus_r = _mm256_set1_ps(-r);
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
        __m256 bit = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(bits[j >> 3]), places));
        __m256 value = _mm256_mul_ps(_mm256_loadu_ps(c + j), minus_r); /* a set bit turns -r into r */
        value = _mm256_xor_ps(value, _mm256_and_ps(bit, sign));
        _mm256_storeu_ps(out + j, add ? _mm256_add_ps(_mm256_loadu_ps(out + j), value) : value);
    }
    sab_portable_dense_row(bits + (j >> 3), columns - j, c + j, r, add, out + j);
}

const sab_kernels sab_kernels_avx2 = {
    .name = "avx2",
    .exact_entries = 8,
    .group_tokens = SAB_GROUP_TOKENS,
    .has_lut = 1,
    .to_float = sab_avx2_to_float,
    .from_float = sab_portable_from_float,
    .lut_tables = sab_avx2_lut_tables,
    .exact_tables = exact_tables,
    .lut_tile = lut_tile,
    .exact_tile = exact_tile,
    .dense_row = dense_row,
    .run_steps = sab_run_steps_avx2,
};
