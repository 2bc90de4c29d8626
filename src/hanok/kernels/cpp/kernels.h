// What the library's parts pass to each other. Plain data: the same on both sides of every call.

#pragma once

#include <cstdint>

enum ItemType { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kFloat16 = 3, kUint8 = 4 };

// How codes become numbers, before the scale of their group.
enum Kind {
    kBytes = 0,       // int8
    kNibbles = 1,     // -8 to 7
    kZeroNibbles = 2, // 0 to 15 around the group's zero
    kTable = 3,       // indices of the table
    kZeroBytes = 4,   // 0 to 255 around the group's zero
    kFloat8 = 5,      // e4m3
};

// How floats become codes; what each takes from `numbers` is stated where the method is (quant/*.py).
enum Quantizer {
    kRoundInt8 = 0,  // numbers: the code of the largest magnitude; whole rows where scales are float32
    kRoundInt4 = 1,  // numbers: the levels tried for the largest magnitude; none where groups have zeros
    kRoundToTable = 2,  // the table's nearest entry
    kRoundFloat8 = 3,      // numbers: what the largest magnitude of a row becomes
};

// A quantized weight in panels of 16 rows. A panel is a run of blocks of 32 columns; a block is vectors of
// 64 bytes, in which the 32-bit word of lane r belongs to row r. In 8 bits, vector j holds columns 4j to
// 4j + 3; in 4 bits, its low halves columns 4j to 4j + 3 and its high halves 16 more. Rows and columns
// past the end have the code of zero or the scale 0.
struct Panels {
    std::uint8_t* codes;
    void* scale;         // (panels, groups, 16), float16, bfloat16 or float32
    void* zero;          // (panels, groups, 16), uint8 or float32, kinds with a zero only
    const float* table;  // 16 values, kTable only
    std::int64_t rows, columns;
    std::int64_t group_columns;  // that share a scale, a multiple of 32; all, filled up to 32, for whole rows
    std::int32_t kind, scale_type, zero_type;
    // Whether x is rounded to int8, group by group, and multiplied as whole numbers. Only the first four
    // kinds, in groups of 32, 64 or 128 columns, with float16 scales (kTable: float32) and uint8 zeros.
    std::int32_t rounds_x;
};

// One call of attention for some sequences. Strides are in items; the innermost one is 1 everywhere.
struct Attention {
    const void* q;  // (tokens, heads, head_dim)
    const void* new_keys;    // (tokens, kv_heads, head_dim), to be appended; null if all keys are in the cache
    const void* new_values;
    void* keys;  // in blocks, each (kv_heads, block_keys, head_dim) or however the strides have it
    void* values;
    float* key_scale;  // int8 keys only: one for each token and head
    float* value_scale;
    void* output;  // (tokens, heads, head_dim), contiguous
    const std::int64_t* query_counts;  // (sequences)
    const std::int64_t* key_counts;    // (sequences): all that the last query sees
    const std::int64_t* blocks;        // numbers of the blocks, each sequence's in order
    const std::int64_t* block_starts;  // (sequences): where in `blocks` a sequence's begin
    std::int64_t num_sequences, num_heads, num_kv_heads, head_dim;
    std::int64_t q_token_stride, new_key_stride, new_value_stride;  // between tokens
    std::int64_t key_token_stride, key_head_stride;  // the values' too
    std::int64_t block_stride, block_keys;  // a multiple of 64 keys where a sequence has several blocks
    std::int64_t window;  // tokens a query sees, itself included; 0: all before it
    float scale, softcap;  // softcap 0: none
    std::int32_t type, cache_type;
};

// A part of an adapter: scale * B A, for rows [first_row, first_row + rows) of a product.
struct LoraPart {
    const void* a;  // (rank, columns of the product's weight)
    const void* b;  // (rank, rows): the columns of B one after the other
    std::int64_t number;  // of the adapter; all parts of one follow one another
    std::int64_t first_row, rows, rank;
    float scale;
};

// The adapters of one product with a weight (rows, columns).
struct Lora {
    const LoraPart* parts;
    std::int64_t num_parts, rows, columns;
};

// One instruction set's kernels. All return 0, or 1 where memory could not be had.
struct Kernels {
    const char *key, *name;      // for programs, for people
    std::int64_t dense_tokens;  // that `dense` takes at the most
    int (*dense)(const void* x, const void* weight, const void* bias, void* y, std::int64_t tokens,
                 std::int64_t rows, std::int64_t columns, int type, int threads);
    int (*product)(const Panels* weight, const void* x, const void* bias, void* y, std::int64_t tokens,
                   int type, int threads);
    int (*pack)(const Panels* weight, std::int64_t start, std::int64_t count, const void* rows, int type,
                int quantizer, const float* numbers, std::int64_t num_numbers);
    int (*pack_codes)(const Panels* weight, std::int64_t start, std::int64_t count, const std::uint8_t* codes);
    int (*unpack)(const Panels* weight, std::int64_t start, std::int64_t count, float* rows, int threads);
    int (*look_up)(const Panels* weight, const std::int64_t* ids, std::int64_t count, void* rows, int type);
    int (*attend)(const Attention* call, int threads);
    int (*rms_norm)(const void* x, const void* weight, void* y, std::int64_t rows, std::int64_t columns,
                    float eps, int has_unit_offset, int type, int threads);
    int (*rotate)(const void* heads, const void* cos, const void* sin, void* y, std::int64_t tokens,
                  std::int64_t num_heads, std::int64_t head_dim, std::int64_t rotary_dim,
                  std::int64_t token_stride, int is_interleaved, int type, int threads);
    int (*gate)(const void* gate_up, void* y, std::int64_t rows, std::int64_t columns,
                int activation, int type, int threads);
    int (*add)(const void* a, const void* b, void* y, std::int64_t count, int type, int threads);
    int (*copy)(const void* from, void* to, std::int64_t rows, std::int64_t bytes, std::int64_t stride_bytes);
    int (*widen)(const void* x, void* y, std::int64_t count, int threads);
    int (*log_sum_exp)(const void* x, float* totals, std::int64_t* likeliest, std::int64_t rows,
                       std::int64_t columns, int threads);
    int (*add_lora)(const Lora* lora, const void* x, const std::int64_t* chosen, void* y,
                    std::int64_t tokens, int type, int threads);
};

// One call of a kernel as data, so that many can be kept and made in turn.
enum Operation {
    kDense = 0,    // inputs: x, weight, bias or null; sizes: tokens, rows, columns
    kProduct = 1,  // x, Panels, bias or null; tokens
    kAttend = 2,   // Attention
    kRmsNorm = 3,  // x, weight; rows, columns; choice: unit offset; number: eps
    kRotate = 4,   // heads, cos, sin; tokens, heads, head_dim, rotary_dim, token stride; choice: interleaved
    kGate = 5,     // gate and up; rows, columns; choice: activation
    kAdd = 6,      // a, b; count
    kCopy = 7,     // from; rows, bytes of a row, bytes from row to row
    kWiden = 8,    // x; count
    kAddLora = 9,  // x, Lora, each token's adapter; tokens
};
struct Step {
    const void* inputs[3];
    void* output;
    std::int64_t sizes[5];
    float number;
    std::int32_t operation, choice, type;
};

// Memory of the calling thread, kept for its next call; null where there is none. Aligned to 64 bytes.
void* hanok_scratch(std::int64_t bytes);
