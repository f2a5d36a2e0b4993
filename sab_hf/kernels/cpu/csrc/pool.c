/* Who shares the work of a call, and memory that a thread keeps between calls.
 *
 * That is a team of the OpenMP runtime of PyTorch, where the caller of the library names it (sab_cpu_use_team): its threads
 * are awake between the operations of a model, and threads of our own would contend with them for the same cores. Elsewhere,
 * and in forked children, whose OpenMP threads are gone, it is worker threads that sleep while there is nothing to do.
 *
 * A crew is a team that stays together for many calls (sab_with_crew): its threads watch for work instead of being started for
 * each piece, which takes longer than a small product.
 *
 * With workers, the caller works too and never waits for a worker that has not woken up yet: indices are handed out one by one, so on a
 * busy machine a late worker finds nothing left. It only waits, asleep, for workers in the middle of an index.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "sab_cpu.h"

enum { MAX_WORKERS = 255 };

static pthread_mutex_t calling = PTHREAD_MUTEX_INITIALIZER; /* held by the one caller that uses the workers */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;    /* guards what follows */
static pthread_cond_t work_is_there = PTHREAD_COND_INITIALIZER, workers_left = PTHREAD_COND_INITIALIZER;
static struct {
    void (*task)(void *, int64_t);
    void *argument;
    int64_t count;
    int wanted, inside; /* workers that may still join, and that are in the middle of it */
    unsigned long number;
} job;
static atomic_llong next_index;
static int num_workers;

typedef void (*start_team)(void (*function)(void *), void *argument, unsigned threads, unsigned flags);
static start_team _Atomic team;

static void run_indices(void (*task)(void *, int64_t), void *argument, int64_t count) {
    for (int64_t i; (i = atomic_fetch_add(&next_index, 1)) < count;) task(argument, i);
}

static void *work(void *unused) {
    unsigned long seen = 0;
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (job.number == seen || job.wanted == 0) pthread_cond_wait(&work_is_there, &lock);
        seen = job.number;
        job.wanted--;
        job.inside++;
        void (*task)(void *, int64_t) = job.task;
        void *argument = job.argument;
        int64_t count = job.count;
        pthread_mutex_unlock(&lock);
        run_indices(task, argument, count);
        pthread_mutex_lock(&lock);
        if (--job.inside == 0) pthread_cond_signal(&workers_left);
    }
    return NULL;
}

/* A forked child has none of the threads; its locks may be held by threads that do not exist there. */
static void forget_workers(void) {
    pthread_mutex_init(&calling, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work_is_there, NULL);
    pthread_cond_init(&workers_left, NULL);
    num_workers = job.wanted = job.inside = 0;
    team = NULL;
}

static pthread_once_t forks_once = PTHREAD_ONCE_INIT;
static int watching_forks;

static void watch_forks(void) { watching_forks = pthread_atfork(NULL, NULL, forget_workers) == 0; }

static void start_workers(int wanted) {
    pthread_once(&forks_once, watch_forks);
    if (!watching_forks) return;
    while (num_workers < wanted && num_workers < MAX_WORKERS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL) != 0) return;
        pthread_detach(thread);
        num_workers++;
    }
}

/* Share work through `start`, the function GOMP_parallel of an OpenMP runtime; NULL: through workers of our own. */
void sab_cpu_use_team(start_team start) {
    pthread_once(&forks_once, watch_forks);
    team = watching_forks ? start : NULL;
}

int sab_has_team(void) { return team != NULL; }

typedef struct {
    void (*task)(void *, int64_t);
    void *argument;
    int64_t count;
    atomic_llong next;
} team_job;

static void run_in_team(void *argument) {
    team_job *mine = argument;
    for (int64_t i; (i = atomic_fetch_add(&mine->next, 1)) < mine->count;) mine->task(mine->argument, i);
}

/* A ticket names a round, how many indices it has and the next of them, so that taking an index is one atomic addition, and
 * one that comes too late finds nothing: whoever holds an index below the count may read task and argument, which stay until it
 * is done. */
enum { NEXT_BITS = 21, COUNT_BITS = 20, MOST_INDICES = 1 << COUNT_BITS, PATIENCE = 4096 };

typedef struct {
    void (*function)(void *);
    void *function_argument;
    pthread_t caller;
    void (*task)(void *, int64_t);
    void *argument;
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) atomic_llong done;
    atomic_int over;
} crew;

static _Thread_local crew *own_crew; /* of the thread that leads it */

static int64_t next_of(uint64_t ticket) { return (int64_t)(ticket & ((1u << NEXT_BITS) - 1)); }

static int64_t count_of(uint64_t ticket) { return (int64_t)(ticket >> NEXT_BITS & (MOST_INDICES - 1)); }

