// What adapters add to a product, in place: y += scale * B (A x) for each token that has one.
//
// The tokens of each adapter are gathered, then its A is multiplied with them, then its B. Lanes run along
// the columns of A, and along the rows of B. The order of a token's sums depends on the shapes alone: not on
// the tokens beside it, their adapters, or the number of threads.

#pragma once

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

// That are multiplied together: rows of A, tokens, and vectors of rows of B.
#if REGISTER_BYTES == 64
constexpr int kLoraRanks = 4, kLoraTokens = 4, kLoraVectors = 2;
#else
constexpr int kLoraRanks = 2, kLoraTokens = 2, kLoraVectors = 1;
#endif
constexpr int64_t kLoraPieceRanks = 4, kLoraPieceRows = 1024, kLoraPieceTokens = 32;
constexpr int64_t kLoraPrefetchBytes = 1024;  // ahead
constexpr int64_t kLoraAloneBytes = 1 << 16;  // of weights that one thread multiplies alone

// A part of an adapter and the tokens that have it.
struct LoraGroup {
    const LoraPart* part;
    const int64_t* tokens;  // their numbers
    float* inner;  // (count, rank): scale * A x
    int64_t count;
    int64_t first_inner_piece, first_outer_piece;
};

// inner (kTokens, `rank` floats apart) = scale * kRanks rows of A times some tokens. The scale is here, where
// nothing is added to the product: a compiler fuses the two in some places and not in others.
template <class Item, int kRanks, int kTokens>
INLINE void lora_dots(const Item* a, const Item* x, const int64_t* tokens, int64_t columns, float scale,
                      float* inner, int64_t rank) {
    constexpr int64_t kRun = 64 / sizeof(Item), kVectors = kRun / kLanes;
    Floats total[kTokens][kRanks];
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRanks; ++r) total[t][r] = Floats::all(0.0f);
    const Item *weights[kRanks], *values[kTokens];
    for (int r = 0; r < kRanks; ++r) weights[r] = a + r * columns;
    for (int t = 0; t < kTokens; ++t) values[t] = x + tokens[t] * columns;
    const auto add_run = [&](int64_t c) __attribute__((always_inline)) {
        Floats weight[kRanks][kVectors];
        for (int r = 0; r < kRanks; ++r) widen_run(weights[r] + c, weight[r]);
        for (int t = 0; t < kTokens; ++t) {
            Floats value[kVectors];
            widen_run(values[t] + c, value);
            for (int v = 0; v < kVectors; ++v)
                for (int r = 0; r < kRanks; ++r)
                    total[t][r] = add_product(total[t][r], weight[r][v], value[v]);
        }
    };
    int64_t c = 0;
    for (; c + kRun <= columns; c += kRun) {
        for (int r = 0; r < kRanks; ++r)
            __builtin_prefetch(reinterpret_cast<const char*>(weights[r] + c) + kLoraPrefetchBytes);
        add_run(c);
    }
    if (c < columns) {
        Item ends[kRanks + kTokens][kRun] = {};
        for (int i = 0; i < kRanks + kTokens; ++i) {
            const Item*& from = i < kRanks ? weights[i] : values[i - kRanks];
            for (int64_t k = c; k < columns; ++k) ends[i][k - c] = from[k];
            from = ends[i];
        }
        add_run(0);
    }
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRanks; ++r) inner[t * rank + r] = sum(total[t][r]) * scale;
}

template <class Item, int kTokens>
INLINE void lora_inner_of(const LoraGroup& g, int64_t token, int64_t begin, int64_t end, const Item* x,
                          int64_t columns) {
    const Item* a = static_cast<const Item*>(g.part->a);
    const int64_t rank = g.part->rank;
    float* inner = g.inner + token * rank;
    int64_t r = begin;
    for (; r + kLoraRanks <= end; r += kLoraRanks)
        lora_dots<Item, kLoraRanks, kTokens>(a + r * columns, x, g.tokens + token, columns, g.part->scale,
                                             inner + r, rank);
    for (; r < end; ++r)
        lora_dots<Item, 1, kTokens>(a + r * columns, x, g.tokens + token, columns, g.part->scale, inner + r,
                                    rank);
}

