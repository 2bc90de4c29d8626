// Rows of floats to panels of codes, and back. Lanes are rows: every sum over a group is sixteen at once.
//
// The numbers are those of `quant/int8.py`, `int4.py`, `nf4.py` and `fp8.py`, which explain them; where
// those add floats, the order of additions differs and a code may differ with it.

#pragma once

#include "panels.h"

namespace {

// 0 where the value is infinite or no number.
INLINE Floats finite(const Floats& v) {
    const Words magnitude = reinterpret<Words>(v) & Words::all(0x7f800000u);
    Floats kept;
    FOR_PARTS kept.part[i] = magnitude.part[i] != 0x7f800000u ? v.part[i] : FloatPart{};
    return kept;
}
INLINE Floats inverse(const Floats& v) { return finite(Floats::all(1.0f) / v); }

INLINE Floats between(const Floats& v, float low, float high) {
    return smaller(larger(v, Floats::all(low)), Floats::all(high));
}

INLINE Floats as_stored_float16(const Floats& v, uint16_t* place) {
    store_float16(place, v);
    return load_float16(place);
}

// Columns [first, first + 16) of up to 16 rows: to[c] has one lane for each row.
template <class Item>
INLINE void load_columns(const Item* rows, int64_t num_rows, int64_t columns, int64_t first, Floats* to) {
    Words words[kLanes];
    for (int r = 0; r < kLanes; ++r)
        words[r] = r < num_rows && first < columns
                       ? reinterpret<Words>(load_first(rows + r * columns + first, columns - first))
                       : Words::all(0);
    transpose(words);
    for (int c = 0; c < kLanes; ++c) to[c] = reinterpret<Floats>(words[c]);
}

// codes: one for each column of a block, in whole floats that are not negative.
INLINE void store_block(int kind, const Floats* codes, uint8_t* to) {
    auto four = [&](int column) {
        Words word = Words::all(0);
        for (int byte = 0; byte < 4; ++byte)
            word = word | (reinterpret<Words>(nearest_ints(codes[column + byte])) << (8 * byte));
        return word;
    };
    if (is_4_bit(kind)) {
        for (int j = 0; j < 4; ++j) {
            const Words word = four(4 * j) | (four(16 + 4 * j) << 4);
            word.store(to + j * kVectorBytes);
        }
    } else {
        for (int j = 0; j < 8; ++j) {
            const Words word = four(4 * j);
            word.store(to + j * kVectorBytes);
        }
    }
}

INLINE Floats largest_magnitude(const Floats* values, int64_t count) {
    Floats most = Floats::all(0.0f);
    for (int64_t i = 0; i < count; ++i) most = larger_magnitude(most, values[i]);
    return most;
}

// Each of these turns a group's values into codes, in place, and stores its scale.
INLINE void round_bytes(Floats* values, int64_t count, uint16_t* scale) {
    const Floats stored =
        as_stored_float16(largest_magnitude(values, count) / Floats::all(127.0f), scale);
    const Floats factor = inverse(stored);
    for (int64_t i = 0; i < count; ++i)
        values[i] = between(nearest(values[i] * factor), -127.0f, 127.0f) + Floats::all(128.0f);
}

INLINE Floats nibble(const Floats& value, const Floats& factor) {
    return between(nearest(value * factor), -8.0f, 7.0f);
}

INLINE void round_nibbles(Floats* values, int64_t count, uint16_t* scale) {
    Floats peak = values[0];
    for (int64_t i = 1; i < count; ++i)
        peak = choose(is_larger(absolute(values[i]), absolute(peak)), values[i], peak);
    Floats best = Floats::all(0.0f), best_error = Floats::all(0.0f);
    const float levels[] = {6.8f, 7.4f, 8.0f, 8.6f, 9.2f};
    for (int candidate = 0; candidate < 5; ++candidate) {
        Floats factor = inverse(peak / Floats::all(-levels[candidate]));
        Floats squares = Floats::all(0.0f), products = Floats::all(0.0f);
        for (int64_t i = 0; i < count; ++i) {
            const Floats code = nibble(values[i], factor);
            squares = add_product(squares, code, code);
            products = add_product(products, values[i], code);
        }
        const Floats refitted = as_stored_float16(finite(products / squares), scale);
        factor = inverse(refitted);
        Floats error = Floats::all(0.0f);
        for (int64_t i = 0; i < count; ++i) {
            const Floats rest = values[i] - nibble(values[i], factor) * refitted;
            error = add_product(error, rest, rest);
        }
        const Ints is_better = is_larger(best_error, error);
        best = candidate ? choose(is_better, refitted, best) : refitted;
        best_error = candidate ? choose(is_better, error, best_error) : error;
    }
    const Floats factor = inverse(as_stored_float16(best, scale));
    for (int64_t i = 0; i < count; ++i) values[i] = nibble(values[i], factor) + Floats::all(8.0f);
}

INLINE void round_zero_nibbles(Floats* values, int64_t count, uint16_t* scale, uint8_t* zeros) {
    Floats low = Floats::all(0.0f), high = Floats::all(0.0f);
    for (int64_t i = 0; i < count; ++i) {
        low = smaller(low, values[i]);
        high = larger(high, values[i]);
    }
    const Floats factor = inverse(as_stored_float16((high - low) / Floats::all(15.0f), scale));
    const Floats zero = between(nearest(Floats::all(0.0f) - low * factor), 0.0f, 15.0f);
    store_bytes(reinterpret_cast<int8_t*>(zeros), nearest_ints(zero));
    for (int64_t i = 0; i < count; ++i)
        values[i] = between(nearest(values[i] * factor) + zero, 0.0f, 15.0f);
}

INLINE void round_to_table(Floats* values, int64_t count, float* scale, const float* table) {
    const Floats most = largest_magnitude(values, count);
    store(scale, most);
    const Floats factor = inverse(most);
    for (int64_t i = 0; i < count; ++i) {
        const Floats value = values[i] * factor;
        Ints index = Ints::all(0);
        for (int entry = 0; entry < 15; ++entry)
            index = index - is_larger(value, Floats::all((table[entry] + table[entry + 1]) / 2));
        values[i] = to_floats(index);
    }
}

INLINE Floats float8(const Floats& value, const Floats& factor) {
    const Floats kept = between(value * factor, -448.0f, 448.0f);
    const Words sign = (reinterpret<Words>(kept) >> 24) & Words::all(0x80u);
    const Words words = reinterpret<Words>(absolute(kept) * Floats::all(1.0f / float_factor(kRowFloat8)));
    const Words rounded = (words + Words::all(0x7ffffu) + ((words >> 20) & Words::all(1u))) >> 20;
    return to_floats(reinterpret<Ints>(rounded | sign));
}

template <class Item>
void pack_groups(const Panels& w, int64_t panel, const Item* rows, int64_t num_rows) {
    const int64_t groups = num_groups(w), count = w.group_columns;
    uint8_t* codes = w.codes + panel * panel_bytes(w);
    Floats values[kMostGroupColumns];
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t i = 0; i < count; i += kLanes)
            load_columns(rows, num_rows, w.columns, group * count + i, values + i);
        const int64_t index = (panel * groups + group) * kLanes;
        uint16_t* half_scale = static_cast<uint16_t*>(w.scale) + index;
        switch (w.kind) {
            case kBytes: round_bytes(values, count, half_scale); break;
            case kNibbles: round_nibbles(values, count, half_scale); break;
            case kZeroNibbles: round_zero_nibbles(values, count, half_scale, w.zero + index); break;
            default: round_to_table(values, count, static_cast<float*>(w.scale) + index, w.table);
        }
        for (int64_t i = 0; i < count; i += kBlock, codes += block_bytes(w.kind))
            store_block(w.kind, values + i, codes);
    }
}

