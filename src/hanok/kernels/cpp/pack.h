// Rows of floats or of codes to panels of codes, and back. Lanes are rows: every sum over a group is sixteen
// at once.
//
// Each quantizer does what `quantize` of a method does (quant/int8.py, int4.py, nf4.py, fp8.py), with the
// numbers that are stated there; where those add floats, the order of additions differs and a code may
// differ with it.

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

// Each of these makes codes of a group's values, in place, and stores its scale.
INLINE void round_bytes(Floats* values, int64_t count, uint16_t* scale, float limit) {
    const Floats stored = as_stored_float16(largest_magnitude(values, count) / Floats::all(limit), scale);
    const Floats factor = inverse(stored);
    for (int64_t i = 0; i < count; ++i)
        values[i] = between(nearest(values[i] * factor), -limit, limit) + Floats::all(128.0f);
}

INLINE Floats nibble(const Floats& value, const Floats& factor) {
    return between(nearest(value * factor), -8.0f, 7.0f);
}

INLINE void round_nibbles(Floats* values, int64_t count, uint16_t* scale, const float* levels,
                          int64_t num_levels) {
    Floats peak = values[0];
    for (int64_t i = 1; i < count; ++i)
        peak = choose(is_larger(absolute(values[i]), absolute(peak)), values[i], peak);
    Floats best = Floats::all(0.0f), best_error = Floats::all(0.0f);
    for (int64_t candidate = 0; candidate < num_levels; ++candidate) {
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

INLINE Floats float8(const Floats& value, const Floats& factor, float limit) {
    const Floats kept = between(value * factor, -limit, limit);
    const Words sign = (reinterpret<Words>(kept) >> 24) & Words::all(0x80u);
    const Words words = reinterpret<Words>(absolute(kept) * Floats::all(1.0f / float_factor(kFloat8)));
    const Words rounded = (words + Words::all(0x7ffffu) + ((words >> 20) & Words::all(1u))) >> 20;
    return to_floats(reinterpret<Ints>(rounded | sign));
}

struct Rule {
    int quantizer;
    const float* numbers;
    int64_t num_numbers;
};

template <class Item>
void pack_groups(const Panels& w, int64_t panel, const Item* rows, int64_t num_rows, const Rule& rule) {
    const int64_t groups = num_groups(w), count = w.group_columns;
    uint8_t* codes = w.codes + panel * panel_bytes(w);
    Floats values[kMostGroupColumns];
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t i = 0; i < count; i += kLanes)
            load_columns(rows, num_rows, w.columns, group * count + i, values + i);
        const int64_t index = (panel * groups + group) * kLanes;
        uint16_t* half_scale = static_cast<uint16_t*>(w.scale) + index;
        if (rule.quantizer == kRoundToTable)
            round_to_table(values, count, static_cast<float*>(w.scale) + index, w.table);
        else if (rule.quantizer == kRoundInt8)
            round_bytes(values, count, half_scale, rule.numbers[0]);
        else if (w.kind == kZeroNibbles)
            round_zero_nibbles(values, count, half_scale, static_cast<uint8_t*>(w.zero) + index);
        else
            round_nibbles(values, count, half_scale, rule.numbers, rule.num_numbers);
        for (int64_t i = 0; i < count; i += kBlock, codes += block_bytes(w.kind))
            store_block(w.kind, values + i, codes);
    }
}

template <class Item>
void pack_rows(const Panels& w, int64_t panel, const Item* rows, int64_t num_rows, float limit) {
    uint8_t* codes = w.codes + panel * panel_bytes(w);
    Floats values[kBlock], most = Floats::all(0.0f);
    for (int64_t i = 0; i < w.columns; i += kLanes) {
        load_columns(rows, num_rows, w.columns, i, values);
        most = larger_magnitude(most, largest_magnitude(values, kLanes));
    }
    store(static_cast<float*>(w.scale) + panel * kLanes, most / Floats::all(limit));
    const Floats factor = inverse(most) * Floats::all(limit);
    for (int64_t i = 0; i < w.group_columns; i += kBlock, codes += block_bytes(w.kind)) {
        load_columns(rows, num_rows, w.columns, i, values);
        load_columns(rows, num_rows, w.columns, i + kLanes, values + kLanes);
        for (int c = 0; c < kBlock; ++c)
            values[c] = w.kind == kBytes
                            ? between(nearest(values[c] * factor), -limit, limit) + Floats::all(128.0f)
                            : float8(values[c], factor, limit);
        store_block(w.kind, values, codes);
    }
}

