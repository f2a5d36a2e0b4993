/* A token's pass through a model as a list of steps on fixed memory: recorded, and run without Python or a dispatcher. */
#ifndef SAB_STEPS_H
#define SAB_STEPS_H

#include "sab_cpu.h"

#define SAB_STEP_DIMS 4
#define SAB_STEP_OPERANDS 4

/* Further dtypes of operands; the first three are those of `sab_dtype`. */
enum { SAB_INT64 = 3, SAB_INT32 = 4, SAB_BOOL = 5 };

/* What `sab_cpu_steps` returns beside `sab_failure`: the pass took another way than the recorded one. */
enum { SAB_DIFFERS = 3 };

/* Must equal the lists of the same names in sab_hf/kernels/cpu/steps.py. */
enum sab_step_kind {
    SAB_STEP_MAP, SAB_STEP_REDUCE, SAB_STEP_NORMALIZE, SAB_STEP_GATHER, SAB_STEP_MULTIPLY, SAB_STEP_ATTEND, SAB_STEP_GUARD,
    SAB_STEP_PACKED,
};
enum sab_step_function {
    SAB_COPY, SAB_NEG, SAB_NOT, SAB_ABS, SAB_EXP, SAB_LOG, SAB_SQRT, SAB_RSQRT, SAB_SIN, SAB_COS, SAB_TANH, SAB_SIGMOID,
    SAB_SILU, SAB_GELU, SAB_GELU_TANH, SAB_RELU, SAB_RECIPROCAL, SAB_SQUARE, SAB_ADD, SAB_SUB, SAB_MUL, SAB_DIV, SAB_POW,
    SAB_MAX, SAB_MIN, SAB_AND, SAB_OR, SAB_EQ, SAB_NE, SAB_LT, SAB_LE, SAB_GT, SAB_GE, SAB_WHERE, SAB_IOTA, SAB_SUM, SAB_MEAN,
    SAB_ALL, SAB_ANY, SAB_SOFTMAX, SAB_LAYER_NORM, SAB_RMS_NORM,
};

typedef struct {
    char *data;                     /* NULL: `number` of the step, or nothing */
    int64_t stride[SAB_STEP_DIMS];  /* elements */
    int64_t dtype;
} sab_operand;

typedef struct sab_step {
    int32_t kind, function, integers, inputs;
    int64_t size[SAB_STEP_DIMS];
    sab_operand operand[SAB_STEP_OPERANDS]; /* the result, then the inputs */
    double number[SAB_STEP_OPERANDS - 1];
    sab_operand mask;
    int64_t count, key_heads, exact;
    const sab_matrix *matrices;
    void *const *outputs;
} sab_step;

/* A number of the steps that changes from token to token: *where = constant + per_token * tokens + per_room * room, an address
 * if `base` is not negative: bases[base] + that. */
typedef struct {
    int64_t *where;
    int64_t base, constant, per_token, per_room;
} sab_patch;

SAB_EXPORT int64_t sab_cpu_step_bytes(void);
SAB_EXPORT void sab_cpu_patch(const sab_patch *patches, int64_t count, char *const *bases, int64_t tokens, int64_t room);
SAB_EXPORT int sab_cpu_steps(const sab_step *steps, int64_t count, int threads);

#endif
