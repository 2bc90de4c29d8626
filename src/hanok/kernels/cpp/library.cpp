// The library's face: plain C, which knows nothing of torch, so one build serves every version of it.
//
// `hanok_kernels` returns the table of one instruction set, or of the best that this processor has; every
// other call takes the table first.

#include "kernels.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(HANOK_HAS_AMX)
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

// The build defines HANOK_HAS_… for each instruction set that its compiler knows.
extern const Kernels hanok_portable_kernels, hanok_avx2_kernels, hanok_avxvnni_kernels, hanok_avx512_kernels,
    hanok_dotprod_kernels;

#if defined(HANOK_HAS_AMX)
int hanok_amx_product(const Panels*, const void*, const void*, void*, std::int64_t, int, int);
int hanok_emulated_amx_product(const Panels*, const void*, const void*, void*, std::int64_t, int, int);
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
// Compilers of 2022 do not know its name in __builtin_cpu_supports.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(HANOK_HAS_AMX)
Kernels with_product(const char* key, const char* name, decltype(Kernels::product) product) {
    Kernels kernels = hanok_avx512_kernels;
    kernels.key = key;
    kernels.name = name;
    kernels.product = product;
    return kernels;
}
const Kernels amx_kernels = with_product("amx", "AMX", hanok_amx_product);
const Kernels emulated_amx_kernels = with_product("amx", "AMX by loops", hanok_emulated_amx_product);

// Linux lets a process use tiles when it asks (arch_prctl: ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & 1u << 24) || !(d & 1u << 25)) return false;  // tiles, and int8 in them
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

// Whether AMX's products are AVX-512's bit for bit. No machine that tested this code had tiles.
bool amx_agrees() {
    constexpr std::int64_t kRows = 32, kColumns = 64, kTokens = 40;
    static std::uint8_t codes[kRows * kColumns];
    static std::uint16_t scale[kRows * kColumns / 32];
    static float x[kTokens * kColumns], ours[kTokens * kRows], theirs[kTokens * kRows];
    std::uint32_t number = 1;
    const auto next = [&] { return (number = number * 1664525u + 1013904223u) >> 24; };
    for (auto& code : codes) code = static_cast<std::uint8_t>(next());
    for (auto& item : scale) item = static_cast<std::uint16_t>(0x2c00 + next());
    for (auto& item : x) item = static_cast<float>(next()) - 127.0f;
    const int kinds[] = {kBytes, kNibbles};
    for (const int kind : kinds) {
        const Panels weight = {codes, scale, nullptr, nullptr, kRows, kColumns, 32, kind, kFloat16, kUint8, 1};
        if (amx_kernels.product(&weight, x, nullptr, ours, kTokens, kFloat32, 1) ||
            hanok_avx512_kernels.product(&weight, x, nullptr, theirs, kTokens, kFloat32, 1) ||
            std::memcmp(ours, theirs, sizeof(ours)))
            return false;
    }
    return true;
}

enum TileState { kNoTiles, kWrongTiles, kTiles };
TileState tile_state() {
    static const TileState state = !has_amx() ? kNoTiles : amx_agrees() ? kTiles : kWrongTiles;
    return state;
}
#endif

// The best first.
const Kernels* supported(int index) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(HANOK_HAS_AMX)
    if (tile_state() == kTiles && index-- == 0) return &amx_kernels;
#endif
#if defined(HANOK_HAS_AVX512)
    if (has_avx512() && index-- == 0) return &hanok_avx512_kernels;
#endif
#if defined(HANOK_HAS_AVXVNNI)
    if (has_avx_vnni() && index-- == 0) return &hanok_avxvnni_kernels;
#endif
#if defined(HANOK_HAS_AVX2)
    if (has_avx2() && index-- == 0) return &hanok_avx2_kernels;
#endif
#elif defined(HANOK_HAS_DOTPROD) && defined(__linux__)
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && index-- == 0) return &hanok_dotprod_kernels;
#elif defined(HANOK_HAS_DOTPROD)
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

