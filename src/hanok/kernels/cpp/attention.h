// Attention over keys and values as the cache keeps them, for any number of queries.
//
// The rows of a task are the queries of some neighbouring tokens in the heads that share a KV head, so keys
// and values are read once for all of them. Keys are taken a split at a time: scores of all its keys, their
// softmax, the weighted values. Splits are merged in order as in an online softmax (arXiv 1805.02867), and
// shared out among threads where queries are few. Keys are transposed tile by tile so that lanes are keys:
// scores then need no sums across lanes. A token's result depends on its own keys alone: not on threads,
// nor on the other tokens of the batch.

#pragma once

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

constexpr int64_t kSplit = 1024;      // keys
constexpr int64_t kFewQueries = 8;    // of a sequence: up to here its keys are shared out, else its queries
constexpr int64_t kTileKeys = 64;     // transposed at a time
constexpr int64_t kTaskRows = 64;
constexpr int64_t kSharedProducts = 1 << 19;  // less is done before another thread is awake
constexpr int64_t kAppendedTokens = 64;       // by a piece
constexpr float kLowest = -1e30f;     // below every score; minus infinity less itself is NaN

// Rows and vectors of a tile: as many sums as there are registers for, beside what they are made of.
#if REGISTER_BYTES == 64
constexpr int kTileRows = 4, kTileVectors = 4;
#elif REGISTER_BYTES == 32
constexpr int kTileRows = 2, kTileVectors = 2;
#else
constexpr int kTileRows = 1, kTileVectors = 2;
#endif

struct Sizes {
    int64_t dim, padded_dim, group, task_tokens, task_rows;
};

INLINE Sizes sizes_of(const Attention& a) {
    Sizes s;
    s.dim = a.head_dim;
    s.padded_dim = (a.head_dim + kLanes - 1) / kLanes * kLanes;
    s.group = a.num_heads / a.num_kv_heads;
    s.task_tokens = s.group >= kTaskRows ? 1 : kTaskRows / s.group;
    s.task_rows = s.task_tokens * s.group;
    return s;
}

// A thread's memory, in floats, each part a multiple of 16.
struct Work {
    float *q, *keys, *values, *scores, *key_scale, *value_scale;
};

INLINE int64_t rows_floats(const Sizes& s) { return (s.task_rows + kLanes - 1) / kLanes * kLanes; }
INLINE int64_t work_floats(const Sizes& s) {
    return s.task_rows * (s.padded_dim + kSplit) + 2 * kTileKeys * s.padded_dim + 2 * kSplit;
}
INLINE Work work_at(float* memory, const Sizes& s) {
    Work w;
    w.q = memory;
    w.keys = w.q + s.task_rows * s.padded_dim;
    w.values = w.keys + kTileKeys * s.padded_dim;
    w.scores = w.values + kTileKeys * s.padded_dim;
    w.key_scale = w.scores + s.task_rows * kSplit;
    w.value_scale = w.key_scale + kSplit;
    return w;
}

// A part of a softmax: the largest score, the sum of e^(score - largest), and the values weighted so.
struct Part {
    float *peak, *total, *output;  // (rows), (rows), (rows, padded_dim)
};

INLINE void clear(const Part& part, int64_t rows, int64_t padded_dim) {
    for (int64_t r = 0; r < rows; ++r) part.peak[r] = kLowest, part.total[r] = 0;
    for (int64_t i = 0; i < rows * padded_dim; i += kLanes) store(part.output + i, Floats::all(0.0f));
}

INLINE float scalar_exponential(float v) {
    float lanes[kLanes];
    exponential(Floats::all(v)).store(lanes);
    return lanes[0];
}

INLINE void merge(const Part& into, const Part& from, int64_t rows, int64_t padded_dim) {
    for (int64_t r = 0; r < rows; ++r) {
        const float peak = from.peak[r] > into.peak[r] ? from.peak[r] : into.peak[r];
        const float ours = scalar_exponential(into.peak[r] - peak);
        const float theirs = scalar_exponential(from.peak[r] - peak);
        into.peak[r] = peak;
        into.total[r] = into.total[r] * ours + from.total[r] * theirs;
        for (int64_t i = r * padded_dim; i < (r + 1) * padded_dim; i += kLanes)
            store(into.output + i, load(into.output + i) * Floats::all(ours) +
                                       load(from.output + i) * Floats::all(theirs));
    }
}

