// Products with a quantized weight in panels, for any number of tokens.
//
// Where x is rounded to int8, group by group, it is multiplied as whole numbers; a group's sum is exact, and groups are added in order, so a token's result depends neither on the tokens beside it nor
// on threads. For many tokens the columns go in chunks whose weights stay in the first cache.

#pragma once

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#define MAKES_READY 1
#include "ready.h"
#else
#define MAKES_READY 0
#endif

namespace {

constexpr int64_t kBlock = 32;  // columns
constexpr int64_t kVectorBytes = 64;
constexpr int64_t kFewTokens = 16;     // up to here a panel is read once, over all its columns
constexpr int64_t kManyTokens = 512;   // at a time
constexpr int64_t kMostPanelsPerPiece = 16;    // with few tokens
constexpr int64_t kMostGroupColumns = 128;

#if REGISTER_BYTES == 64
constexpr int kTilePanels = 2, kTileTokens = 6;
#elif defined(__AVXVNNI__)
constexpr int kTilePanels = 1, kTileTokens = 4;
#elif REGISTER_BYTES == 32
constexpr int kTilePanels = 1, kTileTokens = 2;
#else
constexpr int kTilePanels = 1, kTileTokens = 1;
#endif

constexpr bool is_4_bit(int kind) { return kind == kNibbles || kind == kZeroNibbles || kind == kTable; }
constexpr bool has_zero(int kind) { return kind == kZeroNibbles || kind == kZeroBytes; }
constexpr int64_t block_bytes(int kind) { return is_4_bit(kind) ? 256 : 512; }

// What the stored code exceeds the number by, as far as the product of bytes does not know.
constexpr int excess(int kind) {
    return kind == kBytes || kind == kTable ? kByteExcess : kind == kNibbles ? 8 : 0;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t num_groups(const Panels& w) { return w.columns ? ceil_div(w.columns, w.group_columns) : 0; }
INLINE int64_t num_panels(const Panels& w) { return ceil_div(w.rows, kLanes); }
INLINE int64_t panel_bytes(const Panels& w) {
    return num_groups(w) * (w.group_columns / kBlock) * block_bytes(w.kind);
}

INLINE Floats load_scale(const Panels& w, int64_t index) {
    if (w.scale_type == kFloat32) return load(static_cast<const float*>(w.scale) + index * kLanes);
    const uint16_t* from = static_cast<const uint16_t*>(w.scale) + index * kLanes;
    return w.scale_type == kFloat16 ? load_float16(from) : load(from);
}

INLINE Floats load_zero(const Panels& w, int64_t index) {
    if (w.zero_type == kFloat32) return load(static_cast<const float*>(w.zero) + index * kLanes);
    return load_bytes(static_cast<const uint8_t*>(w.zero) + index * kLanes);
}

// What the whole numbers of a group are multiplied with; those of a table are its entries times 127.
template <int kKind>
INLINE Floats group_scale(const Panels& w, int64_t index) {
    if (kKind == kTable)
        return load(static_cast<const float*>(w.scale) + index * kLanes) * Floats::all(1.0f / 127.0f);
    return load_float16(static_cast<const uint16_t*>(w.scale) + index * kLanes);
}

// x as int8: codes (tokens, columns), and for each group its scale and the sum of its codes. The codes may
// stand in 16 bits each, as ready.h wants them.
struct Rounded {
    char* codes;
    float* scale;
    int32_t* sums;
    int64_t columns, groups;  // columns: filled up to whole groups
};

// The largest magnitude of a group becomes 127; ties to even.
template <bool kWide, class Item>
INLINE void round_row(const Item* x, int64_t columns, int64_t group_columns, const Rounded& to, int64_t token) {
    for (int64_t group = 0; group < to.groups; ++group) {
        const int64_t first = group * group_columns;
        const int64_t there = columns - first < group_columns ? columns - first : group_columns;
        Floats peak = Floats::all(0.0f);
        for (int64_t i = 0; i < there; i += kLanes)
            peak = larger_magnitude(peak, load_first(x + first + i, there - i));
        const float most = largest_magnitude(peak);
        // What is infinite or no number has no whole number; the scale carries it into the result.
        // Nor has what is so small that 127 over it is infinite.
        const bool has_codes = most > 0 && most <= 3.4028235e38f && 127.0f / most <= 3.4028235e38f;
        const Floats inverse = Floats::all(has_codes ? 127.0f / most : 0.0f);
        int8_t narrow_codes[kMostGroupColumns];
        int8_t* codes = kWide ? narrow_codes : reinterpret_cast<int8_t*>(to.codes) + token * to.columns + first;
        Ints total = Ints::all(0);
        for (int64_t i = 0; i < group_columns; i += kLanes) {
            Ints whole = Ints::all(0);
            if (has_codes && i < there) whole = nearest_ints(load_first(x + first + i, there - i) * inverse);
            total = total + whole;
            store_bytes(codes + i, whole);
        }
#if MAKES_READY
        if (kWide)
            widen_codes(codes, group_columns,
                        reinterpret_cast<int16_t*>(to.codes) + token * to.columns + first);
#endif
        to.scale[token * to.groups + group] = most / 127.0f;
        to.sums[token * to.groups + group] = sum(total);
    }
}

// total + a group's exact sum, times both scales. Every product of whole numbers ends here, so that the
// bits of a token are the same whichever of them formed the sum. `at` is the token's group.
template <int kKind>
INLINE Floats add_whole(const Floats& total, const Ints& whole, const Panels& w, int64_t index,
                        const Floats& scale, const Rounded& x, int64_t at) {
    Floats value = to_floats(whole);
    if (kKind == kZeroNibbles)
        value = value - load_bytes(static_cast<const uint8_t*>(w.zero) + index * kLanes) * Floats::all(static_cast<float>(x.sums[at]));
    return add_product(total, value, scale * Floats::all(x.scale[at]));
}

// total += kTilePanels panels times kTokens tokens, over some groups.
template <int kKind, int kPanels, int kTokens>
INLINE void tile(const Panels& w, int64_t panel, int64_t first_group, int64_t last_group,
                 const uint8_t* table, const Rounded& x, int64_t token, Floats (&total)[kPanels][kTokens]) {
    const int64_t groups = num_groups(w), blocks = w.group_columns / kBlock;
    const int64_t stride = groups * blocks * block_bytes(kKind);
    const uint8_t* codes = w.codes + panel * stride + first_group * blocks * block_bytes(kKind);
    const char* rounded = x.codes + token * x.columns + first_group * w.group_columns;
    for (int64_t group = first_group; group < last_group; ++group) {
        Ints whole[kPanels][kTokens];
        for (int t = 0; t < kTokens; ++t) {
            const int32_t start = -excess(kKind) * x.sums[(token + t) * x.groups + group];
            for (int p = 0; p < kPanels; ++p) whole[p][t] = Ints::all(excess(kKind) ? start : 0);
        }
        for (int64_t block = 0; block < blocks; ++block) {
            if constexpr (!is_4_bit(kKind)) {
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) {
                    Words words[kPanels];
                    for (int p = 0; p < kPanels; ++p) {
                        const uint8_t* from = codes + p * stride + j * kVectorBytes;
                        if (kTokens <= 4) __builtin_prefetch(from + 2048);
                        words[p] = Words::load(from);
                    }
                    for (int t = 0; t < kTokens; ++t) {
                        int32_t four;
                        std::memcpy(&four, rounded + t * x.columns + 4 * j, 4);
                        for (int p = 0; p < kPanels; ++p)
                            whole[p][t] = add_bytes_product(whole[p][t], words[p], four);
                    }
                }
            } else {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    Words low[kPanels], high[kPanels];
                    for (int p = 0; p < kPanels; ++p) {
                        const uint8_t* from = codes + p * stride + j * kVectorBytes;
                        if (kTokens <= 4) __builtin_prefetch(from + 2048);
                        const Words words = Words::load(from);
                        low[p] = words & Words::all(0x0f0f0f0fu);
                        high[p] = (words >> 4) & Words::all(0x0f0f0f0fu);
                        if (kKind == kTable) {
                            low[p] = look_up(low[p], table);
                            high[p] = look_up(high[p], table);
                        }
                    }
                    for (int t = 0; t < kTokens; ++t) {
                        int32_t first, second;
                        std::memcpy(&first, rounded + t * x.columns + 4 * j, 4);
                        std::memcpy(&second, rounded + t * x.columns + 16 + 4 * j, 4);
                        for (int p = 0; p < kPanels; ++p) {
                            if (kKind == kTable) {
                                whole[p][t] = add_bytes_product(whole[p][t], low[p], first);
                                whole[p][t] = add_bytes_product(whole[p][t], high[p], second);
                            } else {
                                whole[p][t] = add_nibbles_product(whole[p][t], low[p], first);
                                whole[p][t] = add_nibbles_product(whole[p][t], high[p], second);
                            }
                        }
                    }
                }
            }
            codes += block_bytes(kKind);
            rounded += kBlock;
        }
        for (int p = 0; p < kPanels; ++p) {
            const int64_t index = (panel + p) * groups + group;
            if (kTokens <= 4)
                __builtin_prefetch(static_cast<const uint8_t*>(w.scale) +
                                   index * kLanes * (kKind == kTable ? 4 : 2) + 512);
            const Floats scale = group_scale<kKind>(w, index);
            for (int t = 0; t < kTokens; ++t)
                total[p][t] = add_whole<kKind>(total[p][t], whole[p][t], w, index, scale, x,
                                               (token + t) * x.groups + group);
        }
    }
}

