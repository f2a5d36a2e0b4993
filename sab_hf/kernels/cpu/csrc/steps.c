/* The steps of a recorded token (steps.h): everything of a model's pass beside its packed products, one after the other.
 *
 * Compiled once for every instruction set. Arithmetic is float32 whatever the
 * tensors hold, rounded where a step stores its result, as PyTorch's operations do.
 */
#include <math.h>
#include <string.h>

#include "half.h"
#include "steps.h"

enum {
    CHUNK = 512,               /* numbers that are computed at a time */
    ROWS_PER_TASK = 64,        /* of a dense matrix that a thread takes */
    THREADED_PRODUCT = 64 << 10, /* multiplications from which threads share a dense product */
    THREADED_ATTENTION = 16 << 10,
};

typedef float eight __attribute__((vector_size(32)));

#if defined(__clang__)
#define SAB_PICK(a, b, order, i) ((order)[i] < 8 ? (a)[(order)[i] & 7] : (b)[(order)[i] & 7])
#define SAB_SHUFFLE(a, b, order)                                                                                    \
    ((eight){SAB_PICK(a, b, order, 0), SAB_PICK(a, b, order, 1), SAB_PICK(a, b, order, 2), SAB_PICK(a, b, order, 3), \
             SAB_PICK(a, b, order, 4), SAB_PICK(a, b, order, 5), SAB_PICK(a, b, order, 6), SAB_PICK(a, b, order, 7)})
#else
#define SAB_SHUFFLE(a, b, order) __builtin_shuffle(a, b, order)
#endif

static size_t size_of(int dtype) { return dtype == SAB_INT64 ? 8 : dtype == SAB_BOOL ? 1 : dtype == SAB_FLOAT32 || dtype == SAB_INT32 ? 4 : 2; }

static eight load8(const float *x) {
    eight value;
    memcpy(&value, x, sizeof value);
    return value;
}

static float sum8(eight v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static float dot(const float *a, const float *b, int64_t count) {
    eight first = {0}, second = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        first += load8(a + i) * load8(b + i);
        second += load8(a + i + 8) * load8(b + i + 8);
    }
    float total = sum8(first + second);
    for (; i < count; i++) total += a[i] * b[i];
    return total;
}

/* Numbers of a row, `stride` elements apart, as float; the row itself where it is that already. */
static const float *floats(const sab_kernels *kernels, const char *data, int dtype, int64_t stride, int64_t count, float *into) {
    if (dtype <= SAB_FLOAT16 && stride == 1) {
        if (dtype == SAB_FLOAT32) return (const float *)data;
        kernels->to_float(data, dtype, count, into);
        return into;
    }
    if (stride == 0 && count > 1) {
        float value;
        memcpy(&value, floats(kernels, data, dtype, 1, 1, &value), sizeof value);
        for (int64_t i = 0; i < count; i++) into[i] = value;
        return into;
    }
    switch (dtype) {
        case SAB_FLOAT32: for (int64_t i = 0; i < count; i++) into[i] = ((const float *)data)[i * stride]; break;
        case SAB_BFLOAT16: for (int64_t i = 0; i < count; i++) into[i] = sab_bfloat_to_float(((const uint16_t *)data)[i * stride]); break;
        case SAB_FLOAT16: for (int64_t i = 0; i < count; i++) into[i] = sab_half_to_float(((const uint16_t *)data)[i * stride]); break;
        case SAB_INT64: for (int64_t i = 0; i < count; i++) into[i] = (float)((const int64_t *)data)[i * stride]; break;
        case SAB_INT32: for (int64_t i = 0; i < count; i++) into[i] = (float)((const int32_t *)data)[i * stride]; break;
        default: for (int64_t i = 0; i < count; i++) into[i] = data[i * stride] != 0;
    }
    return into;
}

static void store_floats(const sab_kernels *kernels, const float *values, int dtype, int64_t stride, int64_t count, char *data) {
    if (dtype <= SAB_FLOAT16 && stride == 1) {
        if ((const char *)values != data) kernels->from_float(values, dtype, count, data);
        return;
    }
    switch (dtype) {
        case SAB_FLOAT32: for (int64_t i = 0; i < count; i++) ((float *)data)[i * stride] = values[i]; break;
        case SAB_BFLOAT16: for (int64_t i = 0; i < count; i++) ((uint16_t *)data)[i * stride] = sab_float_to_bfloat(values[i]); break;
        case SAB_FLOAT16: for (int64_t i = 0; i < count; i++) ((uint16_t *)data)[i * stride] = sab_float_to_half(values[i]); break;
        case SAB_INT64: for (int64_t i = 0; i < count; i++) ((int64_t *)data)[i * stride] = (int64_t)values[i]; break;
        case SAB_INT32: for (int64_t i = 0; i < count; i++) ((int32_t *)data)[i * stride] = (int32_t)values[i]; break;
        default: for (int64_t i = 0; i < count; i++) data[i * stride] = values[i] != 0;
    }
}

