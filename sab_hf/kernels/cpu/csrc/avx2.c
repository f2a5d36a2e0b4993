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

/* The sum of each group of 4 absolute values of 4 bytes: those of the low nibbles, then those of the high ones. */
static inline __m256 sums_of_four(const float *z) {
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 sums[4];
    for (int i = 0; i < 4; i++) sums[i] = _mm256_and_ps(_mm256_loadu_ps(z + 8 * i), absolute);
    return _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
}

void sab_avx2_byte_sizes(const float *z, int64_t column_bytes, float *sizes) {
    int64_t byte = 0;
    for (; byte + 4 <= column_bytes; byte += 4) {
        __m256 sums = sums_of_four(z + 8 * byte), wrong = _mm256_sub_ps(sums, sums); /* 0, or NaN after an infinity */
        __m128 size = _mm_max_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
        wrong = _mm256_add_ps(wrong, _mm256_permute2f128_ps(wrong, wrong, 1));
        _mm_storeu_ps(sizes + byte, _mm_add_ps(size, _mm256_castps256_ps128(wrong)));
    }
    sab_portable_byte_sizes(z + 8 * byte, column_bytes - byte, sizes + byte);
}

void sab_avx2_lut_tables(const float *z, const float *sizes, int64_t column_bytes, uint8_t *tables, float *scales) {
    const __m256i offset = _mm256_set1_epi8(SAB_LUT_OFFSET), order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        float sum, largest = sab_largest(sizes + start, bytes, &sum);
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

/* What a block adds to 16 sums: *low and *high += scale * (words - zero). */
static inline void add_scaled(__m256 *low, __m256 *high, __m256i words, __m256i zero, __m256 scale) {
    words = _mm256_sub_epi16(words, zero);
    __m256i low_words = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(words));
    __m256i high_words = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(words, 1));
    *low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low_words), scale, *low);
    *high = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high_words), scale, *high);
}

/* Two lookups fit a byte (at most 2 * 127); even and odd bytes are then summed apart in 16 bits: `all` holds both, modulo
 * 2^16, and `odd` the odd ones, so that even = all - 256 * odd. */
typedef struct {
    __m256i all, odd;
} words;

static inline void look_up(words *sum, __m256i codes, __m256i table0, __m256i table1) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low = _mm256_and_si256(codes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
    __m256i found = _mm256_add_epi8(_mm256_shuffle_epi8(table0, low), _mm256_shuffle_epi8(table1, high));
    sum->all = _mm256_add_epi16(sum->all, found);
    sum->odd = _mm256_add_epi16(sum->odd, _mm256_srli_epi16(found, 8));
}

static inline __m256i even_of(words sum) { return _mm256_sub_epi16(sum.all, _mm256_slli_epi16(sum.odd, 8)); }

static inline __m256i both_lanes(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

/* One block of the whole tile for one token, into sums of 8 rows each. */
static inline __attribute__((always_inline)) void one_block(const uint8_t *codes, int64_t bytes, const uint8_t *tables,
                                                            float scale, __m256 *sums) {
    words upper = {_mm256_setzero_si256(), _mm256_setzero_si256()}, lower = upper;
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < bytes; byte++) {
        const uint8_t *here = codes + SAB_TILE * byte;
        _mm_prefetch((const char *)here + 4096, _MM_HINT_T0);
        __m256i table0 = both_lanes(tables + 32 * byte), table1 = both_lanes(tables + 32 * byte + 16);
        look_up(&upper, _mm256_loadu_si256((const __m256i *)here), table0, table1);
        look_up(&lower, _mm256_loadu_si256((const __m256i *)(here + 32)), table0, table1);
    }
    const __m256i zero = _mm256_set1_epi16((short)(2 * SAB_LUT_OFFSET * bytes));
    const __m256 wide = _mm256_set1_ps(scale);
    add_scaled(&sums[0], &sums[1], even_of(upper), zero, wide);
    add_scaled(&sums[2], &sums[3], upper.odd, zero, wide);
    add_scaled(&sums[4], &sums[5], even_of(lower), zero, wide);
    add_scaled(&sums[6], &sums[7], lower.odd, zero, wide);
}

static void lut_one(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, const float *scales, float *sums) {
    __m256 total[8];
    for (int i = 0; i < 8; i++) total[i] = _mm256_setzero_ps();
    int64_t byte = 0;
    for (; byte + SAB_BLOCK <= column_bytes; byte += SAB_BLOCK)
        one_block(codes + SAB_TILE * byte, SAB_BLOCK, tables + 32 * byte, *scales++, total);
    if (byte < column_bytes)
        one_block(codes + SAB_TILE * byte, column_bytes - byte, tables + 32 * byte, *scales, total);
    for (int i = 0; i < 8; i++) _mm256_storeu_ps(sums + 8 * i, total[i]);
}

/* One half of the tile's rows at a time: the sums of both, for SAB_GROUP_TOKENS tokens, would not fit the registers. */
static void lut_group(const uint8_t *codes, int64_t column_bytes, const uint8_t *tables, int64_t table_stride,
                      const float *scales, int64_t scale_stride, float *sums) {
    memset(sums, 0, SAB_GROUP_TOKENS * SAB_TILE * sizeof(float));
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK, scales++) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        const __m256i zero = _mm256_set1_epi16((short)(2 * SAB_LUT_OFFSET * bytes));
        for (int half = 0; half < 2; half++) {
            words sum[SAB_GROUP_TOKENS];
            for (int token = 0; token < SAB_GROUP_TOKENS; token++) sum[token].all = sum[token].odd = _mm256_setzero_si256();
#pragma GCC unroll 2
            for (int64_t byte = start; byte < start + bytes; byte++) {
                const uint8_t *here = codes + SAB_TILE * byte + 32 * half;
                __m256i both = _mm256_loadu_si256((const __m256i *)here);
#pragma GCC unroll 4
                for (int token = 0; token < SAB_GROUP_TOKENS; token++) {
                    const uint8_t *table = tables + token * table_stride + 32 * byte;
                    look_up(&sum[token], both, both_lanes(table), both_lanes(table + 16));
                }
            }
            for (int token = 0; token < SAB_GROUP_TOKENS; token++) {
                float *into = sums + SAB_TILE * token + 32 * half;
                __m256 total[4];
                for (int i = 0; i < 4; i++) total[i] = _mm256_loadu_ps(into + 8 * i);
                const __m256 scale = _mm256_set1_ps(scales[token * scale_stride]);
                add_scaled(&total[0], &total[1], even_of(sum[token]), zero, scale);
                add_scaled(&total[2], &total[3], sum[token].odd, zero, scale);
                for (int i = 0; i < 4; i++) _mm256_storeu_ps(into + 8 * i, total[i]);
            }
        }
    }
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
    .run_steps = sab_run_steps_avx2,
    .levels = sab_levels_avx2,
};