// Adds a tile to what `sums` (tokens, kTilePanels, 16) holds of it.
template <int kKind, int kPanels, int kTokens>
INLINE void add_tile(const Panels& w, int64_t panel, int64_t first_group, int64_t last_group,
                     const uint8_t* table, const Rounded& x, int64_t token, float* sums) {
    Floats total[kPanels][kTokens];
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < kPanels; ++p)
            total[p][t] = first_group ? load(sums + (t * kTilePanels + p) * kLanes) : Floats::all(0.0f);
    tile<kKind, kPanels, kTokens>(w, panel, first_group, last_group, table, x, token, total);
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < kPanels; ++p) store(sums + (t * kTilePanels + p) * kLanes, total[p][t]);
}

template <int kKind, int kPanels>
void add_tiles(const Panels& w, int64_t panel, int64_t first_group, int64_t last_group,
               const uint8_t* table, const Rounded& x, int64_t token, int64_t count, float* sums) {
    constexpr int64_t kStep = kTilePanels * kLanes;
    int64_t t = 0;
    // Up to 8 tokens are limited by memory, which tiles of 4 and less fetch ahead.
    for (; count > 8 && t + kTileTokens <= count; t += kTileTokens)
        add_tile<kKind, kPanels, kTileTokens>(w, panel, first_group, last_group, table, x, token + t,
                                              sums + t * kStep);
    if constexpr (kTileTokens > 2) {
        for (; t + 4 <= count; t += 4)
            add_tile<kKind, kPanels, 4>(w, panel, first_group, last_group, table, x, token + t,
                                        sums + t * kStep);
        if (t + 3 == count) {
            add_tile<kKind, kPanels, 3>(w, panel, first_group, last_group, table, x, token + t,
                                        sums + t * kStep);
            t += 3;
        }
        for (; t + 2 <= count; t += 2)
            add_tile<kKind, kPanels, 2>(w, panel, first_group, last_group, table, x, token + t,
                                        sums + t * kStep);
    }
    for (; t < count; ++t)
        add_tile<kKind, kPanels, 1>(w, panel, first_group, last_group, table, x, token + t,
                                    sums + t * kStep);
}