static const int64_t *integers(const char *data, int dtype, int64_t stride, int64_t count, int64_t *into) {
    if (dtype == SAB_INT64 && stride == 1) return (const int64_t *)data;
    for (int64_t i = 0; i < count; i++)
        into[i] = dtype == SAB_INT64   ? ((const int64_t *)data)[i * stride]
                  : dtype == SAB_INT32 ? ((const int32_t *)data)[i * stride]
                                       : data[i * stride] != 0;
    return into;
}

static void store_integers(const int64_t *values, int dtype, int64_t stride, int64_t count, char *data) {
    for (int64_t i = 0; i < count; i++) {
        if (dtype == SAB_INT64)
            ((int64_t *)data)[i * stride] = values[i];
        else if (dtype == SAB_INT32)
            ((int32_t *)data)[i * stride] = (int32_t)values[i];
        else
            data[i * stride] = values[i] != 0;
    }
}

typedef int32_t eight_words __attribute__((vector_size(32)));

static inline eight same8(float x) { return (eight){x, x, x, x, x, x, x, x}; }

/* `yes` where the mask is set, else `no`. */
static inline eight choose(eight_words mask, eight yes, eight no) {
    return (eight)(((eight_words)yes & mask) | ((eight_words)no & ~mask));
}

/* e^x to two units in the last place; 0 below the smallest normal number, infinity beyond the largest. */
static inline eight exponential8(eight x) {
    const eight low = same8(-87.33f), high = same8(88.72f), magic = same8(12582912.0f); /* 1.5 * 2^23: adding it rounds */
    eight inside = choose(x > high, high, choose(x < low, low, x));
    eight shifted = inside * same8(1.44269504f) + magic;
    eight power = shifted - magic;
    eight_words whole = (eight_words)shifted - (eight_words)magic, half = whole >> 1;
    eight rest = (inside - power * same8(0.693359375f)) + power * same8(2.12194440e-4f);
    eight sum = same8(1.9875691500e-4f);
    sum = sum * rest + same8(1.3981999507e-3f);
    sum = sum * rest + same8(8.3334519073e-3f);
    sum = sum * rest + same8(4.1665795894e-2f);
    sum = sum * rest + same8(1.6666665459e-1f);
    sum = sum * rest + same8(5.0000001201e-1f);
    sum = sum * rest * rest + rest + same8(1.0f);
    /* in two factors: 2^128 is no number */
    eight result = sum * (eight)((half + 127) << 23) * (eight)((whole - half + 127) << 23);
    return choose(x < low, same8(0), choose(x > high, same8(INFINITY), result));
}

/* out[i] = e^(factor * (x[i] - shift)). */
static void exponentials(const float *x, float factor, float shift, int64_t count, float *out) {
    int64_t i = 0;
    eight values;
    for (; i + 8 <= count; i += 8) {
        values = exponential8((load8(x + i) - same8(shift)) * same8(factor));
        memcpy(out + i, &values, sizeof values);
    }
    if (i == count) return;
    float last[8] = {0};
    memcpy(last, x + i, (size_t)(count - i) * sizeof(float));
    values = exponential8((load8(last) - same8(shift)) * same8(factor));
    memcpy(out + i, &values, (size_t)(count - i) * sizeof(float));
}

static float largest_of(const float *x, int64_t count) {
    eight most = same8(-INFINITY);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) most = choose(load8(x + i) > most, load8(x + i), most);
    float largest = -INFINITY;
    for (int k = 0; k < 8; k++) largest = most[k] > largest ? most[k] : largest;
    for (; i < count; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

static float sum_of(const float *x, int64_t count) {
    eight sums = same8(0);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) sums += load8(x + i);
    float total = sum8(sums);
    for (; i < count; i++) total += x[i];
    return total;
}

/* tanh of x, given e^(2 |x|): near 0 the difference of two nearly equal numbers has lost its digits. */
static inline float hyperbolic_tangent(float x, float power) {
    float square = x * x, large = copysignf(1.0f - 2.0f / (power + 1.0f), x);
    float small = x * (1.0f + square * (-0.33333333f + square * (0.13333333f + square * (-0.053968254f + square * 0.021869489f))));
    return fabsf(x) < 0.3f ? small : large;
}

