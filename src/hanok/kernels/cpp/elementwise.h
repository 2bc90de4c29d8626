// Norms, rotations, gates, sums and copies: one pass over numbers that torch would visit several times.

#pragma once

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

constexpr int64_t kPieceItems = 16384;  // less is done before another thread has heard of it

// Shares out rows of `columns` items.
template <class Work>
INLINE void share_rows(int threads, int64_t rows, int64_t columns, const Work& work) {
    const int64_t length = columns < kPieceItems ? kPieceItems / (columns > 0 ? columns : 1) : 1;
    share_ranges(threads, rows, length, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) work(row);
    });
}

template <class Item>
INLINE void norm_row(const Item* x, const Item* weight, Item* y, int64_t columns, float eps, float offset) {
    Floats squares = Floats::all(0.0f);
    for (int64_t i = 0; i < columns; i += kLanes) {
        const Floats v = load_first(x + i, columns - i);
        squares = add_product(squares, v, v);
    }
    const float mean = sum(squares) / static_cast<float>(columns);
    const Floats factor = Floats::all(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < columns; i += kLanes) {
        const Floats w = load_first(weight + i, columns - i) + Floats::all(offset);
        store_first(y + i, load_first(x + i, columns - i) * factor * w, columns - i);
    }
}

template <class Item>
void norm_rows(const void* x, const void* weight, void* y, int64_t rows, int64_t columns,
               float eps, float offset, int threads) {
    share_rows(threads, rows, columns, [&](int64_t row) {
        norm_row(static_cast<const Item*>(x) + row * columns, static_cast<const Item*>(weight),
                 static_cast<Item*>(y) + row * columns, columns, eps, offset);
    });
}

int rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t columns,
             float eps, int has_unit_offset, int type, int threads) {
    const float offset = has_unit_offset ? 1.0f : 0.0f;
    if (type == kFloat32)
        norm_rows<float>(x, weight, y, rows, columns, eps, offset, threads);
    else
        norm_rows<uint16_t>(x, weight, y, rows, columns, eps, offset, threads);
    return 0;
}


// Pairs are (i, i + dim / 2), or (2i, 2i + 1) where they are interleaved.
template <class Item>
INLINE void rotate_head(const Item* x, const Item* cos, const Item* sin, Item* y, int64_t dim,
                        bool is_interleaved) {
    if (is_interleaved) {
        for (int64_t i = 0; i < dim; i += 2) {
            const float a = widen(x[i]), b = widen(x[i + 1]);
            put(y + i, a * widen(cos[i]) - b * widen(sin[i]));
            put(y + i + 1, b * widen(cos[i + 1]) + a * widen(sin[i + 1]));
        }
        return;
    }
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t there = half - i;
        const Floats a = load_first(x + i, there), b = load_first(x + half + i, there);
        store_first(y + i, a * load_first(cos + i, there) - b * load_first(sin + i, there), there);
        store_first(y + half + i,
                    b * load_first(cos + half + i, there) + a * load_first(sin + half + i, there), there);
    }
}

template <class Item>
void rotate_items(const void* heads, const void* cos, const void* sin, void* y, int64_t tokens,
                  int64_t num_heads, int64_t head_dim, int64_t rotary_dim, int64_t token_stride,
                  bool is_interleaved, int threads) {
    share_rows(threads, tokens, num_heads * head_dim, [&](int64_t t) {
        for (int64_t h = 0; h < num_heads; ++h) {
            const Item* from = static_cast<const Item*>(heads) + t * token_stride + h * head_dim;
            Item* to = static_cast<Item*>(y) + (t * num_heads + h) * head_dim;
            rotate_head(from, static_cast<const Item*>(cos) + t * rotary_dim,
                        static_cast<const Item*>(sin) + t * rotary_dim, to, rotary_dim, is_interleaved);
            for (int64_t i = rotary_dim; i < head_dim; ++i) to[i] = from[i];
        }
    });
}

int rotate(const void* heads, const void* cos, const void* sin, void* y, int64_t tokens, int64_t num_heads,
           int64_t head_dim, int64_t rotary_dim, int64_t token_stride, int is_interleaved, int type,
           int threads) {
    if (type == kFloat32)
        rotate_items<float>(heads, cos, sin, y, tokens, num_heads, head_dim, rotary_dim, token_stride,
                            is_interleaved, threads);
    else
        rotate_items<uint16_t>(heads, cos, sin, y, tokens, num_heads, head_dim, rotary_dim, token_stride,
                               is_interleaved, threads);
    return 0;
}

enum Activation { kSilu = 0, kGeluTanh = 1 };

