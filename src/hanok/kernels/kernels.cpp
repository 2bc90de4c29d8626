// Products that torch's operators do below the speed of memory. C ABI, no torch: one build serves every
// version of it. OpenMP runs in the pool that torch has already loaded.
//
// Each kernel is written once, on vectors of 64 bytes, and compiled for several instruction sets; the
// compiler splits the vectors where registers are shorter. `hanok_instruction_set` says which is used.

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;        // floats in a vector
constexpr int kMaxTokens = 8;
constexpr int kRowsPerTask = 32;  // of the weight; a multiple of every block of rows below
constexpr int kPrefetch = 512;    // items ahead, measured: 28 GB/s, with none 20 to 24

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));

INLINE float widen(std::uint16_t value) {
    const std::uint32_t word = static_cast<std::uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &word, sizeof(result));
    return result;
}

// Round to nearest, ties to even, as torch does; a NaN stays one.
INLINE std::uint16_t narrow(float value) {
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

// By reference: how vectors are passed by value differs between compilers and instruction sets.
INLINE float sum(const Floats& values) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += values[lane];
    return total;
}

struct Product {
    const float* even;  // (tokens, columns / 32, 16): x at even places of each run of 32
    const float* odd;
    const std::uint16_t* x;       // (tokens, columns)
    const std::uint16_t* weight;  // (rows, columns)
    const std::uint16_t* bias;    // (rows) or null
    std::uint16_t* y;             // (tokens, rows)
    std::int64_t rows, columns;
};

// `kRows` rows of the weight times `kTokens` tokens. A 32-bit word holds two neighbouring bfloat16: the
// upper one is a float already, the lower one after a shift. The order of sums depends on nothing else.
template <int kTokens, int kRows>
INLINE void block(const Product& p, std::int64_t row) {
    const std::int64_t runs = p.columns / (2 * kLanes);
    Floats total[kRows][kTokens] = {};
    for (std::int64_t run = 0; run < runs; ++run) {
        Floats low[kRows], high[kRows];
        for (int r = 0; r < kRows; ++r) {
            Words words;
            const std::uint16_t* source = p.weight + (row + r) * p.columns + run * 2 * kLanes;
            __builtin_prefetch(source + kPrefetch);
            std::memcpy(&words, source, sizeof(words));
            low[r] = reinterpret_cast<Floats>(words << 16);
            high[r] = reinterpret_cast<Floats>(words & 0xffff0000u);
        }
        for (int t = 0; t < kTokens; ++t) {
            Floats even, odd;
            std::memcpy(&even, p.even + (t * runs + run) * kLanes, sizeof(even));
            std::memcpy(&odd, p.odd + (t * runs + run) * kLanes, sizeof(odd));
            for (int r = 0; r < kRows; ++r) {
                total[r][t] += low[r] * even;
                total[r][t] += high[r] * odd;
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTokens; ++t) {
            float value = sum(total[r][t]);
            for (std::int64_t c = runs * 2 * kLanes; c < p.columns; ++c)
                value += widen(p.weight[(row + r) * p.columns + c]) * widen(p.x[t * p.columns + c]);
            if (p.bias) value += widen(p.bias[row + r]);
            p.y[t * p.rows + row + r] = narrow(value);
        }
    }
}

// Several rows share what is read of x, and their addresses are looked up side by side.
template <int kTokens>
INLINE void rows_between(const Product& p, std::int64_t begin, std::int64_t end) {
    constexpr int kRows = kTokens <= 4 ? 4 : 2;
    std::int64_t row = begin;
    for (; row + kRows <= end; row += kRows) block<kTokens, kRows>(p, row);
    for (; row < end; ++row) block<kTokens, 1>(p, row);
}

INLINE void any_rows(const Product& p, int tokens, std::int64_t begin, std::int64_t end) {
    switch (tokens) {
        case 1: rows_between<1>(p, begin, end); break;
        case 2: rows_between<2>(p, begin, end); break;
        case 3: rows_between<3>(p, begin, end); break;
        case 4: rows_between<4>(p, begin, end); break;
        case 5: rows_between<5>(p, begin, end); break;
        case 6: rows_between<6>(p, begin, end); break;
        case 7: rows_between<7>(p, begin, end); break;
        default: rows_between<8>(p, begin, end); break;
    }
}

typedef void (*Rows)(const Product&, int, std::int64_t, std::int64_t);

void rows_portable(const Product& p, int tokens, std::int64_t begin, std::int64_t end) {
    any_rows(p, tokens, begin, end);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void rows_avx2(
    const Product& p, int tokens, std::int64_t begin, std::int64_t end) {
    any_rows(p, tokens, begin, end);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) void rows_avx512(
    const Product& p, int tokens, std::int64_t begin, std::int64_t end) {
    any_rows(p, tokens, begin, end);
}
#endif

struct Choice {
    Rows rows;
    const char* name;
};

Choice choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return {rows_avx512, "AVX-512"};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {rows_avx2, "AVX2"};
#endif
    return {rows_portable, "portable"};
}

const Choice kChoice = choose();

}  // namespace

extern "C" {

const char* hanok_instruction_set() { return kChoice.name; }

int hanok_max_tokens() { return kMaxTokens; }

// Floats of scratch memory that a product needs.
std::int64_t hanok_scratch_floats(std::int64_t tokens, std::int64_t columns) {
    return tokens * (columns / (2 * kLanes)) * 2 * kLanes;
}

// y = x @ weight.T + bias, all bfloat16, sums in float32. x: (tokens, columns), 1 to 8 tokens;
// weight: (rows, columns); bias: (rows) or null; y: (tokens, rows); all contiguous.
void hanok_bfloat16_linear(const std::uint16_t* x, const std::uint16_t* weight,
                           const std::uint16_t* bias, std::uint16_t* y, float* scratch, int tokens,
                           std::int64_t rows, std::int64_t columns, int threads) {
    const std::int64_t runs = columns / (2 * kLanes);
    float* even = scratch;
    float* odd = scratch + tokens * runs * kLanes;
    for (int t = 0; t < tokens; ++t)
        for (std::int64_t i = 0; i < runs * kLanes; ++i) {
            even[t * runs * kLanes + i] = widen(x[t * columns + 2 * i]);
            odd[t * runs * kLanes + i] = widen(x[t * columns + 2 * i + 1]);
        }
    const Product product = {even, odd, x, weight, bias, y, rows, columns};
    const std::int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks > 1 && threads > 1)
    for (std::int64_t task = 0; task < tasks; ++task) {
        const std::int64_t begin = task * kRowsPerTask;
        const std::int64_t end = begin + kRowsPerTask < rows ? begin + kRowsPerTask : rows;
        kChoice.rows(product, tokens, begin, end);
    }
}

}  // extern "C"
