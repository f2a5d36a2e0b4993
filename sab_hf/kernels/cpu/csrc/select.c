/* Which instruction set runs: the best that compiler and machine have, unless one is asked for. */
#include <stdatomic.h>
#include <string.h>

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

/* The kernels called `name` (any if NULL), if this machine runs them. Every AArch64 machine has NEON. */
static const sab_kernels *find(const char *name) {
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
