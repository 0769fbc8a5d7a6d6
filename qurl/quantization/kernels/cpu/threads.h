// Threads of the OpenMP runtime that torch has loaded, through its own entry points: another pool would compete with it for the
// cores.
#pragma once

#include <algorithm>

struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    void (*barrier)();
    int (*max_threads)();
    int (*in_parallel)();
};

inline int num_threads(const OpenMp& openmp) { return openmp.in_parallel() ? 1 : std::max(1, openmp.max_threads()); }

inline void fork(const OpenMp& openmp, int threads, void (*work)(void*), void* argument) {
    if (threads > 1) openmp.parallel(work, argument, static_cast<unsigned>(threads), 0);
    else work(argument);
}
