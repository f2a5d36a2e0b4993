/* Inputs that stand out of their block would make its int8 steps too wide for all others: they are looked up in float32. */
#include <math.h>
#include <string.h>

#include "sab_cpu.h"

static const float STANDS_OUT = 6; /* times the mean of the block without its two largest bytes; Gaussian inputs reach 2 */

/* Largest sum of 4 absolute values of the 8 numbers of a byte. */
static float size_of_byte(const float *z) {
    float low = fabsf(z[0]) + fabsf(z[1]) + fabsf(z[2]) + fabsf(z[3]);
    float high = fabsf(z[4]) + fabsf(z[5]) + fabsf(z[6]) + fabsf(z[7]);
    return low > high ? low : high;
}

/* Take the column bytes that stand out, at most SAB_BLOCK_OUTLIERS a block, out of z [8 * column_bytes]: their inputs become 0
 * there and go to `values` [count][8], their places to `list`. Returns count. */
int64_t sab_take_outliers(float *z, int64_t column_bytes, int32_t *list, float *values) {
    int64_t count = 0;
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        float size[SAB_BLOCK], sum = 0, first = 0, second = 0;
        for (int64_t i = 0; i < bytes; i++) {
            size[i] = size_of_byte(z + 8 * (start + i));
            sum += size[i];
            const float less = size[i] < first ? size[i] : first; /* one instruction each, no jumps */
            second = less > second ? less : second;
            first = size[i] > first ? size[i] : first;
        }
        if (!(sum <= 3e38f)) continue; /* infinite or NaN: the block's scale will say so */
        float others = bytes > 2 ? fmaxf(sum - first - second, 0) / (float)(bytes - 2) : 0;
        if (!(first > STANDS_OUT * others)) continue;
        for (int64_t i = 0, taken = 0; i < bytes && taken < SAB_BLOCK_OUTLIERS; i++) {
            if (!(size[i] > STANDS_OUT * others)) continue;
            float *inputs = z + 8 * (start + i);
            memcpy(values + 8 * count, inputs, 8 * sizeof(float));
            memset(inputs, 0, 8 * sizeof(float));
            list[count++] = (int32_t)(start + i);
            taken++;
        }
    }
    return count;
}