// Sixteen numbers, or the first `there` of them: kIsWhole says which, so that no branch stands between what
// is multiplied and what it is added to.
template <bool kIsWhole, class Item>
INLINE Floats load_lanes(const Item* from, int64_t there) {
    if constexpr (kIsWhole) return load(from);
    Item items[kLanes] = {};
    for (int64_t i = 0; i < there; ++i) items[i] = from[i];
    return load(items);
}

// y += B times `inner`, for rows [row, row + 16 kVectors) of the part, or the first `there` of one vector.
template <class Item, bool kIsWhole, int kVectors, int kTokens>
INLINE void lora_tile(const LoraGroup& g, int64_t token, int64_t row, int64_t there, Item* y,
                      int64_t y_rows) {
    const LoraPart& part = *g.part;
    const Item* b = static_cast<const Item*>(part.b) + row;
    Floats total[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kVectors; ++v) total[t][v] = Floats::all(0.0f);
    const float* inner = g.inner + token * part.rank;
    for (int64_t r = 0; r < part.rank; ++r, b += part.rows) {
        __builtin_prefetch(reinterpret_cast<const char*>(b) + kLoraPrefetchBytes);
        Floats weight[kVectors];
        for (int v = 0; v < kVectors; ++v) weight[v] = load_lanes<kIsWhole>(b + v * kLanes, there);
        for (int t = 0; t < kTokens; ++t) {
            const Floats factor = Floats::all(inner[t * part.rank + r]);
            for (int v = 0; v < kVectors; ++v) total[t][v] = add_product(total[t][v], factor, weight[v]);
        }
    }
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kVectors; ++v) {
            Item* to = y + g.tokens[token + t] * y_rows + part.first_row + row + v * kLanes;
            const Floats value = load_lanes<kIsWhole>(to, there) + total[t][v];
            if constexpr (kIsWhole)
                store(to, value);
            else
                store_first(to, value, there);
        }
}

template <class Item, int kTokens>
INLINE void lora_outer_of(const LoraGroup& g, int64_t token, int64_t begin, int64_t end, Item* y,
                          int64_t y_rows) {
    constexpr int64_t kTile = kLoraVectors * kLanes;
    int64_t row = begin;
    for (; row + kTile <= end; row += kTile)
        lora_tile<Item, true, kLoraVectors, kTokens>(g, token, row, kTile, y, y_rows);
    for (; row + kLanes <= end; row += kLanes)
        lora_tile<Item, true, 1, kTokens>(g, token, row, kLanes, y, y_rows);
    if (row < end) lora_tile<Item, false, 1, kTokens>(g, token, row, end - row, y, y_rows);
}

INLINE int64_t pieces_of(int64_t items, int64_t length) { return (items + length - 1) / length; }

// The call for `token`, with as many tokens in kTokens as are multiplied together, until all had it.
#define LORA_TOKENS(begin, end, call)                                       \
    for (int64_t token = begin; token < end;) {                             \
        if (kLoraTokens == 4 && end - token >= 4) {                         \
            constexpr int kTokens = kLoraTokens;                            \
            call;                                                           \
            token += kTokens;                                               \
        } else if (end - token >= 2) {                                      \
            constexpr int kTokens = 2;                                      \
            call;                                                           \
            token += kTokens;                                               \
        } else {                                                            \
            constexpr int kTokens = 1;                                      \
            call;                                                           \
            token += kTokens;                                               \
        }                                                                   \
    }