template <class Item>
void pack_rows(const Panels& w, int64_t panel, const Item* rows, int64_t num_rows) {
    uint8_t* codes = w.codes + panel * panel_bytes(w);
    Floats values[kBlock], most = Floats::all(0.0f);
    for (int64_t i = 0; i < w.columns; i += kLanes) {
        load_columns(rows, num_rows, w.columns, i, values);
        most = larger_magnitude(most, largest_magnitude(values, kLanes));
    }
    const float limit = w.kind == kRowBytes ? 127.0f : 448.0f;
    store(static_cast<float*>(w.scale) + panel * kLanes, most / Floats::all(limit));
    const Floats factor = inverse(most) * Floats::all(limit);
    for (int64_t i = 0; i < w.group_columns; i += kBlock, codes += block_bytes(w.kind)) {
        load_columns(rows, num_rows, w.columns, i, values);
        load_columns(rows, num_rows, w.columns, i + kLanes, values + kLanes);
        for (int c = 0; c < kBlock; ++c)
            values[c] = w.kind == kRowBytes
                            ? between(nearest(values[c] * factor), -127.0f, 127.0f) + Floats::all(128.0f)
                            : float8(values[c], factor);
        store_block(w.kind, values, codes);
    }
}

template <class Item>
void pack_panels(const Panels& w, int64_t start, int64_t count, const Item* rows) {
    for (int64_t row = 0; row < count; row += kLanes) {
        const int64_t panel = (start + row) / kLanes;
        const int64_t there = count - row < kLanes ? count - row : kLanes;
        const Item* from = rows + row * w.columns;
        if (w.kind == kRowBytes || w.kind == kRowFloat8)
            pack_rows(w, panel, from, there);
        else
            pack_groups(w, panel, from, there);
    }
}