#define EACH(expression)                                     \
    for (int64_t i = 0; i < count; i++) out[i] = expression; \
    break

static inline float inner_of_gelu(float x) { return 0.79788456f * (x + 0.044715f * x * x * x); }

static void map_floats(int function, const float *a, const float *b, const float *c, int64_t count, float *out) {
    float powers[CHUNK];
    switch (function) { /* those that need powers of e: all at once, which is vector code */
        case SAB_EXP: exponentials(a, 1, 0, count, out); return;
        case SAB_SIGMOID:
        case SAB_SILU: exponentials(a, -1, 0, count, powers); break;
        case SAB_TANH:
            for (int64_t i = 0; i < count; i++) powers[i] = fabsf(a[i]);
            exponentials(powers, 2, 0, count, powers);
            break;
        case SAB_GELU_TANH:
            for (int64_t i = 0; i < count; i++) powers[i] = fabsf(inner_of_gelu(a[i]));
            exponentials(powers, 2, 0, count, powers);
            break;
        default: break;
    }
    switch (function) {
        case SAB_COPY: EACH(a[i]);
        case SAB_NEG: EACH(-a[i]);
        case SAB_ABS: EACH(fabsf(a[i]));
        case SAB_LOG: EACH(logf(a[i]));
        case SAB_SQRT: EACH(sqrtf(a[i]));
        case SAB_RSQRT: EACH(1.0f / sqrtf(a[i]));
        case SAB_SIN: EACH(sinf(a[i]));
        case SAB_COS: EACH(cosf(a[i]));
        case SAB_TANH: EACH(hyperbolic_tangent(a[i], powers[i]));
        case SAB_SIGMOID: EACH(1.0f / (1.0f + powers[i]));
        case SAB_SILU: EACH(a[i] / (1.0f + powers[i]));
        case SAB_GELU: EACH(0.5f * a[i] * (1.0f + erff(a[i] * 0.70710678f)));
        case SAB_GELU_TANH: EACH(0.5f * a[i] * (1.0f + hyperbolic_tangent(inner_of_gelu(a[i]), powers[i])));
        case SAB_RELU: EACH(a[i] < 0 ? 0 : a[i]);
        case SAB_RECIPROCAL: EACH(1.0f / a[i]);
        case SAB_SQUARE: EACH(a[i] * a[i]);
        case SAB_ADD: EACH(a[i] + b[i]);
        case SAB_SUB: EACH(a[i] - b[i]);
        case SAB_MUL: EACH(a[i] * b[i]);
        case SAB_DIV: EACH(a[i] / b[i]);
        case SAB_POW: EACH(powf(a[i], b[i]));
        case SAB_MAX: EACH(a[i] > b[i] || a[i] != a[i] ? a[i] : b[i]);
        case SAB_MIN: EACH(a[i] < b[i] || a[i] != a[i] ? a[i] : b[i]);
        case SAB_EQ: EACH(a[i] == b[i]);
        case SAB_NE: EACH(a[i] != b[i]);
        case SAB_LT: EACH(a[i] < b[i]);
        case SAB_LE: EACH(a[i] <= b[i]);
        case SAB_GT: EACH(a[i] > b[i]);
        case SAB_GE: EACH(a[i] >= b[i]);
        case SAB_WHERE: EACH(a[i] != 0 ? b[i] : c[i]);
        default: break;
    }
}

static void map_integers(int function, const int64_t *a, const int64_t *b, const int64_t *c, int64_t count, int64_t *out) {
    switch (function) {
        case SAB_COPY: EACH(a[i]);
        case SAB_NEG: EACH(-a[i]);
        case SAB_NOT: EACH(!a[i]);
        case SAB_ADD: EACH(a[i] + b[i]);
        case SAB_SUB: EACH(a[i] - b[i]);
        case SAB_MUL: EACH(a[i] * b[i]);
        case SAB_MAX: EACH(a[i] > b[i] ? a[i] : b[i]);
        case SAB_MIN: EACH(a[i] < b[i] ? a[i] : b[i]);
        case SAB_AND: EACH(a[i] & b[i]);
        case SAB_OR: EACH(a[i] | b[i]);
        case SAB_EQ: EACH(a[i] == b[i]);
        case SAB_NE: EACH(a[i] != b[i]);
        case SAB_LT: EACH(a[i] < b[i]);
        case SAB_LE: EACH(a[i] <= b[i]);
        case SAB_GT: EACH(a[i] > b[i]);
        case SAB_GE: EACH(a[i] >= b[i]);
        case SAB_WHERE: EACH(a[i] ? b[i] : c[i]);
        case SAB_IOTA: EACH(a[i] + i * b[i]);
        default: break;
    }
}

