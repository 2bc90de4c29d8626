// The library's face: plain C, which knows nothing of torch, so one build serves every version of it. OpenMP
// runs in the pool of threads that torch has already loaded.
//
// `hanok_kernels` returns the table of one instruction set, or of the best that this processor has; every
// other call takes the table first.

#include "kernels.h"

#include <cstdlib>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

extern const Kernels hanok_portable_kernels;
#if defined(__x86_64__)
extern const Kernels hanok_avx2_kernels, hanok_avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels hanok_dotprod_kernels;
#endif

namespace {

// The best first.
const Kernels* supported(int index) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && index-- == 0)
        return &hanok_avx512_kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        index-- == 0)
        return &hanok_avx2_kernels;
#elif defined(__aarch64__) && defined(__linux__)
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && index-- == 0) return &hanok_dotprod_kernels;
#elif defined(__aarch64__)
    if (index-- == 0) return &hanok_dotprod_kernels;  // every Apple processor has it
#endif
    return index == 0 ? &hanok_portable_kernels : nullptr;
}

// Freed when its thread ends.
struct Memory {
    void* place = nullptr;
    std::int64_t bytes = 0;
    ~Memory() { std::free(place); }
};

}  // namespace

void* hanok_scratch(std::int64_t bytes) {
    static thread_local Memory memory;
    if (bytes > memory.bytes || !memory.place) {
        const std::int64_t rounded = (bytes / 4096 + 1) * 4096;
        std::free(memory.place);
        memory.place = std::aligned_alloc(64, static_cast<std::size_t>(rounded));
        memory.bytes = memory.place ? rounded : 0;
    }
    return memory.place;
}

extern "C" {
#pragma GCC visibility push(default)

// `index` counts from the best instruction set; null past the last.
const Kernels* hanok_kernels(int index) { return supported(index); }

const char* hanok_name(const Kernels* kernels) { return kernels->name; }

// y = x @ weight.T + bias. x: (tokens, columns), 1 to 8 tokens; weight: (rows, columns); bias: (rows) or
// null; y: (tokens, rows); all of one type and contiguous; sums in float32.
int hanok_dense(const Kernels* kernels, const void* x, const void* weight, const void* bias, void* y,
                std::int64_t tokens, std::int64_t rows, std::int64_t columns, int type, int threads) {
    return kernels->dense(x, weight, bias, y, tokens, rows, columns, type, threads);
}

// The same with a quantized weight, for any number of tokens; at most 8 for the row kinds.
int hanok_product(const Kernels* kernels, const Panels* weight, const void* x, const void* bias, void* y,
                  std::int64_t tokens, int type, int threads) {
    return kernels->product(weight, x, bias, y, tokens, type, threads);
}

// Quantizes rows [start, start + count), `start` a multiple of 16, into place.
int hanok_pack(const Kernels* kernels, const Panels* weight, std::int64_t start, std::int64_t count,
               const void* rows, int type) {
    return kernels->pack(weight, start, count, rows, type);
}

// Rows [start, start + count), `start` a multiple of 16, as float32.
int hanok_unpack(const Kernels* kernels, const Panels* weight, std::int64_t start, std::int64_t count,
                 float* rows, int threads) {
    return kernels->unpack(weight, start, count, rows, threads);
}

int hanok_look_up(const Kernels* kernels, const Panels* weight, const std::int64_t* ids, std::int64_t count,
                  void* rows, int type) {
    return kernels->look_up(weight, ids, count, rows, type);
}

int hanok_attend(const Kernels* kernels, const Attention* call, int threads) {
    return kernels->attend(call, threads);
}

// x: (rows, columns); weight: (columns); y: (rows, columns).
int hanok_rms_norm(const Kernels* kernels, const void* x, const void* weight, void* y, std::int64_t rows,
                   std::int64_t columns, float eps, int has_unit_offset, int type,
                   int threads) {
    return kernels->rms_norm(x, weight, y, rows, columns, eps, has_unit_offset, type, threads);
}

// heads: (tokens, heads, head_dim) with a stride between tokens; cos, sin: (tokens, rotary_dim).
int hanok_rotate(const Kernels* kernels, const void* heads, const void* cos, const void* sin, void* y,
                 std::int64_t tokens, std::int64_t num_heads, std::int64_t head_dim,
                 std::int64_t rotary_dim, std::int64_t token_stride, int is_interleaved, int type,
                 int threads) {
    return kernels->rotate(heads, cos, sin, y, tokens, num_heads, head_dim, rotary_dim, token_stride,
                           is_interleaved, type, threads);
}

// gate_up: (rows, 2 x columns); y: (rows, columns) = activation(first half) * second half.
int hanok_gate(const Kernels* kernels, const void* gate_up, void* y, std::int64_t rows, std::int64_t columns,
               int activation, int type, int threads) {
    return kernels->gate(gate_up, y, rows, columns, activation, type, threads);
}

#pragma GCC visibility pop
}  // extern "C"
