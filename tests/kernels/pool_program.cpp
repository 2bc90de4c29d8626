// Called by test_pool.py: the pool without the kernels around it.

#include "pool.h"

#include <atomic>
#include <cstdint>
#include <vector>

namespace {
std::atomic<std::int64_t> of_caller, of_helpers;

void relax() { asm volatile("" ::: "memory"); }
}  // namespace

extern "C" {

// Whether each of `count` pieces ran exactly once, by a worker that no other piece had at the same time.
int runs_each_once(int threads, std::int64_t count) {
    std::vector<std::atomic<int>> ran(count), busy(threads);
    std::atomic<int> faults{0};
    share(threads, count, [&](std::int64_t piece, int worker) {
        if (worker < 0 || worker >= threads || busy[worker].fetch_add(1)) faults.fetch_add(1);
        ran[piece].fetch_add(1);
        busy[worker].fetch_sub(1);
    });
    for (auto& times : ran)
        if (times != 1) faults.fetch_add(1);
    return faults == 0;
}

// A helper that has claimed a piece keeps it until the caller has done all the others. Returns how many
// pieces helpers had; does not return if the caller waits for helpers before that.
std::int64_t others_go_on(int threads, std::int64_t count) {
    of_caller = of_helpers = 0;
    share(threads, count, [&](std::int64_t, int worker) {
        if (worker) {
            ++of_helpers;
            while (of_caller + of_helpers < count) relax();
        } else {
            ++of_caller;
        }
    });
    return of_helpers;
}

// A piece that shares work itself: its pieces run in place.
std::int64_t nested(int threads, std::int64_t count) {
    std::atomic<std::int64_t> total{0};
    share(threads, count, [&](std::int64_t, int) {
        share(threads, count, [&](std::int64_t piece, int) { total += piece; });
    });
    return total;
}
}
