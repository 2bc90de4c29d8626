// Products with bfloat16 and float32 weights as files hold them, for any number of tokens, on x86 without
// AVX-512.
//
// Sixteen rows of a weight are transposed, 256 columns at a time, so that lanes are rows: each sum is then
// a chain along the columns, and chains of 256 are added in order. A token's result therefore depends on
// its own numbers alone, not on the other tokens of the call or the number of threads. For many tokens the
// transposed columns, in float32, stay in the L1 cache; one token reads the weights at memory speed.

#pragma once

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

constexpr int64_t kDenseTokens = INT64_MAX;  // any number of them
constexpr int64_t kChain = 256;  // columns
constexpr int64_t kPanels = 2;  // of 16 rows, transposed at a time
constexpr int64_t kPieceRows = 64, kPieceTokens = 192;

#if REGISTER_BYTES == 32
constexpr int kDenseTileTokens = 6;
#else
constexpr int kDenseTileTokens = 2;
#endif

// x in tiles of tokens that are multiplied together, (columns, tokens of the tile) each, in float32.
struct Tiles {
    float* x;
    int64_t tokens, columns;  // columns: filled up to whole chains

    INLINE int64_t count() const { return (tokens + kDenseTileTokens - 1) / kDenseTileTokens; }
    // As even as can be: 8 tokens are 4 and 4.
    INLINE int64_t first(int64_t tile) const { return tile * tokens / count(); }
    INLINE float* at(int64_t tile, int64_t column) const {
        return x + first(tile) * columns + column * (first(tile + 1) - first(tile));
    }
};

template <class Item>
INLINE void fill_tile(const Item* x, int64_t columns, const Tiles& tiles, int64_t tile) {
    const int64_t first = tiles.first(tile), count = tiles.first(tile + 1) - first;
    float* to = tiles.at(tile, 0);
    for (int64_t c = 0; c < tiles.columns; ++c)
        for (int64_t t = 0; t < count; ++t)
            to[c * count + t] = c < columns ? widen(x[(first + t) * columns + c]) : 0.0f;
}

// Words that hold one column of sixteen rows, or two, as float32.
template <class Item>
INLINE void put_words(const Words& words, float* to) {
    if (sizeof(Item) == 4) return store(to, reinterpret<Floats>(words));
    store(to, reinterpret<Floats>(words << 16));
    store(to + kLanes, reinterpret<Floats>(words & Words::all(0xffff0000u)));
}

// Columns [column, column + kChain) of sixteen rows as (kChain, 16) float32; zeros past the end.
template <class Item>
INLINE void turn_rows(const Item* weight, int64_t rows, int64_t columns, int64_t row, int64_t column,
                      float* to) {
    constexpr int64_t kItems = 64 / sizeof(Item);  // that sixteen words hold
    alignas(64) static const Item noughts[kItems] = {};
    for (int64_t c = 0; c < kChain; c += kItems) {
        const int64_t there = columns - column - c;
        alignas(64) Item ends[kLanes][kItems];
        const uint32_t* from[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            const Item* at = weight + (row + r) * columns + column + c;
            if (row + r >= rows || there <= 0) {
                at = noughts;
            } else if (there < kItems) {
                for (int64_t i = 0; i < kItems; ++i) ends[r][i] = i < there ? at[i] : Item{};
                at = ends[r];
            } else {
                // 256 bytes ahead in each of the rows: measured, 19 GB/s on two threads; a panel ahead: 14.
                __builtin_prefetch(at + 4 * kItems);
            }
            from[r] = reinterpret_cast<const uint32_t*>(at);
        }
        alignas(64) uint32_t words[kLanes][kLanes];
        transpose(from, words);
        for (int i = 0; i < kLanes; ++i)
            put_words<Item>(Words::load(words[i]), to + (c + i * (kItems / kLanes)) * kLanes);
    }
}

// sums (panels, tokens, 16), `panel_floats` from panel to panel, += a chain of some panels times a tile.
template <int kPanels, int kTokens>
INLINE void dense_tile(const float* panels, const float* x, float* sums, int64_t panel_floats) {
    for (int p = 0; p < kPanels; ++p)
        for (int t = 0; t < kTokens; ++t) __builtin_prefetch(sums + p * panel_floats + t * kLanes, 1);
    Floats total[kTokens][kPanels];
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < kPanels; ++p) total[t][p] = Floats::all(0.0f);
    for (int64_t c = 0; c < kChain; ++c) {
        Floats weight[kPanels];
        for (int p = 0; p < kPanels; ++p) weight[p] = load(panels + (p * kChain + c) * kLanes);
        for (int t = 0; t < kTokens; ++t) {
            const Floats factor = Floats::all(x[c * kTokens + t]);
            for (int p = 0; p < kPanels; ++p) total[t][p] = add_product(total[t][p], factor, weight[p]);
        }
    }
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < kPanels; ++p) {
            float* to = sums + p * panel_floats + t * kLanes;
            store(to, load(to) + total[t][p]);
        }
}

