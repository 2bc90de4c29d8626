// Products with bfloat16 and float32 weights as files hold them, row after row, for a few tokens: at the
// speed of memory. Several rows share what is read of x, and their addresses are looked up side by side.
// For AVX-512 and ARM; elsewhere gemm.h.

#pragma once

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

constexpr int kDenseTokens = 8;  // the most
constexpr int64_t kRowsPerPiece = 32;
constexpr int64_t kPrefetchItems = 512;  // ahead, measured: 28 GB/s, with none 20 to 24

// x as float32, in the order in which weights are widened: a run of bfloat16 is 32 columns, the even ones
// first, as a 32-bit word holds two of them; a run of float32 is 16.
template <class Item>
constexpr int64_t run_columns() {
    return 64 / sizeof(Item);
}

template <class Item>
INLINE void wide_x(const Item* x, float* to, int64_t runs) {
    constexpr int64_t kRun = run_columns<Item>(), kStep = kRun / kLanes;
    for (int64_t run = 0; run < runs; ++run)
        for (int64_t i = 0; i < kRun; ++i)
            to[run * kRun + i % kStep * kLanes + i / kStep] = widen(x[run * kRun + i]);
}

template <class Item>
struct Dense {
    const float* wide;  // (tokens, runs, columns of a run)
    const Item* x;
    const Item* weight;
    const Item* bias;
    Item* y;
    int64_t rows, columns;
};

// The order of sums depends on nothing but the columns.
template <class Item, int kTokens, int kRows>
INLINE void dense_rows(const Dense<Item>& d, int64_t row) {
    constexpr int64_t kRun = run_columns<Item>();
    constexpr int kVectors = kRun / kLanes;
    const int64_t runs = d.columns / kRun;
    Floats total[kRows][kTokens];
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) total[r][t] = Floats::all(0.0f);
    for (int64_t run = 0; run < runs; ++run) {
        Floats weight[kRows][kVectors];
        for (int r = 0; r < kRows; ++r) {
            const Item* from = d.weight + (row + r) * d.columns + run * kRun;
            __builtin_prefetch(from + kPrefetchItems);
            widen_run(from, weight[r]);
        }
        for (int t = 0; t < kTokens; ++t)
            for (int v = 0; v < kVectors; ++v) {
                const Floats x = load(d.wide + (t * runs + run) * kRun + v * kLanes);
                for (int r = 0; r < kRows; ++r)
                    total[r][t] = add_product(total[r][t], weight[r][v], x);
            }
    }
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) {
            float value = sum(total[r][t]);
            for (int64_t c = runs * kRun; c < d.columns; ++c)
                value += widen(d.weight[(row + r) * d.columns + c]) * widen(d.x[t * d.columns + c]);
            if (d.bias) value += widen(d.bias[row + r]);
            put(d.y + t * d.rows + row + r, value);
        }
}

template <class Item, int kTokens>
INLINE void dense_between(const Dense<Item>& d, int64_t begin, int64_t end) {
#if REGISTER_BYTES == 64
    constexpr int kRows = kTokens <= 4 ? 4 : 2;
#else
    constexpr int kRows = kTokens <= 2 ? 2 : 1;
#endif
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) dense_rows<Item, kTokens, kRows>(d, row);
    for (; row < end; ++row) dense_rows<Item, kTokens, 1>(d, row);
}

template <class Item>
int dense_of(const Dense<Item>& given, int64_t tokens, int threads) {
    constexpr int64_t kRun = run_columns<Item>();
    const int64_t runs = given.columns / kRun;
    float* wide = static_cast<float*>(hanok_scratch(tokens * runs * kRun * 4));
    if (!wide) return 1;
    for (int64_t t = 0; t < tokens; ++t)
        wide_x(given.x + t * given.columns, wide + t * runs * kRun, runs);
    Dense<Item> d = given;
    d.wide = wide;
    if (is_small(d.rows * d.columns * sizeof(Item), tokens)) threads = 1;
    share_ranges(threads, d.rows, kRowsPerPiece, [&](int64_t begin, int64_t end, int) {
        switch (tokens) {
            case 1: dense_between<Item, 1>(d, begin, end); break;
            case 2: dense_between<Item, 2>(d, begin, end); break;
            case 3: dense_between<Item, 3>(d, begin, end); break;
            case 4: dense_between<Item, 4>(d, begin, end); break;
            case 5: dense_between<Item, 5>(d, begin, end); break;
            case 6: dense_between<Item, 6>(d, begin, end); break;
            case 7: dense_between<Item, 7>(d, begin, end); break;
            default: dense_between<Item, 8>(d, begin, end);
        }
    });
    return 0;
}

template <class Item>
int dense_items(const void* x, const void* weight, const void* bias, void* y, int64_t tokens, int64_t rows,
                int64_t columns, int threads) {
    const Dense<Item> d = {nullptr,
                           static_cast<const Item*>(x),
                           static_cast<const Item*>(weight),
                           static_cast<const Item*>(bias),
                           static_cast<Item*>(y),
                           rows,
                           columns};
    return dense_of(d, tokens, threads);
}

int dense(const void* x, const void* weight, const void* bias, void* y, int64_t tokens, int64_t rows,
          int64_t columns, int type, int threads) {
    if (type == kFloat32) return dense_items<float>(x, weight, bias, y, tokens, rows, columns, threads);
    return dense_items<uint16_t>(x, weight, bias, y, tokens, rows, columns, threads);
}

}  // namespace