template <class Item>
void pack_panels(const Panels& w, int64_t start, int64_t count, const Item* rows, const Rule& rule) {
    const bool has_whole_rows =
        rule.quantizer == kRoundFloat8 || (rule.quantizer == kRoundInt8 && w.scale_type == kFloat32);
    for (int64_t row = 0; row < count; row += kLanes) {
        const int64_t panel = (start + row) / kLanes;
        const int64_t there = count - row < kLanes ? count - row : kLanes;
        const Item* from = rows + row * w.columns;
        if (has_whole_rows)
            pack_rows(w, panel, from, there, rule.numbers[0]);
        else
            pack_groups(w, panel, from, there, rule);
    }
}

int pack(const Panels* weight, int64_t start, int64_t count, const void* rows, int type, int quantizer,
         const float* numbers, int64_t num_numbers) {
    const Rule rule = {quantizer, numbers, num_numbers};
    if (type == kFloat32)
        pack_panels(*weight, start, count, static_cast<const float*>(rows), rule);
    else
        pack_panels(*weight, start, count, static_cast<const uint16_t*>(rows), rule);
    return 0;
}

// Codes as a record has them, one in each byte, row after row.
int pack_codes(const Panels* weight, int64_t start, int64_t count, const uint8_t* codes) {
    const Panels& w = *weight;
    const uint8_t flip = w.kind == kBytes ? 0x80 : w.kind == kNibbles ? 8 : 0;  // of signed to unsigned
    uint8_t block[kBlock];
    for (int64_t row = 0; row < ceil_div(count, kLanes) * kLanes; ++row) {
        uint8_t* to = w.codes + (start + row) / kLanes * panel_bytes(w) + row % kLanes * 4;
        for (int64_t first = 0; first < num_groups(w) * w.group_columns; first += kBlock) {
            const int64_t there = row < count ? w.columns - first : 0;
            for (int64_t c = 0; c < kBlock; ++c)
                block[c] = static_cast<uint8_t>((c < there ? codes[row * w.columns + first + c] : 0) ^ flip);
            for (int64_t j = 0; j < block_bytes(w.kind) / kVectorBytes; ++j)
                for (int64_t c = 4 * j; c < 4 * j + 4; ++c) {
                    const int high = is_4_bit(w.kind) ? block[c + 16] << 4 : 0;
                    to[j * kVectorBytes + c % 4] =
                        static_cast<uint8_t>(is_4_bit(w.kind) ? (block[c] & 15) | high : block[c]);
                }
            to += block_bytes(w.kind);
        }
    }
    return 0;
}

// --- back ---------------------------------------------------------------------------------------------

// The numbers of a stored code in byte `j` of each word, before the scale; nibbles are in the low half.
INLINE Floats number(const Panels& w, const Words& words, int j, const Floats& zero) {
    switch (w.kind) {
        case kBytes: return code_value<kBytes>(words, j, zero, w.table) * Floats::all(float_factor(kBytes));
        case kFloat8: return code_value<kFloat8>(words, j, zero, w.table) * Floats::all(float_factor(kFloat8));
        case kNibbles: return code_value<kNibbles>(words, j, zero, w.table);
        case kTable: return code_value<kTable>(words, j, zero, w.table);
        default: return code_value<kZeroBytes>(words, j, zero, w.table);
    }
}

// Sixteen columns from `first`, a multiple of 16, of a panel: one lane for each row.
INLINE void numbers_of(const Panels& w, int64_t panel, int64_t first, Floats* values) {
    const int64_t index = panel * num_groups(w) + first / w.group_columns;
    const Floats scale = load_scale(w, index);
    const Floats zero = has_zero(w.kind) ? load_zero(w, index) : Floats::all(0.0f);
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