/* Where the operand's numbers of one row of the innermost dimension begin. */
static char *row_of(const sab_operand *operand, const int64_t place[SAB_STEP_DIMS]) {
    int64_t offset = 0;
    for (int d = 0; d < SAB_STEP_DIMS - 1; d++) offset += place[d] * operand->stride[d];
    return operand->data + offset * (int64_t)size_of(operand->dtype);
}

/* Calls `row` for every row of the innermost dimension. */
static int for_rows(const sab_kernels *kernels, const sab_step *step, int (*row)(const sab_kernels *, const sab_step *, char *const *)) {
    int64_t place[SAB_STEP_DIMS] = {0};
    for (place[0] = 0; place[0] < step->size[0]; place[0]++)
        for (place[1] = 0; place[1] < step->size[1]; place[1]++)
            for (place[2] = 0; place[2] < step->size[2]; place[2]++) {
                char *rows[SAB_STEP_OPERANDS];
                for (int o = 0; o < SAB_STEP_OPERANDS; o++)
                    rows[o] = step->operand[o].data == NULL ? NULL : row_of(&step->operand[o], place);
                int failed = row(kernels, step, rows);
                if (failed) return failed;
            }
    return 0;
}

static int map_row(const sab_kernels *kernels, const sab_step *step, char *const *rows) {
    const sab_operand *o = step->operand;
    const int64_t size = step->size[SAB_STEP_DIMS - 1];
    const int last = SAB_STEP_DIMS - 1, whole = step->integers;
    union { float floats[CHUNK]; int64_t whole[CHUNK]; } buffer[SAB_STEP_OPERANDS];
    for (int64_t start = 0; start < size; start += CHUNK) {
        int64_t count = size - start < CHUNK ? size - start : CHUNK;
        const void *in[SAB_STEP_OPERANDS] = {NULL};
        for (int i = 1; i < SAB_STEP_OPERANDS; i++) {
            if (i > step->inputs) break;
            if (rows[i] == NULL && whole) {
                for (int64_t k = 0; k < count; k++) buffer[i].whole[k] = (int64_t)step->number[i - 1];
                in[i] = buffer[i].whole;
            } else if (rows[i] == NULL) {
                for (int64_t k = 0; k < count; k++) buffer[i].floats[k] = (float)step->number[i - 1];
                in[i] = buffer[i].floats;
            } else {
                const char *data = rows[i] + start * o[i].stride[last] * (int64_t)size_of(o[i].dtype);
                in[i] = whole ? (const void *)integers(data, o[i].dtype, o[i].stride[last], count, buffer[i].whole)
                              : (const void *)floats(kernels, data, o[i].dtype, o[i].stride[last], count, buffer[i].floats);
            }
        }
        char *into = rows[0] + start * o[0].stride[last] * (int64_t)size_of(o[0].dtype);
        if (whole) {
            map_integers(step->function, in[1], in[2], in[3], count, buffer[0].whole);
            store_integers(buffer[0].whole, o[0].dtype, o[0].stride[last], count, into);
        } else {
            const int direct = o[0].dtype == SAB_FLOAT32 && o[0].stride[last] == 1;
            float *values = direct ? (float *)into : buffer[0].floats;
            map_floats(step->function, in[1], in[2], in[3], count, values);
            store_floats(kernels, values, o[0].dtype, o[0].stride[last], count, into);
        }
    }
    return 0;
}

