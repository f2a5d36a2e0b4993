/* Conversions of one number between binary32, binary16 and bfloat16, for any machine. */
#ifndef SAB_HALF_H
#define SAB_HALF_H

#include <stdint.h>
#include <string.h>

static inline float sab_bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t sab_float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float sab_half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return sab_bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13); /* infinity, NaN */
    /* Scaling by 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too. */
    return sab_bits_to_float(sign | sab_float_to_bits(sab_bits_to_float(rest << 13) * 0x1p112f));
}

static inline uint16_t sab_float_to_half(float value) {
    uint32_t bits = sab_float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds beyond 65504 */
    if (rest < 0x38800000)                                    /* subnormal: adding 1/2 puts its last bit in bit 0 */
        return (uint16_t)(sign | (sab_float_to_bits(sab_bits_to_float(rest) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13);
}

static inline float sab_bfloat_to_float(uint16_t value) { return sab_bits_to_float((uint32_t)value << 16); }

static inline uint16_t sab_float_to_bfloat(float value) {
    uint32_t bits = sab_float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#endif
