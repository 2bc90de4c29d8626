// See pool.h. One pool for the process; its threads sleep when there was no work for a moment.

#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kMostThreads = 256;
// How long a thread looks for work before it sleeps, and a caller for its last piece. Within a pass the
// next product comes after a few microseconds; to wake a sleeping core takes 20 to 60.
constexpr std::int64_t kLookNanoseconds = 100'000;
constexpr std::int64_t kWaitNanoseconds = 50'000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline std::int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

// Whether `is_over` came true within the time.
template <class Condition>
bool look(std::int64_t nanoseconds, const Condition& is_over) {
    for (std::int64_t start = 0;;) {
        for (int turn = 0; turn < 32; ++turn) {
            if (is_over()) return true;
            relax();
        }
        const std::int64_t time = now();
        if (!start) start = time;
        if (time - start > nanoseconds) return is_over();
    }
}

// What is offered stands in `left`: the offer's number above, how many of its pieces are unclaimed below.
// A claim replaces both at once, so it cannot take a piece of another offer than the one it looked at.
// The offer's other fields change only while nothing is unclaimed and every claimed piece is done.
struct Pool {
    alignas(64) std::atomic<std::uint64_t> left{0};
    std::atomic<std::int64_t> count{0};
    std::atomic<hanok_piece> run{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<int> threads{0};
    alignas(64) std::atomic<std::int64_t> done{0};
    alignas(64) std::atomic<bool> is_taken{false};
    std::atomic<int> sleepers{0};
    std::atomic<bool> is_waited_for{false};
    int num_helpers = 0;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t offered = PTHREAD_COND_INITIALIZER;
    pthread_cond_t finished = PTHREAD_COND_INITIALIZER;
};
Pool pool;

constexpr std::uint64_t unclaimed(std::uint64_t left) { return left & 0xffffffffu; }

// Runs pieces of the current offer until none is unclaimed; returns how many.
std::int64_t work(int worker) {
    std::int64_t pieces = 0;
    for (;;) {
        std::uint64_t left = pool.left.load(std::memory_order_acquire);
        if (!unclaimed(left) || worker >= pool.threads.load(std::memory_order_relaxed)) return pieces;
        const hanok_piece run = pool.run.load(std::memory_order_relaxed);
        void* const context = pool.context.load(std::memory_order_relaxed);
        const std::int64_t count = pool.count.load(std::memory_order_relaxed);
        if (!pool.left.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
        run(context, count - static_cast<std::int64_t>(unclaimed(left)), worker);
        ++pieces;
        if (pool.done.fetch_add(1) + 1 == count && pool.is_waited_for.load()) {
            pthread_mutex_lock(&pool.mutex);
            pthread_cond_signal(&pool.finished);
            pthread_mutex_unlock(&pool.mutex);
        }
    }
}

void* help(void* argument) {
    const int worker = static_cast<int>(reinterpret_cast<std::intptr_t>(argument));
    const auto is_offered = [&] {
        return unclaimed(pool.left.load()) && worker < pool.threads.load(std::memory_order_relaxed);
    };
    for (;;) {
        if (look(kLookNanoseconds, is_offered)) {
            work(worker);
            continue;
        }
        pthread_mutex_lock(&pool.mutex);
        pool.sleepers.fetch_add(1);
        while (!is_offered()) pthread_cond_wait(&pool.offered, &pool.mutex);
        pool.sleepers.fetch_sub(1);
        pthread_mutex_unlock(&pool.mutex);
    }
}

// Threads do not live on in a child process; it starts its own.
void forget() {
    pool.left.store(0);
    pool.sleepers.store(0);
    pool.is_taken.store(false);
    pool.is_waited_for.store(false);
    pool.num_helpers = 0;
    pool.mutex = PTHREAD_MUTEX_INITIALIZER;
    pool.offered = PTHREAD_COND_INITIALIZER;
    pool.finished = PTHREAD_COND_INITIALIZER;
}

// With fewer threads than wanted the work is done all the same.
void start_helpers(int wanted) {
    if (!pool.num_helpers && wanted) {
        static bool is_registered = false;
        if (!is_registered) pthread_atfork(nullptr, nullptr, forget);
        is_registered = true;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    while (pool.num_helpers < wanted) {
        pthread_t thread;
        const std::intptr_t worker = pool.num_helpers + 1;
        if (pthread_create(&thread, nullptr, help, reinterpret_cast<void*>(worker))) break;
        pthread_detach(thread);
        ++pool.num_helpers;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace

void hanok_share(int threads, std::int64_t count, hanok_piece run, void* context) {
    if (threads > kMostThreads) threads = kMostThreads;
    if (count > 0x7fffffff || pool.is_taken.exchange(true)) {
        for (std::int64_t piece = 0; piece < count; ++piece) run(context, piece, 0);
        return;
    }
    if (pool.num_helpers < threads - 1) start_helpers(threads - 1);
    pool.count.store(count, std::memory_order_relaxed);
    pool.run.store(run, std::memory_order_relaxed);
    pool.context.store(context, std::memory_order_relaxed);
    pool.threads.store(threads, std::memory_order_relaxed);
    pool.done.store(0, std::memory_order_relaxed);
    const std::uint64_t offer = (pool.left.load(std::memory_order_relaxed) >> 32) + 1;
    pool.left.store(offer << 32 | static_cast<std::uint64_t>(count));
    if (pool.sleepers.load()) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.offered);
        pthread_mutex_unlock(&pool.mutex);
    }
    work(0);
    const auto is_done = [&] { return pool.done.load(std::memory_order_acquire) == count; };
    if (!look(kWaitNanoseconds, is_done)) {
        pthread_mutex_lock(&pool.mutex);
        pool.is_waited_for.store(true);
        while (pool.done.load() != count) pthread_cond_wait(&pool.finished, &pool.mutex);
        pool.is_waited_for.store(false);
        pthread_mutex_unlock(&pool.mutex);
    }
    pool.is_taken.store(false);
}