// Memory that will be read next, asked for line by line, evenly, while something else is computed: a core
// can only wait for some lines at a time.
struct Ahead {
    const char* next;
    const char* end;
    const char* due;
    int64_t step;  // bytes for each turn

    template <class Item>
    static INLINE Ahead of(const Item* from, int64_t items, int64_t turns) {
        const char* next = reinterpret_cast<const char*>(from);
        const int64_t bytes = items * static_cast<int64_t>(sizeof(Item));
        return {next, next + bytes, next, bytes / (turns > 0 ? turns : 1) + 1};
    }
    INLINE void ask(int64_t turns) {
        due += step * turns;
        const char* until = due < end ? due : end;
        for (; next < until; next += 64) __builtin_prefetch(next, 0, 2);
    }
};
constexpr int64_t kTurnsOfTranspose = 12;  // of the loops over dimensions, in the time that one takes

// Keys [0, count) of a tile to (dim, kTileKeys): lanes are keys, zeros where there are none.
template <class Item>
INLINE void transpose_keys(const Item* keys, int64_t stride, int64_t count, const Sizes& s, float* to,
                      Ahead& ahead) {
    for (int64_t first = 0; first < kTileKeys; first += kLanes)
        for (int64_t dim = 0; dim < s.dim; dim += kLanes) {
            ahead.ask(kTurnsOfTranspose);
            Words words[kLanes];
            for (int key = 0; key < kLanes; ++key)
                words[key] = first + key < count
                                 ? reinterpret<Words>(load_first(keys + (first + key) * stride + dim, s.dim - dim))
                                 : Words::all(0);
            transpose(words);
            for (int d = 0; d < kLanes && dim + d < s.dim; ++d)
                store(to + (dim + d) * kTileKeys + first, reinterpret<Floats>(words[d]));
        }
}

// Two neighbouring bfloat16 travel in one word.
INLINE void transpose_keys(const uint16_t* keys, int64_t stride, int64_t count, const Sizes& s, float* to,
                      Ahead& ahead) {
    if (s.dim % (2 * kLanes) != 0) return transpose_keys<uint16_t>(keys, stride, count, s, to, ahead);
    for (int64_t first = 0; first < kTileKeys; first += kLanes)
        for (int64_t dim = 0; dim < s.dim; dim += 2 * kLanes) {
            ahead.ask(kTurnsOfTranspose);
            Words words[kLanes];
            for (int key = 0; key < kLanes; ++key) {
                words[key] = Words::all(0);
                if (first + key < count)
                    words[key] = Words::load(keys + (first + key) * stride + dim);
            }
            transpose(words);
            for (int d = 0; d < kLanes; ++d) {
                store(to + (dim + 2 * d) * kTileKeys + first, reinterpret<Floats>(words[d] << 16));
                store(to + (dim + 2 * d + 1) * kTileKeys + first,
                      reinterpret<Floats>(words[d] & Words::all(0xffff0000u)));
            }
        }
}

template <class Item>
INLINE void widen_values(const Item* values, int64_t stride, int64_t count, const Sizes& s, float* to,
                         Ahead& ahead) {
    for (int64_t key = 0; key < count; ++key) {
        ahead.ask(1);
        for (int64_t dim = 0; dim < s.dim; dim += kLanes)
            store(to + key * s.padded_dim + dim, load_first(values + key * stride + dim, s.dim - dim));
    }
}

// Whether values, and so outputs, have the even ones of each 32 columns before the odd ones.
template <class Cached>
INLINE bool is_split(const Sizes& s) {
    return sizeof(Cached) == 2 && s.dim % (2 * kLanes) == 0;
}