INLINE Floats activated(const Floats& v, int activation) {
    const Floats one = Floats::all(1.0f);
    if (activation == kSilu) return v / (one + exponential(Floats::all(0.0f) - v));
    const Floats inner = v + Floats::all(0.044715f) * v * v * v;
    // v / 2 * (1 + tanh u) is v / (1 + e^-2u), which keeps its accuracy where tanh is nearly -1.
    return v / (one + exponential(Floats::all(-1.5957691216f) * inner));
}

// (rows, 2 x columns): a gate and what it gates -> (rows, columns).
template <class Item>
void gate_rows(const void* gate_up, void* y, int64_t rows, int64_t columns, int activation, int threads) {
    constexpr int64_t kPart = 2048;  // so that one long row is shared too
    const int64_t parts = (columns + kPart - 1) / kPart;
    share_rows(threads, rows * parts, columns < kPart ? columns : kPart, [&](int64_t item) {
        const int64_t row = item / parts, begin = item % parts * kPart;
        const int64_t end = begin + kPart < columns ? begin + kPart : columns;
        const Item* gate = static_cast<const Item*>(gate_up) + row * 2 * columns;
        Item* to = static_cast<Item*>(y) + row * columns;
        for (int64_t i = begin; i < end; i += kLanes) {
            const Floats value = activated(load_first(gate + i, end - i), activation);
            store_first(to + i, value * load_first(gate + columns + i, end - i), end - i);
        }
    });
}

int gate(const void* gate_up, void* y, int64_t rows, int64_t columns, int activation, int type, int threads) {
    if (type == kFloat32)
        gate_rows<float>(gate_up, y, rows, columns, activation, threads);
    else
        gate_rows<uint16_t>(gate_up, y, rows, columns, activation, threads);
    return 0;
}

// Copies rows of bytes that lie apart side by side. Few and short: a thread is not worth waking.
int copy(const void* from, void* to, int64_t rows, int64_t bytes, int64_t stride_bytes) {
    for (int64_t row = 0; row < rows; ++row)
        std::memcpy(static_cast<char*>(to) + row * bytes, static_cast<const char*>(from) + row * stride_bytes,
                    static_cast<std::size_t>(bytes));
    return 0;
}

template <class Item>
void add_items(const void* a, const void* b, void* y, int64_t count, int threads) {
    share_ranges(threads, count, kPieceItems, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i += kLanes)
            store_first(static_cast<Item*>(y) + i, load_first(static_cast<const Item*>(a) + i, end - i) +
                            load_first(static_cast<const Item*>(b) + i, end - i), end - i);
    });
}

int add(const void* a, const void* b, void* y, int64_t count, int type, int threads) {
    if (type == kFloat32)
        add_items<float>(a, b, y, count, threads);
    else
        add_items<uint16_t>(a, b, y, count, threads);
    return 0;
}

int widen_items(const void* x, void* y, int64_t count, int threads) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    float* to = static_cast<float*>(y);
    share_ranges(threads, count, kPieceItems, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i += kLanes) store_first(to + i, load_first(from + i, end - i), end - i);
    });
    return 0;
}

// Sixteen numbers of a row, `filler` after its end.
INLINE Floats load_or(const float* from, int64_t count, float filler) {
    if (count >= kLanes) return load(from);
    float items[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) items[i] = i < count ? from[i] : filler;
    return load(items);
}

// ln(sum of e^x) of a row, and the index of its first largest number. A NaN makes the sum NaN.
INLINE void sum_row(const float* row, int64_t columns, float* total, int64_t* likeliest) {
    const float infinite = __builtin_inff();
    Floats peak = Floats::all(-infinite), sums = Floats::all(0.0f);
    Ints is_none = Ints::all(0);
    for (int64_t i = 0; i < columns; i += kLanes) {
        const Floats value = load_or(row + i, columns - i, -infinite);
        peak = larger(peak, value);
        is_none = is_none | is_no_number(value);
    }
    const float most = largest(peak);
    *likeliest = 0;
    for (int64_t i = 0; i < columns; ++i)
        if (row[i] == most) {
            *likeliest = i;
            break;
        }
    if (sum(is_none) != 0 || !(most < infinite) || most == -infinite) {
        *total = sum(is_none) != 0 ? __builtin_nanf("") : most;
        return;
    }
    for (int64_t i = 0; i < columns; i += kLanes)
        sums = sums + exponential(load_or(row + i, columns - i, -infinite) - Floats::all(most));
    *total = most + __builtin_logf(sum(sums));
}

int log_sum_exp(const void* x, float* totals, int64_t* likeliest, int64_t rows, int64_t columns, int threads) {
    share_rows(threads, rows, columns, [&](int64_t row) {
        sum_row(static_cast<const float*>(x) + row * columns, columns, totals + row, likeliest + row);
    });
    return 0;
}

}  // namespace