/* One number from each row. */
static int reduce_row(const sab_kernels *kernels, const sab_step *step, char *const *rows) {
    const sab_operand *x = &step->operand[1];
    const int64_t size = step->size[SAB_STEP_DIMS - 1], stride = x->stride[SAB_STEP_DIMS - 1];
    if (step->integers) {
        int64_t total = step->function == SAB_ALL, buffer[CHUNK];
        for (int64_t start = 0; start < size; start += CHUNK) {
            int64_t count = size - start < CHUNK ? size - start : CHUNK;
            const int64_t *in = integers(rows[1] + start * stride * (int64_t)size_of(x->dtype), x->dtype, stride, count, buffer);
            if (start == 0 && (step->function == SAB_MAX || step->function == SAB_MIN)) total = in[0];
            for (int64_t i = 0; i < count; i++) switch (step->function) {
                    case SAB_SUM: total += in[i]; break;
                    case SAB_MAX: total = in[i] > total ? in[i] : total; break;
                    case SAB_MIN: total = in[i] < total ? in[i] : total; break;
                    case SAB_ALL: total = total && in[i]; break;
                    default: total = total || in[i];
                }
        }
        store_integers(&total, step->operand[0].dtype, 1, 1, rows[0]);
        return 0;
    }
    float buffer[CHUNK], total = 0;
    for (int64_t start = 0; start < size; start += CHUNK) {
        int64_t count = size - start < CHUNK ? size - start : CHUNK;
        const float *in = floats(kernels, rows[1] + start * stride * (int64_t)size_of(x->dtype), x->dtype, stride, count, buffer);
        if (step->function == SAB_MAX || step->function == SAB_MIN) {
            if (start == 0) total = in[0];
            for (int64_t i = 0; i < count; i++) {
                int better = step->function == SAB_MAX ? in[i] > total : in[i] < total;
                total = better || in[i] != in[i] ? in[i] : total;
            }
            continue;
        }
        total += sum_of(in, count);
    }
    if (step->function == SAB_MEAN) total /= (float)size;
    store_floats(kernels, &total, step->operand[0].dtype, 1, 1, rows[0]);
    return 0;
}

static void softmax(float *x, int64_t count) {
    float largest = largest_of(x, count);
    if (largest == -INFINITY) largest = 0; /* all masked: PyTorch's attention gives 0, its softmax NaN */
    exponentials(x, 1, largest, count, x);
    float total = sum_of(x, count), inverse = total > 0 ? 1.0f / total : total; /* NaN stays */
    for (int64_t i = 0; i < count; i++) x[i] *= inverse;
}

/* Softmax, layer norm or RMS norm of a row, whose numbers are adjacent. */
static int normalize_row(const sab_kernels *kernels, const sab_step *step, char *const *rows) {
    const sab_operand *o = step->operand;
    const int64_t size = step->size[SAB_STEP_DIMS - 1];
    float *values = sab_scratch(2 * (size_t)size * sizeof(float));
    if (values == NULL) return SAB_NO_MEMORY;
    float *other = values + size;
    memcpy(values, floats(kernels, rows[1], o[1].dtype, 1, size, other), (size_t)size * sizeof(float));
    if (step->function == SAB_SOFTMAX) {
        const int masked = largest_of(values, size) == -INFINITY;
        softmax(values, size);
        if (masked)
            for (int64_t i = 0; i < size; i++) values[i] = NAN;
    } else {
        float mean = 0, square = 0;
        if (step->function == SAB_LAYER_NORM) {
            for (int64_t i = 0; i < size; i++) mean += values[i];
            mean /= (float)size;
            for (int64_t i = 0; i < size; i++) values[i] -= mean;
        }
        square = dot(values, values, size) / (float)size;
        const float inverse = 1.0f / sqrtf(square + (float)step->number[0]);
        for (int64_t i = 0; i < size; i++) values[i] *= inverse;
        if (rows[2] != NULL) {
            const float *weight = floats(kernels, rows[2], o[2].dtype, 1, size, other);
            for (int64_t i = 0; i < size; i++) values[i] *= weight[i];
        }
        if (rows[3] != NULL) {
            const float *bias = floats(kernels, rows[3], o[3].dtype, 1, size, other);
            for (int64_t i = 0; i < size; i++) values[i] += bias[i];
        }
    }
    store_floats(kernels, values, o[0].dtype, 1, size, rows[0]);
    return 0;
}

/* out[r] = table[ids[r]], rows of adjacent numbers: size[2] of size[3]. */
static int gather(const sab_step *step) {
    const sab_operand *o = step->operand;
    const size_t element = size_of(o[0].dtype);
    for (int64_t r = 0; r < step->size[2]; r++) {
        int64_t id;
        id = *integers(o[2].data + r * o[2].stride[2] * (int64_t)size_of(o[2].dtype), o[2].dtype, 1, 1, &id);
        if (id < 0 || id >= step->count) return SAB_DIFFERS; /* PyTorch has the words for it */
        memcpy(o[0].data + (size_t)(r * o[0].stride[2]) * element, o[1].data + (size_t)(id * o[1].stride[2]) * element,
               (size_t)step->size[3] * element);
    }
    return 0;
}

typedef struct {
    const sab_kernels *kernels;
    const sab_step *step;
    int64_t per_task;
    int failed;
} shared_step;