// A word holds two neighbouring bfloat16, and becomes two floats without moving anything between lanes.
INLINE void widen_values(const uint16_t* values, int64_t stride, int64_t count, const Sizes& s, float* to,
                         Ahead& ahead) {
    if (!is_split<uint16_t>(s)) return widen_values<uint16_t>(values, stride, count, s, to, ahead);
    for (int64_t key = 0; key < count; ++key) {
        ahead.ask(1);
        for (int64_t dim = 0; dim < s.dim; dim += 2 * kLanes) {
            const Words words = Words::load(values + key * stride + dim);
            float* at = to + key * s.padded_dim + dim;
            store(at, reinterpret<Floats>(words << 16));
            store(at + kLanes, reinterpret<Floats>(words & Words::all(0xffff0000u)));
        }
    }
}

// What the rows see of a split's keys. Positions are counted from the sequence's first key.
struct View {
    int64_t first_key, num_keys;
    int64_t first_position;  // of the task's first token
    int64_t group, window;
    float softcap;
    bool is_scaled;
};

// Scores of `kRows` rows with some vectors of a tile of keys, which is transposed already.
template <int kRows>
INLINE void score_tile(const Sizes& s, const Work& w, int64_t row, int64_t key, int64_t first, Ahead& ahead) {
    constexpr int kVectors = kTileVectors;
    Floats score[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) score[r][v] = Floats::all(0.0f);
    const float* q = w.q + row * s.padded_dim;
    for (int64_t d = 0; d < s.dim; ++d) {
        if (first == 0) ahead.ask(1);
        Floats keys[kVectors];
        for (int v = 0; v < kVectors; ++v) keys[v] = load(w.keys + d * kTileKeys + first + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
            const Floats factor = Floats::all(q[r * s.padded_dim + d]);
            for (int v = 0; v < kVectors; ++v) score[r][v] = add_product(score[r][v], factor, keys[v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
            store(w.scores + (row + r) * kSplit + key + first + v * kLanes, score[r][v]);
}

template <int kRows>
INLINE void score_rows(const Sizes& s, const Work& w, int64_t row, int64_t key, Ahead& ahead) {
    for (int64_t first = 0; first < kTileKeys; first += kTileVectors * kLanes)
        score_tile<kRows>(s, w, row, key, first, ahead);
}

// A row's scores become weights, in place; what the row does not see weighs nothing.
INLINE void weigh_row(const View& view, const Work& w, const Part& part, int64_t row) {
    const int64_t last = view.first_position + row / view.group - view.first_key;  // seen
    const int64_t first = view.window ? last - view.window + 1 : -1;
    const Floats above = Floats::all(static_cast<float>(last < kSplit ? last : kSplit));
    const Floats below = Floats::all(static_cast<float>(first > -1 ? first : -1));
    Ints lanes;
    for (int i = 0; i < kParts; ++i)
        for (int lane = 0; lane < kPartLanes; ++lane) lanes.part[i][lane] = i * kPartLanes + lane;
    auto hidden = [&](int64_t i) {
        const Floats place = to_floats(lanes + Ints::all(static_cast<int32_t>(i)));
        return is_larger(place, above) | is_larger(below, place);
    };
    auto hides = [&](int64_t i) { return i + kLanes - 1 > last || i < first; };
    const bool is_raw = !view.is_scaled && !(view.softcap > 0);
    float* scores = w.scores + row * kSplit;
    Floats peak = Floats::all(kLowest);
    for (int64_t i = 0; i < view.num_keys; i += kLanes) {
        Floats value = load(scores + i);
        if (view.is_scaled) value = value * load(w.key_scale + i);
        if (view.softcap > 0)
            value = Floats::all(view.softcap) * hyperbolic_tangent(value * Floats::all(1.0f / view.softcap));
        if (hides(i)) value = choose(hidden(i), Floats::all(kLowest), value);
        peak = larger(peak, value);
        if (!is_raw) store(scores + i, value);
    }
    const Floats most = Floats::all(largest(peak));
    Floats total = Floats::all(0.0f);
    for (int64_t i = 0; i < view.num_keys; i += kLanes) {
        Floats weight = exponential(load(scores + i) - most);
        if (hides(i)) weight = choose(hidden(i), Floats::all(0.0f), weight);
        total = total + weight;
        store(scores + i, view.is_scaled ? weight * load(w.value_scale + i) : weight);
    }
    part.peak[row] = largest(peak);
    part.total[row] = sum(total);
}

// Some columns of the rows' output += weights x a block of values.
template <int kRows, int kWidth>
INLINE void add_values(const Sizes& s, const Work& w, const Part& part, int64_t row, int64_t column,
                       int64_t key, int64_t count, Ahead& ahead) {
    Floats output[kRows][kWidth];
    for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kWidth; ++i)
            output[r][i] = load(part.output + (row + r) * s.padded_dim + column + i * kLanes);
    const float* weights = w.scores + row * kSplit + key;
    for (int64_t k = 0; k < count; ++k) {
        ahead.ask(1);
        Floats value[kWidth];
        for (int i = 0; i < kWidth; ++i) value[i] = load(w.values + k * s.padded_dim + column + i * kLanes);
        for (int r = 0; r < kRows; ++r) {
            const Floats weight = Floats::all(weights[r * kSplit + k]);
            for (int i = 0; i < kWidth; ++i) output[r][i] = add_product(output[r][i], weight, value[i]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kWidth; ++i)
            store(part.output + (row + r) * s.padded_dim + column + i * kLanes, output[r][i]);
}

template <int kRows>
INLINE void add_all_values(const Sizes& s, const Work& w, const Part& part, int64_t row, int64_t key,
                           int64_t count, Ahead& ahead) {
    int64_t column = 0;
    for (; column + kTileVectors * kLanes <= s.padded_dim; column += kTileVectors * kLanes)
        add_values<kRows, kTileVectors>(s, w, part, row, column, key, count, ahead);
    for (; column < s.padded_dim; column += kLanes)
        add_values<kRows, 1>(s, w, part, row, column, key, count, ahead);
}

// One sequence, one KV head, some tokens.
struct Task {
    int64_t sequence, head, first_token, num_tokens;  // tokens of the sequence's queries
    int64_t query_start;                              // the sequence's first token in the batch
    int64_t past;                                     // keys before its first query
};

// Where a key lies, in items. Tiles begin at multiples of kTileKeys, so none crosses a block.
INLINE int64_t place_of(const Attention& a, int64_t sequence, int64_t head, int64_t key) {
    const int64_t block = a.blocks[a.block_starts[sequence] + key / a.block_keys];
    return block * a.block_stride + head * a.key_head_stride + key % a.block_keys * a.key_token_stride;
}

// Keys [begin, end) of a task, of one split, into `part`, which is clear.
template <class Cached>
INLINE void attend_keys(const Attention& a, const Sizes& s, const Task& task, int64_t begin, int64_t end,
                        const Work& w, const Part& part) {
    const Cached* keys = static_cast<const Cached*>(a.keys);
    const Cached* values = static_cast<const Cached*>(a.values);
    auto place = [&](int64_t key) { return place_of(a, task.sequence, task.head, begin + key); };
    const int64_t rows = task.num_tokens * s.group, stride = a.key_token_stride;
    View view;
    view.first_key = begin;
    view.num_keys = end - begin;
    view.first_position = task.past + task.first_token;
    view.group = s.group;
    view.window = a.window;
    view.softcap = a.softcap;
    view.is_scaled = a.key_scale != nullptr;
    if (view.is_scaled)
        for (int64_t key = 0; key < view.num_keys; key += kTileKeys) {
            const int64_t count = view.num_keys - key < kTileKeys ? view.num_keys - key : kTileKeys;
            for (int64_t i = 0, at = place(key); i < count; ++i, at += stride) {
                w.key_scale[key + i] = a.key_scale[at / a.head_dim];
                w.value_scale[key + i] = a.value_scale[at / a.head_dim];
            }
        }
    // Where one head's keys lie together, the next tile is asked for while this one is computed.
    const bool is_dense = stride == s.dim;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows, tile_items = kTileKeys * s.dim;
    const int64_t transposes = kTileKeys / kLanes * (s.dim / (64 / static_cast<int64_t>(sizeof(Cached))));
    for (int64_t key = 0; key < view.num_keys; key += kTileKeys) {
        const int64_t count = view.num_keys - key < kTileKeys ? view.num_keys - key : kTileKeys;
        const bool is_last = key + kTileKeys >= view.num_keys;
        const Cached* next = is_last ? values + place(0) : keys + place(key + kTileKeys);
        Ahead ahead = Ahead::of(next, is_dense ? tile_items : 0, tiles * s.dim + kTurnsOfTranspose * transposes);
        transpose_keys(keys + place(key), stride, count, s, w.keys, ahead);
        int64_t row = 0;
        for (; row + kTileRows <= rows; row += kTileRows) score_rows<kTileRows>(s, w, row, key, ahead);
        for (; row < rows; ++row) score_rows<1>(s, w, row, key, ahead);
    }
    for (int64_t row = 0; row < rows; ++row) weigh_row(view, w, part, row);
    for (int64_t key = 0; key < view.num_keys; key += kTileKeys) {
        const int64_t count = view.num_keys - key < kTileKeys ? view.num_keys - key : kTileKeys;
        const bool is_last = key + kTileKeys >= view.num_keys;
        const Cached* next = values + place(is_last ? key : key + kTileKeys);
        Ahead ahead = Ahead::of(next, is_dense && !is_last ? tile_items : 0, (tiles + 1) * count);
        widen_values(values + place(key), stride, count, s, w.values, ahead);
        int64_t row = 0;
        for (; row + kTileRows <= rows; row += kTileRows)
            add_all_values<kTileRows>(s, w, part, row, key, count, ahead);
        for (; row < rows; ++row) add_all_values<1>(s, w, part, row, key, count, ahead);
    }
}

template <class Item>
INLINE void load_queries(const Attention& a, const Sizes& s, const Task& task, float* to) {
    for (int64_t t = 0; t < task.num_tokens; ++t)
        for (int64_t h = 0; h < s.group; ++h) {
            const Item* from = static_cast<const Item*>(a.q) +
                               (task.query_start + task.first_token + t) * a.q_token_stride +
                               (task.head * s.group + h) * s.dim;
            for (int64_t i = 0; i < s.dim; i += kLanes)
                store(to + (t * s.group + h) * s.padded_dim + i,
                      load_first(from + i, s.dim - i) * Floats::all(a.scale));
        }
}

template <class Item, class Cached>
INLINE void write_output(const Attention& a, const Sizes& s, const Task& task, const Part& part) {
    for (int64_t t = 0; t < task.num_tokens; ++t)
        for (int64_t h = 0; h < s.group; ++h) {
            const int64_t row = t * s.group + h;
            Item* to = static_cast<Item*>(a.output) +
                       ((task.query_start + task.first_token + t) * a.num_heads + task.head * s.group + h) *
                           s.dim;
            const Floats factor = Floats::all(1.0f / part.total[row]);
            const float* from = part.output + row * s.padded_dim;
            if (is_split<Cached>(s)) {
                for (int64_t i = 0; i < s.dim; i += 2 * kLanes) {
                    float even[kLanes], odd[kLanes], items[2 * kLanes];
                    store(even, load(from + i) * factor);
                    store(odd, load(from + i + kLanes) * factor);
                    for (int lane = 0; lane < kLanes; ++lane) {
                        items[2 * lane] = even[lane];
                        items[2 * lane + 1] = odd[lane];
                    }
                    store(to + i, load(items));
                    store(to + i + kLanes, load(items + kLanes));
                }
            } else {
                for (int64_t i = 0; i < s.dim; i += kLanes)
                    store_first(to + i, load(from + i) * factor, s.dim - i);
            }
        }
}

// New keys and values after those that the cache holds.
template <class Item, class Cached>
INLINE void append_head(const Item* from, Cached* to, float*, int64_t dim) {
    for (int64_t i = 0; i < dim; ++i) to[i] = from[i];
}
template <class Item>
INLINE void append_head(const Item* from, int8_t* to, float* scale, int64_t dim) {
    Floats peak = Floats::all(0.0f);
    for (int64_t i = 0; i < dim; i += kLanes) peak = larger_magnitude(peak, load_first(from + i, dim - i));
    const float most = largest_magnitude(peak);
    const Floats factor = Floats::all(most > 0 ? 127.0f / most : 0.0f);
    *scale = most / 127.0f;
    for (int64_t i = 0; i < dim; i += kLanes) {
        int8_t bytes[kLanes];
        store_bytes(bytes, nearest_ints(load_first(from + i, dim - i) * factor));
        for (int64_t j = 0; j < kLanes && i + j < dim; ++j) to[i + j] = bytes[j];
    }
}

// The keys that a task's tokens see lie in [first, end); `first` begins a block.
INLINE int64_t first_key(const Attention& a, const Task& task) {
    if (!a.window) return 0;
    const int64_t first = task.past + task.first_token - a.window + 1;
    return first > 0 ? first / kTileKeys * kTileKeys : 0;
}

// Where a sequence begins among the tokens, tasks and parts of a call.
struct Span {
    int64_t first_token, first_task, first_part;
    int64_t blocks, splits;  // of its tokens, of its keys; a task is one of each, for one KV head
};

// How many tasks each sequence is: of its tokens, or of its keys too where tokens are few. The span after
// the last one has the sums.
INLINE void set_spans(const Attention& a, const Sizes& s, Span* spans) {
    Span next = {0, 0, 0, 0, 0};
    for (int64_t i = 0; i < a.num_sequences; ++i) {
        next.blocks = (a.query_counts[i] + s.task_tokens - 1) / s.task_tokens;
        next.splits = a.query_counts[i] <= kFewQueries ? (a.key_counts[i] + kSplit - 1) / kSplit : 1;
        spans[i] = next;
        const int64_t tasks = a.num_kv_heads * next.blocks * next.splits;
        next.first_token += a.query_counts[i];
        next.first_task += tasks;
        if (next.splits > 1) next.first_part += tasks;
    }
    spans[a.num_sequences] = next;
}

// The sequence that has a token or a task.
INLINE int64_t sequence_of(const Span* spans, int64_t num_sequences, int64_t Span::*first, int64_t index) {
    int64_t low = 0, high = num_sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (spans[middle].*first <= index ? low : high) = middle;
    }
    return low;
}

// A sequence's block of tokens in one KV head. The last tokens see most keys: they come first.
INLINE Task task_of(const Attention& a, const Sizes& s, const Span& span, int64_t sequence, int64_t item) {
    const int64_t count = a.query_counts[sequence], block = span.blocks - 1 - item / a.num_kv_heads;
    Task task = {sequence,         item % a.num_kv_heads,          block * s.task_tokens, s.task_tokens,
                 span.first_token, a.key_counts[sequence] - count};
    if (task.first_token + task.num_tokens > count) task.num_tokens = count - task.first_token;
    return task;
}

template <class Item, class Cached>
INLINE void append_token(const Attention& a, const Sizes& s, const Span& span, int64_t sequence, int64_t token) {
    const int64_t key = a.key_counts[sequence] - a.query_counts[sequence] + token - span.first_token;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
        const int64_t from_key = token * a.new_key_stride + h * s.dim;
        const int64_t from_value = token * a.new_value_stride + h * s.dim;
        const int64_t to = place_of(a, sequence, h, key);
        append_head(static_cast<const Item*>(a.new_keys) + from_key, static_cast<Cached*>(a.keys) + to,
                    a.key_scale ? a.key_scale + to / s.dim : nullptr, s.dim);
        append_head(static_cast<const Item*>(a.new_values) + from_value, static_cast<Cached*>(a.values) + to,
                    a.value_scale ? a.value_scale + to / s.dim : nullptr, s.dim);
    }
}

template <class Item, class Cached>
int attend_items(const Attention& a, int threads) {
    const Sizes s = sizes_of(a);
    const int64_t part_floats = 2 * rows_floats(s) + s.task_rows * s.padded_dim;
    const int64_t worker_floats = work_floats(s) + 2 * part_floats;
    const int64_t spans_bytes = ((a.num_sequences + 1) * sizeof(Span) + 63) / 64 * 64;
    int64_t products = 0, num_parts = 0;
    for (int64_t i = 0; i < a.num_sequences; ++i) {
        products += a.query_counts[i] * a.key_counts[i] * a.num_heads * s.dim;
        const int64_t splits = (a.key_counts[i] + kSplit - 1) / kSplit;
        if (a.query_counts[i] <= kFewQueries && splits > 1)
            num_parts += splits * a.num_kv_heads * ((a.query_counts[i] + s.task_tokens - 1) / s.task_tokens);
    }
    if (products < kSharedProducts) threads = 1;
    char* scratch = static_cast<char*>(
        hanok_scratch(spans_bytes + (threads * worker_floats + num_parts * part_floats) * 4));
    if (!scratch) return 1;
    Span* spans = reinterpret_cast<Span*>(scratch);
    set_spans(a, s, spans);
    const Span& all = spans[a.num_sequences];
    float* memory = reinterpret_cast<float*>(scratch + spans_bytes);
    float* parts = memory + threads * worker_floats;
    auto part_at = [&](float* at) {
        return Part{at, at + rows_floats(s), at + 2 * rows_floats(s)};
    };
    if (a.new_keys)
        share_ranges(threads, all.first_token, kAppendedTokens, [&](int64_t begin, int64_t end, int) {
            int64_t i = sequence_of(spans, a.num_sequences, &Span::first_token, begin);
            for (int64_t token = begin; token < end; ++token) {
                while (token >= spans[i + 1].first_token) ++i;
                append_token<Item, Cached>(a, s, spans[i], i, token);
            }
        });
    share(threads, all.first_task, [&](int64_t index, int worker) {
        float* own = memory + worker * worker_floats;
        const Work w = work_at(own, s);
        const Part whole = part_at(own + work_floats(s));
        const Part piece = part_at(own + work_floats(s) + part_floats);
        const int64_t i = sequence_of(spans, a.num_sequences, &Span::first_task, index);
        const int64_t item = index - spans[i].first_task, splits = spans[i].splits;
        const Task task = task_of(a, s, spans[i], i, item / splits);
        const int64_t rows = task.num_tokens * s.group;
        const int64_t end = task.past + task.first_token + task.num_tokens;
        load_queries<Item>(a, s, task, w.q);
        if (splits > 1) {
            const Part part = part_at(parts + (spans[i].first_part + item) * part_floats);
            const int64_t low = first_key(a, task), from = item % splits * kSplit;
            const int64_t to = from + kSplit < end ? from + kSplit : end;
            clear(part, rows, s.padded_dim);
            attend_keys<Cached>(a, s, task, from > low ? from : low, to, w, part);
            return;
        }
        clear(whole, rows, s.padded_dim);
        for (int64_t from = first_key(a, task); from < end;) {
            const int64_t next = (from / kSplit + 1) * kSplit;
            const int64_t to = next < end ? next : end;
            clear(piece, rows, s.padded_dim);
            attend_keys<Cached>(a, s, task, from, to, w, piece);
            merge(whole, piece, rows, s.padded_dim);
            from = to;
        }
        write_output<Item, Cached>(a, s, task, whole);
    });
    for (int64_t i = 0; i < a.num_sequences && num_parts; ++i) {
        const int64_t splits = spans[i].splits;
        if (splits > 1)
            share(threads, a.num_kv_heads * spans[i].blocks, [&](int64_t item, int worker) {
                const Part whole = part_at(memory + worker * worker_floats + work_floats(s));
                const Task task = task_of(a, s, spans[i], i, item);
                const int64_t rows = task.num_tokens * s.group;
                clear(whole, rows, s.padded_dim);
                for (int64_t split = 0; split < splits; ++split)
                    merge(whole, part_at(parts + (spans[i].first_part + item * splits + split) * part_floats),
                          rows, s.padded_dim);
                write_output<Item, Cached>(a, s, task, whole);
            });
    }
    return 0;
}

int attend(const Attention* call, int threads) {
    const Attention& a = *call;
    const bool is_wide = a.type == kFloat32;
    if (a.cache_type == kInt8)
        return is_wide ? attend_items<float, int8_t>(a, threads) : attend_items<uint16_t, int8_t>(a, threads);
    return is_wide ? attend_items<float, float>(a, threads) : attend_items<uint16_t, uint16_t>(a, threads);
}

}  // namespace
