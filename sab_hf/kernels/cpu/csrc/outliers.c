/* Inputs that stand out of their block would make its int8 steps too wide for all others: they are looked up in float32. */
#include <string.h>

#include "portable.h"

static const float STANDS_OUT = 6; /* times the mean of the block without its two largest bytes; Gaussian inputs reach 2 */

/* Take the column bytes that stand out, at most SAB_BLOCK_OUTLIERS a block, out of z [8 * column_bytes]: their inputs and their
 * sizes [column_bytes] become 0, the inputs go to `values` [count][8] and their places to `list`. Returns count. */
int64_t sab_take_outliers(float *z, float *sizes, int64_t column_bytes, int32_t *list, float *values) {
    int64_t count = 0;
    for (int64_t start = 0; start < column_bytes; start += SAB_BLOCK) {
        int64_t bytes = column_bytes - start < SAB_BLOCK ? column_bytes - start : SAB_BLOCK;
        float *size = sizes + start, sum, second = 0;
        const float first = sab_largest(size, bytes, &sum), few = bytes > 2 ? STANDS_OUT / (float)(bytes - 2) : 0;
        if (!(sum <= 3e38f)) continue; /* infinite or NaN: the block's scale will say so */
        if (!(first > few * (sum - 2 * first))) continue; /* nor would it with the second largest instead */
        for (int64_t i = 0, seen = 0; i < bytes; i++) {
            if (size[i] == first && !seen++) continue;
            second = size[i] > second ? size[i] : second;
        }
        const float least = few * fmaxf(sum - first - second, 0); /* what does not stand out */
        if (!(first > least)) continue;
        for (int64_t i = 0, taken = 0; i < bytes && taken < SAB_BLOCK_OUTLIERS; i++) {
            if (!(size[i] > least)) continue;
            float *inputs = z + 8 * (start + i);
            memcpy(values + 8 * count, inputs, 8 * sizeof(float));
            memset(inputs, 0, 8 * sizeof(float));
            size[i] = 0;
            list[count++] = (int32_t)(start + i);
            taken++;
        }
    }
    return count;
}