// Sums (tokens, kWidth panels, 16), of which the first `panels` count, with their bias.
template <int kWidth, class Item>
INLINE void write_sums(const float* sums, int panels, const Panels& w, int64_t panel, const Item* bias,
                       Item* y, int64_t token, int64_t count) {
    for (int64_t t = 0; t < count; ++t)
        for (int p = 0; p < panels; ++p) {
            const int64_t row = (panel + p) * kLanes, there = w.rows - row;
            Floats value = load(sums + (t * kWidth + p) * kLanes);
            if (bias) value = value + load_first(bias + row, there);
            store_first(y + (token + t) * w.rows + row, value, there);
        }
}

// x of a product, rounded, in memory that begins at `memory`.
struct RoundedMemory {
    Rounded rounded;
    int64_t bytes;

    INLINE RoundedMemory(char* memory, const Panels& w, int64_t tokens, int64_t code_bytes) {
        const int64_t groups = num_groups(w), columns = groups * w.group_columns;
        const int64_t side_bytes = ceil_div(tokens * groups * 4, 64) * 64;
        const int64_t codes_bytes = ceil_div(tokens * columns * code_bytes, 64) * 64;
        rounded = {memory, reinterpret_cast<float*>(memory + codes_bytes),
                   reinterpret_cast<int32_t*>(memory + codes_bytes + side_bytes), columns, groups};
        bytes = codes_bytes + 2 * side_bytes;
    }
};