/* Task: some columns j of out[b, i, j] = sum over k of a[b, i, k] b[b, j, k], plus bias[j]: sizes b, i, j, k. */
static void multiply_columns(void *argument, int64_t task) {
    shared_step *shared = argument;
    const sab_step *step = shared->step;
    const sab_operand *o = step->operand;
    const int64_t columns = step->size[2], depth = step->size[3];
    const int64_t first = task * shared->per_task, last = first + shared->per_task < columns ? first + shared->per_task : columns;
    const int along_depth = o[2].stride[3] == 1 || depth == 1;
    float *left = sab_scratch((2 * (size_t)depth + (size_t)(last - first) + CHUNK) * sizeof(float));
    if (left == NULL) {
        shared->failed = SAB_NO_MEMORY;
        return;
    }
    float *right = left + depth, *sums = right + depth + CHUNK;
    for (int64_t b = 0; b < step->size[0]; b++)
        for (int64_t i = 0; i < step->size[1]; i++) {
            const char *row = o[1].data + (b * o[1].stride[0] + i * o[1].stride[1]) * (int64_t)size_of(o[1].dtype);
            const float *a = floats(shared->kernels, row, o[1].dtype, o[1].stride[3], depth, left);
            const size_t element = size_of(o[2].dtype);
            const char *matrix = o[2].data + b * o[2].stride[0] * (int64_t)element;
            if (along_depth) {
                for (int64_t j = first; j < last; j++)
                    sums[j - first] = dot(a, floats(shared->kernels, matrix + j * o[2].stride[2] * (int64_t)element, o[2].dtype, 1, depth, right), depth);
            } else {
                memset(sums, 0, (size_t)(last - first) * sizeof(float));
                for (int64_t k = 0; k < depth; k++)
                    for (int64_t j = first; j < last; j += CHUNK) {
                        int64_t count = last - j < CHUNK ? last - j : CHUNK;
                        const char *data = matrix + (k * o[2].stride[3] + j * o[2].stride[2]) * (int64_t)element;
                        const float *values = floats(shared->kernels, data, o[2].dtype, o[2].stride[2], count, right);
                        for (int64_t l = 0; l < count; l++) sums[j - first + l] += a[k] * values[l];
                    }
            }
            if (o[3].data != NULL)
                for (int64_t j = first; j < last; j++) {
                    float bias;
                    const char *data = o[3].data + j * o[3].stride[2] * (int64_t)size_of(o[3].dtype);
                    sums[j - first] += *floats(shared->kernels, data, o[3].dtype, 1, 1, &bias);
                }
            char *out = o[0].data + (b * o[0].stride[0] + i * o[0].stride[1] + first * o[0].stride[2]) * (int64_t)size_of(o[0].dtype);
            store_floats(shared->kernels, sums, o[0].dtype, o[0].stride[2], last - first, out);
        }
}

static int multiply(const sab_kernels *kernels, const sab_step *step, int threads) {
    int64_t work = step->size[0] * step->size[1] * step->size[2] * step->size[3];
    shared_step shared = {kernels, step, work < THREADED_PRODUCT ? step->size[2] : ROWS_PER_TASK, 0};
    if (shared.per_task < 1) return 0;
    sab_parallel(multiply_columns, &shared, (step->size[2] + shared.per_task - 1) / shared.per_task, threads);
    return shared.failed;
}

/* The sums of eight vectors: of pairs of neighbours within each half, twice, then of the halves. */
static inline eight sums_of(const eight *v) {
    const eight_words even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = {1, 3, 9, 11, 5, 7, 13, 15};
    const eight_words low = {0, 1, 2, 3, 8, 9, 10, 11}, high = {4, 5, 6, 7, 12, 13, 14, 15};
    eight pairs[4], fours[2];
    for (int i = 0; i < 4; i++) pairs[i] = SAB_SHUFFLE(v[2 * i], v[2 * i + 1], even) + SAB_SHUFFLE(v[2 * i], v[2 * i + 1], odd);
    for (int i = 0; i < 2; i++)
        fours[i] = SAB_SHUFFLE(pairs[2 * i], pairs[2 * i + 1], even) + SAB_SHUFFLE(pairs[2 * i], pairs[2 * i + 1], odd);
    return SAB_SHUFFLE(fours[0], fours[1], low) + SAB_SHUFFLE(fours[0], fours[1], high);
}

