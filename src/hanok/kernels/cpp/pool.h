// Work that several threads share, without waiting for any of them to begin.
//
// The caller offers pieces and claims them one after another itself; threads of the pool claim some if
// they run. So a thread that the machine does not run, since other programs have its core, costs nothing:
// what is waited for at the end are pieces that were claimed, and a piece is short. A team that has to
// arrive, as OpenMP's, waits for a thread that is not running in each of a pass's hundred products.

#pragma once

#include <cstdint>

// Runs piece `piece` as worker `worker`, which is below the number of threads and no two at a time have.
typedef void (*hanok_piece)(void* context, std::int64_t piece, int worker);

// Returns when pieces [0, count) have run, on at most `threads` threads. What calls while the pool works
// for another thread does its pieces alone.
void hanok_share(int threads, std::int64_t count, hanok_piece run, void* context);

namespace {

// work(piece, worker) for each piece. Small work is given `threads` 1: another core takes some
// microseconds to hear of it.
template <class Work>
inline void share(int threads, std::int64_t count, const Work& work) {
    if (threads <= 1 || count <= 1) {
        for (std::int64_t piece = 0; piece < count; ++piece) work(piece, 0);
        return;
    }
    hanok_share(
        threads, count,
        [](void* context, std::int64_t piece, int worker) {
            (*static_cast<const Work*>(context))(piece, worker);
        },
        const_cast<Work*>(&work));
}

// Whether a product with a weight of so many bytes is not worth sharing: reading 256 KiB takes 20 us, and
// four tokens are multiplied in the time.
inline bool is_small(std::int64_t weight_bytes, std::int64_t tokens) {
    return weight_bytes * ((tokens + 3) / 4) < 1 << 18;
}

// work(begin, end, worker) for ranges of `length` items.
template <class Work>
inline void share_ranges(int threads, std::int64_t items, std::int64_t length, const Work& work) {
    share(threads, (items + length - 1) / length, [&](std::int64_t piece, int worker) {
        const std::int64_t begin = piece * length;
        work(begin, begin + length < items ? begin + length : items, worker);
    });
}

}  // namespace