template <bool kWide, class Item>
INLINE void round_rows(const Panels& w, const Item* x, int64_t tokens, const Rounded& rounded, int threads) {
    const int64_t length = w.columns < 8192 ? 8192 / w.columns : 1;
    share_ranges(threads, tokens, length, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t)
            round_row<kWide>(x + t * w.columns, w.columns, w.group_columns, rounded, t);
    });
}

// Entries of a table as whole numbers, 128 more.
INLINE void set_table(const Panels& w, uint8_t (&table)[16]) {
    for (int i = 0; i < 16 && w.table; ++i)
        table[i] = static_cast<uint8_t>(
            128 + static_cast<int>(w.table[i] * 127.0f + (w.table[i] < 0 ? -0.5f : 0.5f)));
}

template <int kKind, class Item>
int whole_product(const Panels& w, const Item* x, const Item* bias, Item* y, int64_t tokens, int threads) {
    const int64_t groups = num_groups(w), panels = num_panels(w);
    const int64_t block = tokens < kManyTokens ? tokens : kManyTokens;
    const int64_t sums_bytes = block * kTilePanels * kLanes * 4;
    if (is_small(panels * panel_bytes(w), tokens)) threads = 1;
    const int64_t rounded_bytes = RoundedMemory(nullptr, w, tokens, 1).bytes;
    char* memory = static_cast<char*>(hanok_scratch(rounded_bytes + threads * sums_bytes));
    if (!memory) return 1;
    const Rounded rounded = RoundedMemory(memory, w, tokens, 1).rounded;
    uint8_t table[16] = {};
    set_table(w, table);
    round_rows<false>(w, x, tokens, rounded, threads);
    // A chunk's weights are 8 KiB a panel, in 8 bits and in 4: they stay in the first cache.
    const int64_t chunk_columns = is_4_bit(kKind) ? 1024 : 512;
    const int64_t chunk =
        tokens <= kFewTokens || chunk_columns <= w.group_columns ? groups : chunk_columns / w.group_columns;
    // Long runs of memory for each thread, and four pieces for each, so that none waits long at the end.
    int64_t length = tokens <= kFewTokens ? panels / (4 * threads) / kTilePanels * kTilePanels : 0;
    length = length < kTilePanels ? kTilePanels : length > kMostPanelsPerPiece ? kMostPanelsPerPiece : length;
    const int64_t lengths = ceil_div(panels, length);
    share(threads, lengths * ceil_div(tokens, block), [&](int64_t piece, int worker) {
        float* sums = reinterpret_cast<float*>(memory + rounded_bytes + worker * sums_bytes);
        const int64_t token = piece / lengths * block, begin = piece % lengths * length;
        const int64_t count = tokens - token < block ? tokens - token : block;
        const int64_t end = begin + length < panels ? begin + length : panels;
        for (int64_t panel = begin; panel < end; panel += kTilePanels) {
            const int here = end - panel < kTilePanels ? 1 : kTilePanels;
            for (int64_t group = 0; group < groups; group += chunk) {
                const int64_t last = group + chunk < groups ? group + chunk : groups;
                if (here == kTilePanels)
                    add_tiles<kKind, kTilePanels>(w, panel, group, last, table, rounded, token, count, sums);
                else
                    add_tiles<kKind, 1>(w, panel, group, last, table, rounded, token, count, sums);
            }
            write_sums<kTilePanels>(sums, here, w, panel, bias, y, token, count);
        }
    });
    return 0;
}