/* Products of a question with eight keys, `step` numbers apart. */
static void eight_scores(const float *question, const float *keys, int64_t step, int64_t width, float *scores) {
    eight sums[8];
    int64_t d = 0;
    for (int k = 0; k < 8; k++) sums[k] = same8(0);
    for (; d + 8 <= width; d += 8) {
        const eight part = load8(question + d);
        for (int k = 0; k < 8; k++) sums[k] += part * load8(keys + k * step + d);
    }
    eight total = sums_of(sums);
    for (; d < width; d++)
        for (int k = 0; k < 8; k++) total[k] += question[d] * keys[k * step + d];
    memcpy(scores, &total, sizeof total);
}

/* sums[8 * parts] += weights times rows of values, `step` numbers apart; the sums stay in registers. */
static inline __attribute__((always_inline)) void weigh(const float *weights, const float *values, int64_t step, int64_t count,
                                                        const int parts, float *sums) {
    eight total[8];
    for (int i = 0; i < parts; i++) total[i] = load8(sums + 8 * i);
    for (int64_t p = 0; p < count; p++, values += step)
        for (int i = 0; i < parts; i++) total[i] += weights[p] * load8(values + 8 * i);
    memcpy(sums, total, (size_t)parts * sizeof *total);
}

static void weighted_sum(const float *weights, const float *values, int64_t step, int64_t count, int64_t width, float *sums) {
    int64_t d = 0;
    for (; d + 64 <= width; d += 64) weigh(weights, values + d, step, count, 8, sums + d);
    for (; d + 8 <= width; d += 8) weigh(weights, values + d, step, count, 1, sums + d);
    for (; d < width; d++)
        for (int64_t p = 0; p < count; p++) sums[d] += weights[p] * values[p * step + d];
}

/* Up to eight rows of keys or values from `position` on, as float rows `step` numbers apart; rows after the last are 0. */
static const float *eight_rows(const sab_kernels *kernels, const sab_operand *x, const char *data, int64_t position, int64_t count,
                               int64_t width, float *buffer, int64_t *step) {
    const int64_t row = x->stride[2] * (int64_t)size_of(x->dtype);
    data += position * row;
    *step = x->stride[2];
    if (x->dtype == SAB_FLOAT32 && count == 8) return (const float *)data;
    *step = width;
    for (int64_t k = 0; k < count; k++, data += row)
        if (x->dtype == SAB_FLOAT32)
            memcpy(buffer + k * width, data, (size_t)width * sizeof(float));
        else
            kernels->to_float(data, x->dtype, width, buffer + k * width);
    memset(buffer + count * width, 0, (size_t)((8 - count) * width) * sizeof(float));
    return buffer;
}

/* Task: the query heads of one or more heads of keys. Operands: out, queries [b, head, query, width], keys and values
 * [b, key head, position, width]; the mask is [b, head, query, position]. Sizes: b, heads, queries, width. */
