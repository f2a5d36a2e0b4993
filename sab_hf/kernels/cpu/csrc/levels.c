/* Weights made of trainable signs (method/levels.py): the level nearest to each latent weight, and a step of training, in one pass.
 *
 * Compiled once for every instruction set: plain loops over a few columns at a time, which become vector code. Tasks are a fixed
 * number of rows, and their sums are added in their order, so results do not depend on the number of threads.
 */
#include <math.h>
#include <string.h>

#include "sab_cpu.h"

enum { BLOCK = 64, TASK_ROWS = 32 };

typedef struct {
    float value[BLOCK], level[BLOCK], largest[BLOCK], unit[BLOCK];
    int32_t choice[BLOCK]; /* signs, the first plane's the highest bit, 1 for minus; the first of equals */
} block;

typedef struct {
    const sab_levels *l;
    float *column_sums; /* [tasks][planes][columns] */
} levels_call;

/* Looks at `count` weights of a row, at most BLOCK, from column `from` on. */
static void look(const sab_levels *l, int64_t row, int64_t from, int count, block *b) {
    const float *latent = l->latent + row * l->columns + from;
    for (int j = 0; j < count; j++) b->unit[j] = INFINITY, b->largest[j] = 0;
    for (int64_t k = 0; k < l->planes; k++) {
        const float r_start = l->row_start[k * l->rows + row], r = l->row_scale[k * l->rows + row];
        const float *c_start = l->column_start + k * l->columns + from, *c = l->column_scale + k * l->columns + from;
        for (int j = 0; j < count; j++) {
            const float size = fabsf(r_start * c_start[j]);
            b->unit[j] = size > 0 && size < b->unit[j] ? size : b->unit[j];
            b->largest[j] += fabsf(r * c[j]);
        }
    }
    float nearest[BLOCK], level[BLOCK];
    for (int j = 0; j < count; j++) {
        b->unit[j] = b->unit[j] == INFINITY ? 0 : b->unit[j];
        b->value[j] = latent[j] * b->unit[j];
        nearest[j] = INFINITY, b->choice[j] = 0;
    }
    for (int32_t signs = 0; signs < 1 << l->planes; signs++) {
        memset(level, 0, sizeof level);
        for (int64_t k = 0; k < l->planes; k++) {
            const float r = l->row_scale[k * l->rows + row], *c = l->column_scale + k * l->columns + from;
            const float signed_r = signs >> (l->planes - 1 - k) & 1 ? -r : r;
            for (int j = 0; j < count; j++) level[j] += signed_r * c[j];
        }
        if (signs == 0) memcpy(b->level, level, sizeof level); /* stays where a latent is NaN */
        for (int j = 0; j < count; j++) {
            const float distance = fabsf(level[j] - b->value[j]);
            const int closer = distance < nearest[j];
            nearest[j] = closer ? distance : nearest[j];
            b->level[j] = closer ? level[j] : b->level[j];
            b->choice[j] = closer ? signs : b->choice[j];
        }
    }
}

static void build_rows(void *argument, int64_t task) {
    const sab_levels *l = ((const levels_call *)argument)->l;
    block b;
    for (int64_t row = task * TASK_ROWS; row < l->rows && row < (task + 1) * TASK_ROWS; row++)
        for (int64_t from = 0; from < l->columns; from += BLOCK) {
            const int count = l->columns - from < BLOCK ? (int)(l->columns - from) : BLOCK;
            look(l, row, from, count, &b);
            memcpy(l->weight + row * l->columns + from, b.level, (size_t)count * sizeof(float));
        }
}

/* One step of Adam for `count` latents; `at` is where they lie. */
static void step(const sab_levels *l, int64_t at, int count, const block *b) {
    float *gradient = l->gradient + at, *latent = l->latent + at, *first = l->first + at, *second = l->second + at;
    for (int j = 0; j < count; j++) {
        const float g = fabsf(b->value[j]) <= b->largest[j] ? gradient[j] * b->unit[j] : 0;
        first[j] += (g - first[j]) * (1 - l->beta1);
        second[j] += (g * g - second[j]) * (1 - l->beta2);
        latent[j] -= l->rate * (first[j] * l->correction1) / (sqrtf(second[j] * l->correction2) + l->epsilon);
        gradient[j] = 0;
    }
}

static void descend_rows(void *argument, int64_t task) {
    const levels_call *call = argument;
    const sab_levels *l = call->l;
    float *column_sums = call->column_sums + task * l->planes * l->columns;
    block b;
    memset(column_sums, 0, (size_t)(l->planes * l->columns) * sizeof(float));
    for (int64_t row = task * TASK_ROWS; row < l->rows && row < (task + 1) * TASK_ROWS; row++) {
        for (int64_t k = 0; k < l->planes; k++) l->row_gradient[k * l->rows + row] = 0;
        for (int64_t from = 0; from < l->columns; from += BLOCK) {
            const int count = l->columns - from < BLOCK ? (int)(l->columns - from) : BLOCK;
            const int64_t at = row * l->columns + from;
            look(l, row, from, count, &b);
            for (int64_t k = 0; k < l->planes; k++) {
                const float r = l->row_scale[k * l->rows + row], *c = l->column_scale + k * l->columns + from;
                const float *gradient = l->gradient + at;
                const int shift = (int)(l->planes - 1 - k);
                float *sums = column_sums + k * l->columns + from, products[BLOCK] = {0};
                for (int j = 0; j < count; j++) {
                    const float turned = b.choice[j] >> shift & 1 ? -gradient[j] : gradient[j];
                    products[j] = turned * c[j];
                    sums[j] += turned * r;
                }
                for (int width = BLOCK / 2; width > 0; width /= 2)
                    for (int j = 0; j < width; j++) products[j] += products[j + width];
                l->row_gradient[k * l->rows + row] += products[0];
            }
            step(l, at, count, &b);
        }
    }
}

int SAB_NAMED(sab_levels)(const sab_levels *l, int threads) {
    const int64_t tasks = (l->rows + TASK_ROWS - 1) / TASK_ROWS, size = l->planes * l->columns;
    levels_call call = {l, NULL};
    if (l->weight != NULL) {
        sab_parallel(build_rows, &call, tasks, threads);
        return 0;
    }
    call.column_sums = sab_scratch((size_t)(tasks * size) * sizeof(float) + 64);
    if (call.column_sums == NULL) return SAB_NO_MEMORY;
    sab_parallel(descend_rows, &call, tasks, threads);
    memset(l->column_gradient, 0, (size_t)size * sizeof(float));
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t j = 0; j < size; j++) l->column_gradient[j] += call.column_sums[task * size + j];
    for (int64_t j = 0; j < size; j++) /* where a plane has no scale it needs none */
        l->column_gradient[j] = l->column_scale[j] != 0 ? l->column_gradient[j] : 0;
    return 0;
}