#if MAKES_READY
// sums (tokens, 16) += some groups of a panel, which are ready, times some tokens.
template <int kKind, int kTokens>
INLINE void ready_tile(const Panels& w, int64_t panel, int64_t first_group, int64_t last_group,
                       const uint8_t* ready, const Rounded& x, int64_t token, float* sums) {
    constexpr int kCodeBytes = is_wide(kKind) ? 2 : 1;
    const int64_t blocks = w.group_columns / kBlock, stride = x.columns * kCodeBytes;
    const char* rounded = x.codes + token * stride + first_group * w.group_columns * kCodeBytes;
    for (int64_t group = first_group; group < last_group; ++group) {
        __m256i whole[kTokens][2];
        for (int t = 0; t < kTokens; ++t)
            whole[t][0] = whole[t][1] =
                _mm256_set1_epi32(kKind == kNibbles ? -8 * x.sums[(token + t) * x.groups + group] : 0);
        for (int64_t block = 0; block < blocks; ++block) {
            add_block<kKind, kTokens>(ready, rounded, stride, whole);
            ready += ready_bytes(kKind);
            rounded += kBlock * kCodeBytes;
        }
        const int64_t index = panel * x.groups + group;
        const Floats scale = group_scale<kKind>(w, index);
        for (int t = 0; t < kTokens; ++t) {
            Ints ints;
            for (int part = 0; part < 2; ++part) ints.part[part] = (IntPart)whole[t][part];
            float* to = sums + t * kLanes;
            store(to, add_whole<kKind>(load(to), ints, w, index, scale, x, (token + t) * x.groups + group));
        }
    }
}

template <int kKind, class Item>
int ready_product(const Panels& w, const Item* x, const Item* bias, Item* y, int64_t tokens, int threads) {
    constexpr int64_t kReadyPanels = 4, kBlockTokens = 128, kChunkColumns = 512;
    constexpr bool kWide = is_wide(kKind);
    const int64_t groups = num_groups(w), panels = num_panels(w);
    const int64_t block = tokens < kBlockTokens ? tokens : kBlockTokens;
    const int64_t sums_floats = kReadyPanels * block * kLanes;
    const int64_t ready_size = kChunkColumns / kBlock * ready_bytes(kKind);
    const int64_t worker_bytes = sums_floats * 4 + ready_size;
    if (is_small(panels * panel_bytes(w), tokens)) threads = 1;
    const int64_t rounded_bytes = RoundedMemory(nullptr, w, tokens, kWide ? 2 : 1).bytes;
    char* memory = static_cast<char*>(hanok_scratch(rounded_bytes + threads * worker_bytes));
    if (!memory) return 1;
    const Rounded rounded = RoundedMemory(memory, w, tokens, kWide ? 2 : 1).rounded;
    uint8_t table[16] = {};
    set_table(w, table);
    round_rows<kWide>(w, x, tokens, rounded, threads);
    const int64_t chunk = kChunkColumns / w.group_columns, ranges = ceil_div(panels, kReadyPanels);
    share(threads, ranges * ceil_div(tokens, block), [&](int64_t piece, int worker) {
        float* sums = reinterpret_cast<float*>(memory + rounded_bytes + worker * worker_bytes);
        uint8_t* ready = reinterpret_cast<uint8_t*>(sums + sums_floats);
        const int64_t token = piece / ranges * block, begin = piece % ranges * kReadyPanels;
        const int64_t count = tokens - token < block ? tokens - token : block;
        const int64_t end = begin + kReadyPanels < panels ? begin + kReadyPanels : panels;
        for (int64_t i = 0; i < sums_floats; i += kLanes) store(sums + i, Floats::all(0.0f));
        for (int64_t group = 0; group < groups; group += chunk) {
            const int64_t last = group + chunk < groups ? group + chunk : groups;
            const int64_t blocks = w.group_columns / kBlock;
            for (int64_t panel = begin; panel < end; ++panel) {
                const uint8_t* codes = w.codes + (panel * groups + group) * blocks * block_bytes(kKind);
                for (int64_t i = 0; i < (last - group) * blocks; ++i) {
                    for (int64_t line = 0; line < block_bytes(kKind); line += 64)
                        __builtin_prefetch(codes + i * block_bytes(kKind) + line + 2048);
                    make_ready<kKind>(codes + i * block_bytes(kKind), table, ready + i * ready_bytes(kKind));
                }
                float* to = sums + (panel - begin) * block * kLanes;
                int64_t t = 0;
                for (; t + kReadyTokens <= count; t += kReadyTokens)
                    ready_tile<kKind, kReadyTokens>(w, panel, group, last, ready, rounded, token + t,
                                                    to + t * kLanes);
                for (; t + 2 <= count; t += 2)
                    ready_tile<kKind, 2>(w, panel, group, last, ready, rounded, token + t, to + t * kLanes);
                for (; t < count; ++t)
                    ready_tile<kKind, 1>(w, panel, group, last, ready, rounded, token + t, to + t * kLanes);
            }
        }
        for (int64_t panel = begin; panel < end; ++panel)
            write_sums<1>(sums + (panel - begin) * block * kLanes, 1, w, panel, bias, y, token, count);
    });
    return 0;
}
#endif

