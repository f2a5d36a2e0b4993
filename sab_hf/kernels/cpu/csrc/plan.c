/* Runs lists of steps (steps.h), and moves them on from token to token. */
#include "steps.h"

int64_t sab_cpu_step_bytes(void) { return (int64_t)sizeof(sab_step); }

void sab_cpu_patch(const sab_patch *patches, int64_t count, char *const *bases, int64_t tokens, int64_t room) {
    for (const sab_patch *p = patches; p < patches + count; p++) {
        int64_t value = p->constant + p->per_token * tokens + p->per_room * room;
        *p->where = p->base < 0 ? value : (int64_t)(intptr_t)bases[p->base] + value;
    }
}

typedef struct {
    const sab_step *steps;
    int64_t count;
    int threads, failed;
} run;

static void run_all(void *argument) {
    run *r = argument;
    const sab_kernels *kernels = sab_active_kernels();
    r->failed = kernels->run_steps(kernels, r->steps, r->count, r->threads);
}

/* Returns 0, one of `sab_failure`, or SAB_DIFFERS; then some results are not written. */
int sab_cpu_steps(const sab_step *steps, int64_t count, int threads) {
    run r = {steps, count, threads, 0};
    sab_with_crew(run_all, &r, threads);
    return r.failed;
}