template <class Item>
int add_lora_items(const Lora& lora, const Item* x, const int64_t* chosen, Item* y, int64_t tokens,
                   int threads) {
    int64_t num_groups = 0, listed = 0, floats = 0, weights = 0;
    const auto has_tokens_of_before = [&](int64_t p) {
        return p > 0 && lora.parts[p - 1].number == lora.parts[p].number;
    };
    for (int64_t p = 0, count = 0; p < lora.num_parts; ++p) {
        const LoraPart& part = lora.parts[p];
        if (!has_tokens_of_before(p)) {
            count = 0;
            for (int64_t t = 0; t < tokens; ++t) count += chosen[t] == part.number;
            listed += count;
        }
        num_groups += count > 0;
        floats += count * part.rank;
        weights += count ? part.rank * (lora.columns + part.rows) * static_cast<int64_t>(sizeof(Item)) : 0;
    }
    if (!num_groups) return 0;
    char* memory = static_cast<char*>(hanok_scratch(
        num_groups * static_cast<int64_t>(sizeof(LoraGroup)) + listed * 8 + floats * 4));
    if (!memory) return 1;
    LoraGroup* groups = reinterpret_cast<LoraGroup*>(memory);
    int64_t* next_token = reinterpret_cast<int64_t*>(groups + num_groups);
    float* next_inner = reinterpret_cast<float*>(next_token + listed);
    int64_t inner_pieces = 0, outer_pieces = 0, made = 0;
    const int64_t* own = nullptr;
    for (int64_t p = 0, count = 0; p < lora.num_parts; ++p) {
        const LoraPart& part = lora.parts[p];
        if (!has_tokens_of_before(p)) {
            own = next_token, count = 0;
            for (int64_t t = 0; t < tokens; ++t)
                if (chosen[t] == part.number) *next_token++ = t, ++count;
        }
        if (!count) continue;
        groups[made++] = {&part, own, next_inner, count, inner_pieces, outer_pieces};
        next_inner += count * part.rank;
        const int64_t blocks = pieces_of(count, kLoraPieceTokens);
        inner_pieces += blocks * pieces_of(part.rank, kLoraPieceRanks);
        outer_pieces += blocks * pieces_of(part.rows, kLoraPieceRows);
    }
    if (weights * pieces_of(tokens, kLoraTokens) < kLoraAloneBytes) threads = 1;
    const auto tokens_of = [](const LoraGroup& g, int64_t block, int64_t* begin, int64_t* end) {
        *begin = block * kLoraPieceTokens;
        *end = *begin + kLoraPieceTokens < g.count ? *begin + kLoraPieceTokens : g.count;
    };
    share(threads, inner_pieces, [&](int64_t piece, int) {
        const LoraGroup* g = groups + num_groups - 1;
        while (g->first_inner_piece > piece) --g;
        const int64_t blocks = pieces_of(g->count, kLoraPieceTokens);
        int64_t begin, end;
        tokens_of(*g, (piece - g->first_inner_piece) % blocks, &begin, &end);
        const int64_t first = (piece - g->first_inner_piece) / blocks * kLoraPieceRanks;
        const int64_t last = first + kLoraPieceRanks < g->part->rank ? first + kLoraPieceRanks : g->part->rank;
        LORA_TOKENS(begin, end, (lora_inner_of<Item, kTokens>(*g, token, first, last, x, lora.columns)))
    });
    share(threads, outer_pieces, [&](int64_t piece, int) {
        const LoraGroup* g = groups + num_groups - 1;
        while (g->first_outer_piece > piece) --g;
        const int64_t blocks = pieces_of(g->count, kLoraPieceTokens);
        int64_t begin, end;
        tokens_of(*g, (piece - g->first_outer_piece) % blocks, &begin, &end);
        const int64_t first = (piece - g->first_outer_piece) / blocks * kLoraPieceRows;
        const int64_t last = first + kLoraPieceRows < g->part->rows ? first + kLoraPieceRows : g->part->rows;
        LORA_TOKENS(begin, end, (lora_outer_of<Item, kTokens>(*g, token, first, last, y, lora.rows)))
    });
    return 0;
}
#undef LORA_TOKENS

int add_lora(const Lora* lora, const void* x, const int64_t* chosen, void* y, int64_t tokens, int type,
             int threads) {
    if (type == kFloat32)
        return add_lora_items(*lora, static_cast<const float*>(x), chosen, static_cast<float*>(y), tokens, threads);
    return add_lora_items(*lora, static_cast<const uint16_t*>(x), chosen, static_cast<uint16_t*>(y), tokens,
                          threads);
}

}  // namespace