// --- x as it is, for few tokens --------------------------------------------------------------------------

// The number of the code in byte `j` of each word, as a float, without the factor that is `float_factor`.
// Codes of 4 bits stand alone in their bytes.
template <int kKind>
INLINE Floats code_value(const Words& words, int j, const Floats& zero, const float* table) {
    if (kKind == kBytes) return to_floats(reinterpret<Ints>(top_byte(words, j) ^ Words::all(0x80000000u)));
    if (kKind == kFloat8) {
        const Words top = top_byte(words, j);
        return reinterpret<Floats>((top & Words::all(0x80000000u)) | ((top & Words::all(0x7f000000u)) >> 4));
    }
    const Ints code = reinterpret<Ints>((words >> (8 * j)) & Words::all(0xffu));
    if (kKind == kNibbles) return to_floats(code - Ints::all(8));
    if (has_zero(kKind)) return to_floats(code) - zero;
    int32_t items[kLanes];
    float values[kLanes];
    code.store(items);
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = table[items[lane]];
    return load(values);
}
constexpr float float_factor(int kind) { return kind == kBytes ? 0x1p-24f : kind == kFloat8 ? 0x1p120f : 1.0f; }

// Four sums for each token, one for each byte of the words, so that additions do not wait for each other.
template <int kKind, int kTokens>
INLINE void add_four(const Words& words, const Floats& zero, const float* table, const float* x,
                     int64_t stride, Floats (&parts)[4][kTokens]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const Floats value = code_value<kKind>(words, j, zero, table);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
            parts[j][t] = add_product(parts[j][t], value, Floats::all(x[t * stride + j]));
    }
}

// A group of a panel times some tokens, which are `stride` numbers apart.
template <int kKind, int kTokens>
INLINE void float_tile(const uint8_t* codes, const Floats& zero, const float* table, const float* x,
                       int64_t stride, int64_t columns, Floats (&total)[kTokens]) {
    Floats parts[4][kTokens];
    for (int j = 0; j < 4; ++j)
        for (int t = 0; t < kTokens; ++t) parts[j][t] = Floats::all(0.0f);
    if constexpr (is_4_bit(kKind)) {
        for (int64_t column = 0; column < columns; column += kBlock)
            for (int j = 0; j < 4; ++j, codes += kVectorBytes) {
                if (kTokens <= 2) __builtin_prefetch(codes + 2048);
                const Words words = Words::load(codes), mask = Words::all(0x0f0f0f0fu);
                const float* from = x + column + 4 * j;
                add_four<kKind>(words & mask, zero, table, from, stride, parts);
                add_four<kKind>((words >> 4) & mask, zero, table, from + 16, stride, parts);
            }
    } else {
        for (int64_t column = 0; column < columns; column += 4) {
            const uint8_t* from = codes + column / 4 * kVectorBytes;
            if (kTokens <= 2) __builtin_prefetch(from + 2048);
            add_four<kKind>(Words::load(from), zero, table, x + column, stride, parts);
        }
    }
    for (int t = 0; t < kTokens; ++t)
        total[t] = (parts[0][t] + parts[1][t]) + (parts[2][t] + parts[3][t]);
}