int pack(const Panels* weight, int64_t start, int64_t count, const void* rows, int type) {
    if (type == kFloat32)
        pack_panels(*weight, start, count, static_cast<const float*>(rows));
    else
        pack_panels(*weight, start, count, static_cast<const uint16_t*>(rows));
    return 0;
}

// --- back ---------------------------------------------------------------------------------------------

// The numbers of a stored code in byte `j` of each word, before the scale; nibbles are in the low half.
INLINE Floats number(const Panels& w, const Words& words, int j, const Floats& zero) {
    if (w.kind == kRowBytes) return byte_value<kRowBytes>(words, j) * Floats::all(float_factor(kRowBytes));
    if (w.kind == kRowFloat8) return byte_value<kRowFloat8>(words, j) * Floats::all(float_factor(kRowFloat8));
    const Ints code = reinterpret<Ints>((words >> (8 * j)) & Words::all(0xffu));
    if (w.kind == kBytes) return to_floats(code - Ints::all(128));
    if (w.kind == kNibbles) return to_floats(code - Ints::all(8));
    if (w.kind == kZeroNibbles) return to_floats(code) - zero;
    int32_t items[kLanes];
    float values[kLanes];
    code.store(items);
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = w.table[items[lane]];
    return load(values);
}

INLINE Floats any_scale(const Panels& w, int64_t index) {
    return has_half_scale(w.kind) ? load_scale<kBytes>(w, index) : load_scale<kRowBytes>(w, index);
}

// Sixteen columns from `first`, a multiple of 16, of a panel: one lane for each row.
INLINE void numbers_of(const Panels& w, int64_t panel, int64_t first, Floats* values) {
    const int64_t index = panel * num_groups(w) + first / w.group_columns;
    const Floats scale = any_scale(w, index);
    const Floats zero = w.kind == kZeroNibbles ? load_bytes(w.zero + index * kLanes) : Floats::all(0.0f);
    const uint8_t* codes =
        w.codes + panel * panel_bytes(w) + first / kBlock * block_bytes(w.kind);
    const bool is_second = first % kBlock != 0;
    for (int j = 0; j < 4; ++j) {
        const int vector = is_second && !is_4_bit(w.kind) ? j + 4 : j;
        Words words = Words::load(codes + vector * kVectorBytes);
        if (is_4_bit(w.kind)) words = (is_second ? words >> 4 : words) & Words::all(0x0f0f0f0fu);
        for (int byte = 0; byte < 4; ++byte)
            values[4 * j + byte] = number(w, words, byte, zero) * scale;
    }
}

int unpack(const Panels* weight, int64_t start, int64_t count, float* rows, int threads) {
    const Panels& w = *weight;
    const int64_t panels = ceil_div(count, kLanes);
    share(threads, panels, [&](int64_t p, int) {
        const int64_t there = count - p * kLanes < kLanes ? count - p * kLanes : kLanes;
        for (int64_t column = 0; column < w.columns; column += kLanes) {
            Floats values[kLanes];
            Words words[kLanes];
            numbers_of(w, start / kLanes + p, column, values);
            for (int c = 0; c < kLanes; ++c) words[c] = reinterpret<Words>(values[c]);
            transpose(words);
            for (int64_t r = 0; r < there; ++r)
                store_first(rows + (p * kLanes + r) * w.columns + column, reinterpret<Floats>(words[r]),
                            w.columns - column);
        }
    });
    return 0;
}

template <class Item>
INLINE void look_up_rows(const Panels& w, const int64_t* ids, int64_t count, Item* rows) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t column = 0; column < w.columns; column += kLanes) {
            Floats values[kLanes];
            Words words[kLanes];
            numbers_of(w, ids[i] / kLanes, column, values);
            for (int c = 0; c < kLanes; ++c) words[c] = reinterpret<Words>(values[c]);
            transpose(words);
            store_first(rows + i * w.columns + column, reinterpret<Floats>(words[ids[i] % kLanes]),
                        w.columns - column);
        }
}

int look_up(const Panels* weight, const int64_t* ids, int64_t count, void* rows, int type) {
    if (type == kFloat32)
        look_up_rows(*weight, ids, count, static_cast<float*>(rows));
    else
        look_up_rows(*weight, ids, count, static_cast<uint16_t*>(rows));
    return 0;
}

}  // namespace