static void attend(void *argument, int64_t task) {
    shared_step *shared = argument;
    const sab_step *step = shared->step;
    const sab_kernels *kernels = shared->kernels;
    const sab_operand *out = &step->operand[0], *q = &step->operand[1], *k = &step->operand[2], *v = &step->operand[3];
    const int64_t heads = step->size[1], queries = step->size[2], width = step->size[3], positions = step->count;
    const int64_t group = shared->per_task, repeats = heads / step->key_heads, lines = group * queries;
    const int64_t batch = task * group / heads, head = task * group % heads, key_head = head / repeats;
    const int64_t line_size = (positions + 7) / 8 * 8;
    float *scores = sab_scratch((size_t)(lines * line_size + lines * width * 2 + 8 * width) * sizeof(float));
    if (scores == NULL) {
        shared->failed = SAB_NO_MEMORY;
        return;
    }
    float *question = scores + lines * line_size, *sums = question + lines * width, *buffer = sums + lines * width;
    const float scale = (float)step->number[0];
    for (int64_t l = 0; l < lines; l++) {
        const int64_t h = head + l / queries, i = l % queries;
        const char *data = q->data + (batch * q->stride[0] + h * q->stride[1] + i * q->stride[2]) * (int64_t)size_of(q->dtype);
        const float *values = floats(kernels, data, q->dtype, 1, width, buffer);
        for (int64_t d = 0; d < width; d++) question[l * width + d] = values[d] * scale;
    }
    const char *keys = k->data + (batch * k->stride[0] + key_head * k->stride[1]) * (int64_t)size_of(k->dtype);
    for (int64_t p = 0; p < positions; p += 8) {
        int64_t apart, count = positions - p < 8 ? positions - p : 8;
        const float *rows = eight_rows(kernels, k, keys, p, count, width, buffer, &apart);
        for (int64_t l = 0; l < lines; l++)
            eight_scores(question + l * width, rows, apart, width, scores + l * line_size + p);
    }
    for (int64_t l = 0; l < lines; l++) {
        float *line = scores + l * line_size;
        if (step->mask.data != NULL) {
            const sab_operand *m = &step->mask;
            const int64_t h = head + l / queries, i = l % queries;
            const char *data = m->data + (batch * m->stride[0] + h * m->stride[1] + i * m->stride[2]) * (int64_t)size_of(m->dtype);
            for (int64_t p = 0; p < positions; p++, data += m->stride[3] * (int64_t)size_of(m->dtype)) {
                float value;
                if (m->dtype == SAB_BOOL)
                    line[p] = *data ? line[p] : -INFINITY;
                else
                    line[p] += *floats(kernels, data, m->dtype, 1, 1, &value);
            }
        }
        softmax(line, positions);
    }
    memset(sums, 0, (size_t)(lines * width) * sizeof(float));
    const char *values = v->data + (batch * v->stride[0] + key_head * v->stride[1]) * (int64_t)size_of(v->dtype);
    const int64_t direct = v->dtype == SAB_FLOAT32 ? positions : 0; /* all at once, where nothing is converted */
    for (int64_t l = 0; l < lines && direct > 0; l++)
        weighted_sum(scores + l * line_size, (const float *)values, v->stride[2], direct, width, sums + l * width);
    for (int64_t p = direct; p < positions; p += 8) {
        int64_t apart, count = positions - p < 8 ? positions - p : 8;
        const float *rows = eight_rows(kernels, v, values, p, count, width, buffer, &apart);
        for (int64_t l = 0; l < lines; l++)
            weighted_sum(scores + l * line_size + p, rows, apart, count, width, sums + l * width);
    }
    for (int64_t l = 0; l < lines; l++) {
        const int64_t h = head + l / queries, i = l % queries;
        char *data = out->data + (batch * out->stride[0] + h * out->stride[1] + i * out->stride[2]) * (int64_t)size_of(out->dtype);
        store_floats(kernels, sums + l * width, out->dtype, out->stride[3], width, data);
    }
}

static int attention(const sab_kernels *kernels, const sab_step *step, int threads) {
    const int64_t heads = step->size[0] * step->size[1], repeats = step->size[1] / step->key_heads;
    const int64_t work = heads * step->size[2] * step->size[3] * step->count;
    /* Heads of the same keys read them once, where there are enough of such groups for all threads. */
    shared_step shared = {kernels, step, heads / repeats % threads == 0 || threads == 1 ? repeats : 1, 0};
    sab_parallel(attend, &shared, heads / shared.per_task, work < THREADED_ATTENTION ? 1 : threads);
    return shared.failed;
}

static int guard(const sab_kernels *kernels, const sab_step *step) {
    const sab_operand *x = &step->operand[1];
    float value;
    if (!step->integers) return *floats(kernels, x->data, x->dtype, 1, 1, &value) == (float)step->number[0] ? 0 : SAB_DIFFERS;
    int64_t whole;
    return *integers(x->data, x->dtype, 1, 1, &whole) == (int64_t)step->number[0] ? 0 : SAB_DIFFERS;
}

static int run_step(const sab_kernels *kernels, const sab_step *step, int threads) {
    switch (step->kind) {
        case SAB_STEP_MAP: return for_rows(kernels, step, map_row);
        case SAB_STEP_REDUCE: return for_rows(kernels, step, reduce_row);
        case SAB_STEP_NORMALIZE: return for_rows(kernels, step, normalize_row);
        case SAB_STEP_GATHER: return gather(step);
        case SAB_STEP_MULTIPLY: return multiply(kernels, step, threads);
        case SAB_STEP_ATTEND: return attention(kernels, step, threads);
        case SAB_STEP_GUARD: return guard(kernels, step);
        default:
            return sab_cpu_linears(step->matrices, step->count, step->operand[1].data, step->size[3], step->operand[1].dtype,
                                   step->size[2], step->outputs, step->exact, threads);
    }
}

int SAB_NAMED(sab_run_steps)(const sab_kernels *kernels, const sab_step *steps, int64_t count, int threads) {
    for (const sab_step *step = steps; step < steps + count; step++) {
        int failed = run_step(kernels, step, threads);
        if (failed) return failed;
    }
    return 0;
}