template <int kKind, int kTokens, class Item>
INLINE void float_panel(const Panels& w, int64_t panel, const float* x, const Item* bias, Item* y) {
    const int64_t groups = num_groups(w), stride = groups * w.group_columns;
    const int64_t group_bytes = w.group_columns / kBlock * block_bytes(kKind);
    const uint8_t* codes = w.codes + panel * groups * group_bytes;
    const Floats factor = Floats::all(float_factor(kKind));
    Floats total[kTokens];
    for (int t = 0; t < kTokens; ++t) total[t] = Floats::all(0.0f);
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t index = panel * groups + group;
        const Floats zero = has_zero(kKind) ? load_zero(w, index) : Floats::all(0.0f);
        const Floats scale = load_scale(w, index);
        Floats sums[kTokens];
        float_tile<kKind, kTokens>(codes + group * group_bytes, zero, w.table, x + group * w.group_columns,
                                   stride, w.group_columns, sums);
        for (int t = 0; t < kTokens; ++t) {
            const Floats value = sums[t] * factor * scale;  // a scale of 256 times 2^120 would be infinite
            total[t] = group ? total[t] + value : value;
        }
    }
    const int64_t row = panel * kLanes, there = w.rows - row;
    for (int t = 0; t < kTokens; ++t) {
        Floats value = total[t];
        if (bias) value = value + load_first(bias + row, there);
        store_first(y + t * w.rows + row, value, there);
    }
}

template <int kKind, class Item>
int float_product(const Panels& w, const Item* x, const Item* bias, Item* y, int64_t tokens, int threads) {
    const int64_t columns = num_groups(w) * w.group_columns, panels = num_panels(w);
    float* wide = static_cast<float*>(hanok_scratch(tokens * columns * 4));
    if (!wide) return 1;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < columns; i += kLanes) {
            const Floats value =
                i < w.columns ? load_first(x + t * w.columns + i, w.columns - i) : Floats::all(0.0f);
            store(wide + t * columns + i, value);
        }
    share(is_small(panels * panel_bytes(w), tokens) ? 1 : threads, panels, [&](int64_t panel, int) {
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            float_panel<kKind, 4>(w, panel, wide + t * columns, bias, y + t * w.rows);
        for (; t + 2 <= tokens; t += 2)
            float_panel<kKind, 2>(w, panel, wide + t * columns, bias, y + t * w.rows);
        for (; t < tokens; ++t)
            float_panel<kKind, 1>(w, panel, wide + t * columns, bias, y + t * w.rows);
    });
    return 0;
}

// However many tokens: the sums are of the same whole numbers, so which way they are formed never shows.
template <int kKind, class Item>
int best_product(const Panels& w, const Item* x, const Item* bias, Item* y, int64_t tokens, int threads) {
#if MAKES_READY
    if (tokens > kTileTokens) return ready_product<kKind>(w, x, bias, y, tokens, threads);
#endif
    return whole_product<kKind>(w, x, bias, y, tokens, threads);
}

template <class Item>
int product_of(const Panels& w, const void* x_, const void* bias_, void* y_, int64_t tokens, int threads) {
    const Item* x = static_cast<const Item*>(x_);
    const Item* bias = static_cast<const Item*>(bias_);
    Item* y = static_cast<Item*>(y_);
    if (w.rounds_x) switch (w.kind) {
            case kBytes: return best_product<kBytes>(w, x, bias, y, tokens, threads);
            case kNibbles: return best_product<kNibbles>(w, x, bias, y, tokens, threads);
            case kZeroNibbles: return best_product<kZeroNibbles>(w, x, bias, y, tokens, threads);
            default: return best_product<kTable>(w, x, bias, y, tokens, threads);
        }
    switch (w.kind) {
        case kBytes: return float_product<kBytes>(w, x, bias, y, tokens, threads);
        case kNibbles: return float_product<kNibbles>(w, x, bias, y, tokens, threads);
        case kZeroNibbles: return float_product<kZeroNibbles>(w, x, bias, y, tokens, threads);
        case kTable: return float_product<kTable>(w, x, bias, y, tokens, threads);
        case kZeroBytes: return float_product<kZeroBytes>(w, x, bias, y, tokens, threads);
        default: return float_product<kFloat8>(w, x, bias, y, tokens, threads);
    }
}

[[maybe_unused]] int product(const Panels* weight, const void* x, const void* bias, void* y, int64_t tokens, int type,
            int threads) {
    if (type == kFloat32) return product_of<float>(*weight, x, bias, y, tokens, threads);
    return product_of<uint16_t>(*weight, x, bias, y, tokens, threads);
}

}  // namespace