static void rest_a_moment(int *waited) {
    if (++*waited > PATIENCE) {
        sched_yield(); /* the cores may be wanted by others */
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_indices(crew *c) {
    for (;;) {
        uint64_t ticket = atomic_load_explicit(&c->ticket, memory_order_acquire);
        if (next_of(ticket) >= count_of(ticket)) return;
        ticket = atomic_fetch_add(&c->ticket, 1);
        if (next_of(ticket) >= count_of(ticket)) return;
        c->task(c->argument, next_of(ticket));
        atomic_fetch_add_explicit(&c->done, 1, memory_order_release);
    }
}

static void serve_crew(void *argument) {
    crew *c = argument;
    if (pthread_equal(pthread_self(), c->caller)) {
        own_crew = c;
        c->function(c->function_argument);
        own_crew = NULL;
        atomic_store(&c->over, 1);
        return;
    }
    for (int waited = 0; !atomic_load_explicit(&c->over, memory_order_relaxed);) {
        uint64_t ticket = atomic_load_explicit(&c->ticket, memory_order_relaxed);
        if (next_of(ticket) < count_of(ticket)) {
            take_indices(c);
            waited = 0;
        } else {
            rest_a_moment(&waited);
        }
    }
}

void sab_with_crew(void (*function)(void *), void *argument, int threads) {
    start_team start = team;
    if (threads < 2 || start == NULL || own_crew != NULL) {
        function(argument);
        return;
    }
    crew c = {.function = function, .function_argument = argument, .caller = pthread_self()};
    start(serve_crew, &c, (unsigned)threads, 0);
}

static void share_with_crew(crew *c, void (*task)(void *, int64_t), void *argument, int64_t count) {
    c->task = task;
    c->argument = argument;
    atomic_store_explicit(&c->done, 0, memory_order_relaxed);
    uint64_t round = (atomic_load(&c->ticket) >> (NEXT_BITS + COUNT_BITS)) + 1;
    atomic_store_explicit(&c->ticket, round << (NEXT_BITS + COUNT_BITS) | (uint64_t)count << NEXT_BITS, memory_order_release);
    take_indices(c);
    for (int waited = 0; atomic_load_explicit(&c->done, memory_order_acquire) < count;) rest_a_moment(&waited);
}

void sab_parallel(void (*task)(void *, int64_t), void *argument, int64_t count, int threads) {
    if (own_crew != NULL && threads > 1 && count > 1 && count < MOST_INDICES) {
        share_with_crew(own_crew, task, argument, count);
        return;
    }
    int helpers = (int)(threads < count ? threads : count) - 1;
    start_team start = team;
    if (helpers > 0 && start != NULL) {
        team_job mine = {.task = task, .argument = argument, .count = count};
        start(run_in_team, &mine, (unsigned)helpers + 1, 0);
        return;
    }
    if (helpers < 1 || pthread_mutex_trylock(&calling) != 0) { /* another thread uses the workers: do without */
        for (int64_t i = 0; i < count; i++) task(argument, i);
        return;
    }
    pthread_mutex_lock(&lock);
    start_workers(helpers);
    job.task = task;
    job.argument = argument;
    job.count = count;
    job.wanted = helpers < num_workers ? helpers : num_workers;
    job.number++;
    atomic_store(&next_index, 0);
    if (job.wanted == 1)
        pthread_cond_signal(&work_is_there);
    else
        pthread_cond_broadcast(&work_is_there);
    pthread_mutex_unlock(&lock);
    run_indices(task, argument, count);
    pthread_mutex_lock(&lock);
    job.wanted = 0; /* who has not joined yet shall sleep on */
    while (job.inside > 0) pthread_cond_wait(&workers_left, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&calling);
}

typedef struct {
    void *memory;
    size_t bytes;
} scratch;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static int scratch_key_exists;

static void free_scratch(void *value) {
    free(((scratch *)value)->memory);
    free(value);
}

static void make_scratch_key(void) { scratch_key_exists = pthread_key_create(&scratch_key, free_scratch) == 0; }

void *sab_scratch(size_t bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    if (!scratch_key_exists) return NULL;
    scratch *own = pthread_getspecific(scratch_key);
    if (own == NULL) {
        own = calloc(1, sizeof *own);
        if (own == NULL || pthread_setspecific(scratch_key, own) != 0) {
            free(own);
            return NULL;
        }
    }
    if (own->bytes < bytes) {
        free(own->memory);
        own->bytes = (bytes + 4095) / 4096 * 4096;
        own->memory = aligned_alloc(64, own->bytes);
        if (own->memory == NULL) own->bytes = 0;
    }
    return own->memory;
}