template <int kPanels>
INLINE void multiply(const float* panels, const Tiles& tiles, int64_t begin, int64_t end, int64_t column,
                     float* sums, int64_t panel_floats) {
    for (int64_t tile = begin; tile < end; ++tile) {
        const float* x = tiles.at(tile, column);
        float* to = sums + (tiles.first(tile) - tiles.first(begin)) * kLanes;
        switch (tiles.first(tile + 1) - tiles.first(tile)) {
            case 1: dense_tile<kPanels, 1>(panels, x, to, panel_floats); break;
            case 2: dense_tile<kPanels, 2>(panels, x, to, panel_floats); break;
#if REGISTER_BYTES == 32
            case 3: dense_tile<kPanels, 3>(panels, x, to, panel_floats); break;
            case 4: dense_tile<kPanels, 4>(panels, x, to, panel_floats); break;
            case 5: dense_tile<kPanels, 5>(panels, x, to, panel_floats); break;
            case 6: dense_tile<kPanels, 6>(panels, x, to, panel_floats); break;
#endif
        }
    }
}

template <class Item>
int dense_items(const Item* x, const Item* weight, const Item* bias, Item* y, int64_t tokens, int64_t rows,
                int64_t columns, int threads) {
    const int64_t padded = (columns + kChain - 1) / kChain * kChain;
    const int64_t piece_tokens = tokens < kPieceTokens ? tokens : kPieceTokens;
    const int64_t panel_floats = (piece_tokens + kDenseTileTokens) * kLanes;  // of sums
    const int64_t worker_floats = kPanels * (kChain * kLanes + panel_floats);
    if (is_small(rows * columns * sizeof(Item), tokens)) threads = 1;
    float* memory = static_cast<float*>(hanok_scratch((tokens * padded + threads * worker_floats) * 4));
    if (!memory) return 1;
    const Tiles tiles = {memory, tokens, padded};
    float* all_work = memory + tokens * padded;
    share_ranges(threads, tiles.count(), 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) fill_tile(x, columns, tiles, tile);
    });
    const int64_t row_pieces = (rows + kPieceRows - 1) / kPieceRows;
    const int64_t blocks = (tokens + piece_tokens - 1) / piece_tokens;
    share(threads, row_pieces * blocks, [&](int64_t piece, int worker) {
        float* panels = all_work + worker * worker_floats;
        float* sums = panels + kPanels * kChain * kLanes;
        const int64_t block = piece / row_pieces, first_row = piece % row_pieces * kPieceRows;
        const int64_t end_row = first_row + kPieceRows < rows ? first_row + kPieceRows : rows;
        const int64_t begin = block * tiles.count() / blocks, end = (block + 1) * tiles.count() / blocks;
        const int64_t first_token = tiles.first(begin), num_tokens = tiles.first(end) - first_token;
        for (int64_t row = first_row; row < end_row; row += kPanels * kLanes) {
            for (int64_t i = 0; i < kPanels * panel_floats; i += kLanes) store(sums + i, Floats::all(0.0f));
            for (int64_t column = 0; column < columns; column += kChain) {
                for (int64_t p = 0; p < kPanels; ++p)
                    turn_rows(weight, rows, columns, row + p * kLanes, column, panels + p * kChain * kLanes);
                // Two panels side by side where one has too few sums to keep the processor busy.
                if (tokens <= 2)
                    multiply<kPanels>(panels, tiles, begin, end, column, sums, panel_floats);
                else
                    for (int64_t p = 0; p < kPanels; ++p)
                        multiply<1>(panels + p * kChain * kLanes, tiles, begin, end, column,
                                    sums + p * panel_floats, panel_floats);
            }
            for (int64_t t = 0; t < num_tokens; ++t)
                for (int64_t r = row, p = 0; p < kPanels && r < rows; r += kLanes, ++p) {
                    Floats value = load(sums + p * panel_floats + t * kLanes);
                    if (bias) value = value + load_first(bias + r, rows - r);
                    store_first(y + (first_token + t) * rows + r, value, rows - r);
                }
        }
    });
    return 0;
}

int dense(const void* x, const void* weight, const void* bias, void* y, int64_t tokens, int64_t rows,
          int64_t columns, int type, int threads) {
    if (type == kFloat32)
        return dense_items(static_cast<const float*>(x), static_cast<const float*>(weight),
                           static_cast<const float*>(bias), static_cast<float*>(y), tokens, rows, columns, threads);
    return dense_items(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(weight),
                       static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(y), tokens, rows, columns,
                       threads);
}

}  // namespace
