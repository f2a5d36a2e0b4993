/* Which instruction set runs: the best that compiler and machine have, unless one is asked for. Look-ups give the same bits with
 * all of them, so the faster ones of two are taken, found by measuring: with AVX-512 some processors lower their clock, or
 * work on half a register at a time. */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "sab_cpu.h"

static const sab_kernels *_Atomic active;

#if defined(SAB_HAVE_AVX512)
static int machine_has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}
#endif

#if defined(SAB_HAVE_AVX2)
static int machine_has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if defined(SAB_HAVE_AVX512) && defined(SAB_HAVE_AVX2)
enum { MEASURED_BYTES = 4 * SAB_BLOCK, MEASURED_CALLS = 200, MEASURED_ROUNDS = 9 }; /* some 3 ms in all */

/* Nanoseconds of MEASURED_CALLS look-ups of one token, or of a group. */
static int64_t time_of(const sab_kernels *kernels, int group) {
    static const uint8_t codes[SAB_TILE * MEASURED_BYTES], tables[SAB_GROUP_TOKENS * 32 * MEASURED_BYTES];
    static const float scales[SAB_GROUP_TOKENS * MEASURED_BYTES / SAB_BLOCK];
    float sums[SAB_GROUP_TOKENS * SAB_TILE];
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int call = 0; call < MEASURED_CALLS; call++)
        if (group)
            kernels->lut_group(codes, MEASURED_BYTES, tables, 32 * MEASURED_BYTES, scales, MEASURED_BYTES / SAB_BLOCK, sums);
        else
            kernels->lut_one(codes, MEASURED_BYTES, tables, scales, sums);
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (int64_t)(end.tv_sec - start.tv_sec) * 1000000000 + (end.tv_nsec - start.tv_nsec);
}

/* `wide`, with the look-ups of `narrow` where those are faster, in turn and at their best: others may use the machine too. */
static sab_kernels faster_of(const sab_kernels *wide, const sab_kernels *narrow) {
    sab_kernels fastest = *wide;
    for (int group = 0; group < 2; group++) {
        int64_t best[2] = {INT64_MAX, INT64_MAX};
        for (int round = 0; round < 2 * MEASURED_ROUNDS; round++) {
            int64_t time = time_of(round % 2 ? narrow : wide, group);
            if (time < best[round % 2]) best[round % 2] = time;
        }
        if (best[1] >= best[0]) continue;
        if (group)
            fastest.lut_group = narrow->lut_group;
        else
            fastest.lut_one = narrow->lut_one;
    }
    return fastest;
}

static sab_kernels measured;
static pthread_once_t measured_once = PTHREAD_ONCE_INIT;

static void measure(void) { measured = faster_of(&sab_kernels_avx512, &sab_kernels_avx2); }
#endif

/* The kernels called `name` (any if NULL), if this machine runs them. Every AArch64 machine has NEON. */
static const sab_kernels *find(const char *name) {
#if defined(SAB_HAVE_AVX512) && defined(SAB_HAVE_AVX2)
    if (name == NULL && machine_has_avx512() && machine_has_avx2()) {
        pthread_once(&measured_once, measure);
        return &measured;
    }
#endif
#if defined(SAB_HAVE_AVX512)
    if ((name == NULL || strcmp(name, "avx512") == 0) && machine_has_avx512()) return &sab_kernels_avx512;
#endif
#if defined(SAB_HAVE_AVX2)
    if ((name == NULL || strcmp(name, "avx2") == 0) && machine_has_avx2()) return &sab_kernels_avx2;
#endif
#if defined(SAB_HAVE_NEON)
    if (name == NULL || strcmp(name, "neon") == 0) return &sab_kernels_neon;
#endif
    if (name == NULL || strcmp(name, "portable") == 0) return &sab_kernels_portable;
    return NULL;
}

const sab_kernels *sab_active_kernels(void) {
    const sab_kernels *kernels = active;
    if (kernels == NULL) active = kernels = find(NULL);
    return kernels;
}

int sab_cpu_abi(void) { return SAB_CPU_ABI; }

#define SAB_QUOTED(text) #text
#define SAB_QUOTE(macro) SAB_QUOTED(macro)

/* The digest of the sources that the build computed. */
const char *sab_cpu_sources(void) { return SAB_QUOTE(SAB_SOURCES); }

const char *sab_cpu_isa(void) { return sab_active_kernels()->name; }

/* Choose "avx512", "avx2", "neon" or "portable"; NULL is the best. Returns 0, or 1 if this machine or build lacks it. */
int sab_cpu_select(const char *name) {
    const sab_kernels *kernels = find(name);
    if (kernels == NULL) return 1;
    active = kernels;
    return 0;
}

/* Returns 0, or SAB_NO_MEMORY. */
int sab_cpu_levels(const sab_levels *levels, int threads) { return sab_active_kernels()->levels(levels, threads); }
