/* A function that takes work until none is left, on several threads at once. For C that poise.native builds. */
#ifndef POISE_THREADS_H
#define POISE_THREADS_H
#include <pthread.h>

enum { MOST_THREADS = 64 };

/* Threads of an OpenMP runtime: call a function on so many of them. */
typedef void (*team)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    void (*take)(void *);
    void *shared;
} call;

static void *in_thread(void *given) {
    call *it = given;
    it->take(it->shared);
    return NULL;
}

/* Without a team, threads are started for the call; those that cannot be started are done without. */
static void on_threads(void (*take)(void *), void *shared, int threads, team run) {
    pthread_t others[MOST_THREADS];
    call it = {take, shared};
    int started = 0;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > 1 && run) {
        run(take, shared, (unsigned)threads, 0);
        return;
    }
    while (started < threads - 1 && !pthread_create(others + started, NULL, in_thread, &it)) started++;
    take(shared);
    for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
}
#endif