int call(const Kernels& kernels, const Step& step, int threads) {
    const void* const* in = step.inputs;
    const std::int64_t* n = step.sizes;
    switch (step.operation) {
        case kDense:
            return kernels.dense(in[0], in[1], in[2], step.output, n[0], n[1], n[2], step.type, threads);
        case kProduct:
            return kernels.product(static_cast<const Panels*>(in[1]), in[0], in[2], step.output, n[0],
                                   step.type, threads);
        case kAttend:
            return kernels.attend(static_cast<const Attention*>(in[0]), threads);
        case kRmsNorm:
            return kernels.rms_norm(in[0], in[1], step.output, n[0], n[1], step.number, step.choice,
                                    step.type, threads);
        case kRotate:
            return kernels.rotate(in[0], in[1], in[2], step.output, n[0], n[1], n[2], n[3], n[4], step.choice,
                                  step.type, threads);
        case kGate:
            return kernels.gate(in[0], step.output, n[0], n[1], step.choice, step.type, threads);
        case kAdd:
            return kernels.add(in[0], in[1], step.output, n[0], step.type, threads);
        case kCopy:
            return kernels.copy(in[0], step.output, n[0], n[1], n[2]);
        case kWiden:
            return kernels.widen(in[0], step.output, n[0], threads);
        case kAddLora:
            return kernels.add_lora(static_cast<const Lora*>(in[1]), in[0],
                                    static_cast<const std::int64_t*>(in[2]), step.output, n[0], step.type,
                                    threads);
    }
    return 2;
}

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

// AMX's kernels with loops in place of its tiles, for tests; null where they do not run.
const Kernels* hanok_emulated_amx() {
#if defined(HANOK_HAS_AMX)
    return has_avx512() ? &emulated_amx_kernels : nullptr;
#else
    return nullptr;
#endif
}

// Whether this processor has tiles whose products are not AVX-512's, so that they are not used.
int hanok_has_wrong_tiles() {
#if defined(HANOK_HAS_AMX)
    return tile_state() == kWrongTiles;
#else
    return 0;
#endif
}

const char* hanok_key(const Kernels* kernels) { return kernels->key; }

const char* hanok_name(const Kernels* kernels) { return kernels->name; }

std::int64_t hanok_dense_tokens(const Kernels* kernels) { return kernels->dense_tokens; }

// Makes calls one after the other, until one of them fails. All tensors of a step are of its type and, but
// for what a stride is given for, contiguous.
//
// dense: y = x @ weight.T + bias for up to hanok_dense_tokens tokens, sums in float32; x (tokens, columns), weight (rows,
// columns), bias (rows), y (tokens, rows). product: the same with a quantized weight, for any number of
// tokens, at most 8 where x is left as it is. rms_norm: x (rows, columns), weight (columns). rotate: heads (tokens,
// heads, head_dim), cos and sin (tokens, rotary_dim). gate: (rows, 2 x columns) to (rows, columns) =
// activation(first half) * second half. add_lora: to the product in `output`, (tokens, rows), what the adapters
// of x (tokens, columns) add; a token whose number no part has keeps what it has.
int hanok_run(const Kernels* kernels, const Step* steps, std::int64_t count, int threads) {
    for (std::int64_t i = 0; i < count; ++i) {
        const int status = call(*kernels, steps[i], threads);
        if (status) return status;
    }
    return 0;
}

// Quantizes rows [start, start + count), `start` a multiple of 16, into place.
int hanok_pack(const Kernels* kernels, const Panels* weight, std::int64_t start, std::int64_t count,
               const void* rows, int type, int quantizer, const float* numbers, std::int64_t num_numbers) {
    return kernels->pack(weight, start, count, rows, type, quantizer, numbers, num_numbers);
}

// Puts codes, one in each byte, into the same place; scales and zeros are the caller's to write.
int hanok_pack_codes(const Kernels* kernels, const Panels* weight, std::int64_t start, std::int64_t count,
                     const std::uint8_t* codes) {
    return kernels->pack_codes(weight, start, count, codes);
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

// Of each row of x (rows, columns) float32: ln(sum of e^x), and where its first largest number is.
int hanok_log_sum_exp(const Kernels* kernels, const void* x, std::int64_t rows, std::int64_t columns,
                      float* totals, std::int64_t* likeliest, int threads) {
    return kernels->log_sum_exp(x, totals, likeliest, rows, columns, threads);
}

#pragma GCC visibility pop
}  // extern "C"
