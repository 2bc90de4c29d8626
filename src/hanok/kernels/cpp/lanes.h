// Sixteen numbers at a time, on registers of whatever width this file is compiled for.
//
// Everything here is forced inline and in an unnamed namespace: the same header is compiled for several
// instruction sets, and no copy may stand in for another. For the same reason no header of the C++
// library with functions in it is included.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define REGISTER_BYTES 64
#elif defined(__AVX2__)
#define REGISTER_BYTES 32
#else
#define REGISTER_BYTES 16
#endif

namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

constexpr int kLanes = 16;
constexpr int kParts = 64 / REGISTER_BYTES;
constexpr int kPartLanes = REGISTER_BYTES / 4;

typedef float FloatPart __attribute__((vector_size(REGISTER_BYTES)));
typedef int32_t IntPart __attribute__((vector_size(REGISTER_BYTES)));
typedef uint32_t WordPart __attribute__((vector_size(REGISTER_BYTES)));
typedef uint16_t HalfPart __attribute__((vector_size(REGISTER_BYTES / 2)));
typedef int8_t BytePart __attribute__((vector_size(REGISTER_BYTES / 4)));

template <class Part, class Item>
struct Vector {
    typedef Part Lanes;
    Part part[kParts];

    // Part by part: as one run of bytes a compiler moves it through memory, in pieces of 16.
    static INLINE Vector load(const void* from) {
        Vector v;
        for (int i = 0; i < kParts; ++i)
            std::memcpy(&v.part[i], static_cast<const char*>(from) + i * REGISTER_BYTES, REGISTER_BYTES);
        return v;
    }
    static INLINE Vector all(Item value) {
        Vector v;
        // Less zero, which is nothing; plus zero would turn -0 into 0 and cost an addition.
        for (int i = 0; i < kParts; ++i) v.part[i] = value - Part{};
        return v;
    }
    INLINE void store(void* to) const {
        for (int i = 0; i < kParts; ++i)
            std::memcpy(static_cast<char*>(to) + i * REGISTER_BYTES, &part[i], REGISTER_BYTES);
    }
};

typedef Vector<FloatPart, float> Floats;
typedef Vector<IntPart, int32_t> Ints;
typedef Vector<WordPart, uint32_t> Words;

#define FOR_PARTS for (int i = 0; i < kParts; ++i)
#define OPERATOR(op)                                                          \
    template <class Part, class Item>                                         \
    INLINE Vector<Part, Item> operator op(const Vector<Part, Item>& a,        \
                                          const Vector<Part, Item>& b) {      \
        Vector<Part, Item> v;                                                 \
        FOR_PARTS v.part[i] = a.part[i] op b.part[i];                         \
        return v;                                                             \
    }
OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|) OPERATOR(^)
#undef OPERATOR

template <class Part, class Item>
INLINE Vector<Part, Item> operator<<(Vector<Part, Item> v, int bits) {
    FOR_PARTS v.part[i] = v.part[i] << bits;
    return v;
}
template <class Part, class Item>
INLINE Vector<Part, Item> operator>>(Vector<Part, Item> v, int bits) {
    FOR_PARTS v.part[i] = v.part[i] >> bits;
    return v;
}

template <class To, class From>
INLINE To reinterpret(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class To, class Part, class Item>
INLINE To reinterpret(const Vector<Part, Item>& from) {
    To to;
    FOR_PARTS to.part[i] = (typename To::Lanes)from.part[i];
    return to;
}

INLINE Floats to_floats(const Ints& ints) {
    Floats v;
    FOR_PARTS v.part[i] = __builtin_convertvector(ints.part[i], FloatPart);
    return v;
}

INLINE Floats add_product(Floats sum, const Floats& a, const Floats& b) {
    FOR_PARTS sum.part[i] += a.part[i] * b.part[i];
    return sum;
}

// `a` where they are unordered too, as no caller cares.
INLINE Floats larger(const Floats& a, const Floats& b) {
    Floats v;
#if defined(__AVX512F__)
    FOR_PARTS v.part[i] = (FloatPart)_mm512_max_ps((__m512)b.part[i], (__m512)a.part[i]);
#else
    FOR_PARTS v.part[i] = b.part[i] > a.part[i] ? b.part[i] : a.part[i];
#endif
    return v;
}

INLINE Floats smaller(const Floats& a, const Floats& b) {
    Floats v;
#if defined(__AVX512F__)
    FOR_PARTS v.part[i] = (FloatPart)_mm512_min_ps((__m512)b.part[i], (__m512)a.part[i]);
#else
    FOR_PARTS v.part[i] = b.part[i] < a.part[i] ? b.part[i] : a.part[i];
#endif
    return v;
}

// Where a > b: all bits, else none.
INLINE Ints is_larger(const Floats& a, const Floats& b) {
    Ints v;
    FOR_PARTS v.part[i] = (IntPart)(a.part[i] > b.part[i]);
    return v;
}

INLINE Ints is_no_number(const Floats& a) {
    Ints v;
    FOR_PARTS v.part[i] = (IntPart)(a.part[i] != a.part[i]);
    return v;
}

INLINE Floats choose(const Ints& condition, const Floats& yes, const Floats& no) {
    Floats v;
    FOR_PARTS v.part[i] = condition.part[i] != 0 ? yes.part[i] : no.part[i];
    return v;
}

INLINE Floats absolute(const Floats& v) {
    return reinterpret<Floats>(reinterpret<Words>(v) & Words::all(0x7fffffffu));
}

// The larger magnitude; NaN counts as the largest, so that it is not lost.
INLINE Floats larger_magnitude(const Floats& a, const Floats& b) {
    const Ints first = reinterpret<Ints>(absolute(a)), second = reinterpret<Ints>(absolute(b));
    Ints v;
    FOR_PARTS v.part[i] = first.part[i] > second.part[i] ? first.part[i] : second.part[i];
    return reinterpret<Floats>(v);
}
INLINE float largest_magnitude(const Floats& v) {
    int32_t lanes[kLanes];
    reinterpret<Ints>(absolute(v)).store(lanes);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i)
            lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
    return reinterpret<float>(lanes[0]);
}

// To the nearest whole number, ties to even, as a float and as an integer; |v| < 2^22. Without an
// instruction for it, adding 3 * 2^22 leaves no bits for fractions.
constexpr float kNoFractions = 12582912.0f;
INLINE Floats nearest(const Floats& v) {
    Floats whole;
#if defined(__AVX512F__)
    FOR_PARTS whole.part[i] = (FloatPart)_mm512_roundscale_ps((__m512)v.part[i], 8);
#elif defined(__AVX2__)
    FOR_PARTS whole.part[i] = (FloatPart)_mm256_round_ps((__m256)v.part[i], 8);
#elif defined(__ARM_NEON)
    FOR_PARTS whole.part[i] = (FloatPart)vrndnq_f32((float32x4_t)v.part[i]);
#else
    whole = (v + Floats::all(kNoFractions)) - Floats::all(kNoFractions);
#endif
    return whole;
}
INLINE Ints nearest_ints(const Floats& v) {
    Ints whole;
#if defined(__AVX512F__)
    FOR_PARTS whole.part[i] = (IntPart)_mm512_cvtps_epi32((__m512)v.part[i]);
#elif defined(__AVX2__)
    FOR_PARTS whole.part[i] = (IntPart)_mm256_cvtps_epi32((__m256)v.part[i]);
#elif defined(__ARM_NEON)
    FOR_PARTS whole.part[i] = (IntPart)vcvtnq_s32_f32((float32x4_t)v.part[i]);
#else
    whole = reinterpret<Ints>(v + Floats::all(kNoFractions)) - Ints::all(0x4B400000);
#endif
    return whole;
}

// By reference and lane by lane: the compiler knows the best shuffles.
INLINE float sum(const Floats& v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v.part[0]);
#else
    float lanes[kLanes], total = 0;
    v.store(lanes);
    for (int i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
    for (int i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
    for (int i = 0; i < 4; ++i) total += lanes[i];
    return total;
#endif
}
INLINE float largest(const Floats& v) {
    float lanes[kLanes];
    v.store(lanes);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i)
            lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
    return lanes[0];
}
INLINE int32_t sum(const Ints& v) {
    int32_t lanes[kLanes], total = 0;
    v.store(lanes);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return total;
}

// --- bfloat16 -----------------------------------------------------------------------------------------

INLINE float widen(uint16_t value) { return reinterpret<float>(static_cast<uint32_t>(value) << 16); }
INLINE float widen(float value) { return value; }

// To nearest, ties to even, as torch rounds; a NaN stays one.
INLINE uint16_t narrow(float value) {
    const uint32_t word = reinterpret<uint32_t>(value);
    if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

INLINE void put(uint16_t* to, float value) { *to = narrow(value); }
INLINE void put(float* to, float value) { *to = value; }

INLINE Words load_halves(const uint16_t* from) {
    Words v;
    FOR_PARTS {
        HalfPart halves;
        std::memcpy(&halves, from + i * kPartLanes, sizeof(halves));
        v.part[i] = __builtin_convertvector(halves, WordPart);
    }
    return v;
}

INLINE Floats load(const float* from) { return Floats::load(from); }
INLINE Floats load(const uint16_t* from) { return reinterpret<Floats>(load_halves(from) << 16); }

// 64 bytes: of bfloat16 the even columns first, as a 32-bit word holds two.
INLINE void widen_run(const uint16_t* from, Floats (&to)[2]) {
    const Words words = Words::load(from);
    to[0] = reinterpret<Floats>(words << 16);
    to[1] = reinterpret<Floats>(words & Words::all(0xffff0000u));
}
INLINE void widen_run(const float* from, Floats (&to)[1]) { to[0] = load(from); }

INLINE Floats load(const int8_t* from) {
    Floats v;
    FOR_PARTS {
        BytePart bytes;
        std::memcpy(&bytes, from + i * kPartLanes, sizeof(bytes));
        v.part[i] = __builtin_convertvector(__builtin_convertvector(bytes, IntPart), FloatPart);
    }
    return v;
}

// The first `count` of sixteen, zeros after them.
template <class Item>
INLINE Floats load_first(const Item* from, int64_t count) {
    if (count >= kLanes) return load(from);
    Item items[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) items[i] = from[i];
    return load(items);
}

INLINE void store(float* to, const Floats& v) { v.store(to); }
INLINE void store(uint16_t* to, const Floats& v) {
    const Words words = reinterpret<Words>(v);
    const Words rounded =
        (words + Words::all(0x7fffu) + ((words >> 16) & Words::all(1u))) >> 16;
    const Words magnitude = words & Words::all(0x7fffffffu);
    FOR_PARTS {
        const WordPart kept = magnitude.part[i] > 0x7f800000u ? WordPart{} + 0x7fc0u : rounded.part[i];
        const HalfPart halves = __builtin_convertvector(kept, HalfPart);
        std::memcpy(to + i * kPartLanes, &halves, sizeof(halves));
    }
}

template <class Item>
INLINE void store_first(Item* to, const Floats& v, int64_t count) {
    if (count >= kLanes) return store(to, v);
    Item items[kLanes];
    store(items, v);
    for (int64_t i = 0; i < count; ++i) to[i] = items[i];
}

// --- float16, which only scales are stored in ---------------------------------------------------------

INLINE Floats load_float16(const uint16_t* from) {
    Floats v;
#if defined(__AVX512F__)
    v.part[0] = (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    FOR_PARTS v.part[i] = (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8 * i)));
#else
    // The exponent's bias differs by 112.
    const Words words = load_halves(from);
    const Words magnitude = (words & Words::all(0x7fffu)) << 13;
    v = reinterpret<Floats>(magnitude) * Floats::all(0x1p112f);
    Words bits = reinterpret<Words>(v) | ((words & Words::all(0x8000u)) << 16);
    // Infinity and NaN have all bits of the exponent.
    FOR_PARTS bits.part[i] |= magnitude.part[i] >= 0x0f800000u ? WordPart{} + 0x7f800000u : WordPart{};
    v = reinterpret<Floats>(bits);
#endif
    return v;
}

INLINE void store_float16(uint16_t* to, const Floats& v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    FOR_PARTS _mm_storeu_si128((__m128i*)(to + 8 * i),
                               _mm256_cvtps_ph((__m256)v.part[i], _MM_FROUND_TO_NEAREST_INT));
#else
    const Words sign = (reinterpret<Words>(v) >> 16) & Words::all(0x8000u);
    const Words words = reinterpret<Words>(absolute(v) * Floats::all(0x1p-112f));
    const Words halves = (words + Words::all(0xfffu) + ((words >> 13) & Words::all(1u))) >> 13;
    FOR_PARTS {
        // Too large becomes infinite, and NaN stays NaN.
        WordPart kept = halves.part[i] > 0x7c00u ? WordPart{} + 0x7c00u : halves.part[i];
        kept = words.part[i] > 0x7f800000u ? WordPart{} + 0x7e00u : kept;
        const HalfPart part = __builtin_convertvector(kept | sign.part[i], HalfPart);
        std::memcpy(to + i * kPartLanes, &part, sizeof(part));
    }
#endif
}

// --- whole numbers ------------------------------------------------------------------------------------

// Low bytes.
INLINE void store_bytes(int8_t* to, const Ints& v) {
    FOR_PARTS {
        const BytePart bytes = __builtin_convertvector(v.part[i], BytePart);
        std::memcpy(to + i * kPartLanes, &bytes, sizeof(bytes));
    }
}

INLINE Floats load_bytes(const uint8_t* from) {
    Floats v;
    for (int i = 0; i < kParts; ++i)
        for (int lane = 0; lane < kPartLanes; ++lane)
            v.part[i][lane] = static_cast<float>(from[i * kPartLanes + lane]);
    return v;
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Weights are stored as value + 128. Where the processor multiplies unsigned with signed bytes, 128 is
// part of the product, and the excess is known: 128 times the sum of x.
constexpr int kByteExcess = 128;
#else
constexpr int kByteExcess = 0;
#endif

// sum[lane] += the four bytes of the lane's word, less 128 - kByteExcess, times the four bytes of x.
INLINE Ints add_bytes_product(Ints sum, const Words& w, int32_t x) {
#if defined(__AVX512VNNI__)
    sum.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)sum.part[0], (__m512i)w.part[0],
                                               _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
    FOR_PARTS sum.part[i] = (IntPart)_mm256_dpbusd_avx_epi32((__m256i)sum.part[i], (__m256i)w.part[i],
                                                             _mm256_set1_epi32(x));
#elif defined(__AVX2__)
    // Products of unsigned and signed bytes are added in pairs to 16 bits: |x| times w with x's sign fits.
    const __m256i bytes = _mm256_set1_epi32(x), magnitude = _mm256_abs_epi8(bytes);
    FOR_PARTS {
        const __m256i weights = _mm256_xor_si256((__m256i)w.part[i], _mm256_set1_epi8(-128));
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(weights, bytes));
        sum.part[i] += (IntPart)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#elif defined(__SSE2__)
    // As pairs of 16 bits: bytes 0 and 2 of a word, and bytes 1 and 3.
    const __m128i bytes = _mm_set1_epi32(x), high_bits = _mm_set1_epi32(static_cast<int>(0x80808080u));
    const __m128i even = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8), odd = _mm_srai_epi16(bytes, 8);
    FOR_PARTS {
        const __m128i weights = _mm_xor_si128((__m128i)w.part[i], high_bits);
        const __m128i pairs = _mm_srai_epi16(_mm_slli_epi16(weights, 8), 8);
        sum.part[i] += (IntPart)_mm_madd_epi16(pairs, even) +
                       (IntPart)_mm_madd_epi16(_mm_srai_epi16(weights, 8), odd);
    }
#elif defined(__ARM_FEATURE_DOTPROD)
    FOR_PARTS {
        const int8x16_t weights = vreinterpretq_s8_u32((uint32x4_t)(w.part[i] ^ 0x80808080u));
        sum.part[i] = (IntPart)vdotq_s32((int32x4_t)sum.part[i], weights,
                                         vreinterpretq_s8_s32(vdupq_n_s32(x)));
    }
#else
    for (int byte = 0; byte < 4; ++byte) {
        const int32_t factor = static_cast<int8_t>(x >> (8 * byte));
        FOR_PARTS {
            const IntPart value = (IntPart)((w.part[i] >> (8 * byte)) & 0xffu) - 128;
            sum.part[i] += value * factor;
        }
    }
#endif
    return sum;
}

// sum[lane] += the four bytes of the lane's word, 0 to 15 each, times the four bytes of x.
INLINE Ints add_nibbles_product(Ints sum, const Words& w, int32_t x) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return add_bytes_product(sum, w, x);
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_set1_epi32(x);
    FOR_PARTS {
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)w.part[i], bytes);
        sum.part[i] += (IntPart)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return sum;
#else
    return add_bytes_product(sum, w ^ Words::all(0x80808080u), x);
#endif
}

// Byte `byte` of each word moved to its top, noughts below.
INLINE Words top_byte(const Words& words, int byte) {
    Words v;
#if defined(__AVX512BW__)
    const __m512i order = _mm512_set4_epi32(0x0c808080 + byte * 0x01000000, 0x08808080 + byte * 0x01000000,
                                            0x04808080 + byte * 0x01000000, 0x00808080 + byte * 0x01000000);
    v.part[0] = (WordPart)_mm512_shuffle_epi8((__m512i)words.part[0], order);
#else
    v = (words << (24 - 8 * byte)) & Words::all(0xff000000u);
#endif
    return v;
}

// Each byte, 0 to 15, becomes that entry of the table.
INLINE Words look_up(const Words& bytes, const uint8_t* table) {
    Words v;
#if defined(__AVX512BW__)
    const __m512i entries = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
    v.part[0] = (WordPart)_mm512_shuffle_epi8(entries, (__m512i)bytes.part[0]);
#elif defined(__AVX2__)
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    FOR_PARTS v.part[i] = (WordPart)_mm256_shuffle_epi8(entries, (__m256i)bytes.part[i]);
#elif defined(__ARM_NEON)
    FOR_PARTS v.part[i] = (WordPart)vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_u32((uint32x4_t)bytes.part[i]));
#else
    uint8_t items[64];
    bytes.store(items);
    for (int i = 0; i < 64; ++i) items[i] = table[items[i]];
    v = Words::load(items);
#endif
    return v;
}

INLINE void transpose(Words (&rows)[kLanes]);

// Rows become columns: word c of rows[r] and word r of columns[c] are the same.
INLINE void transpose(const uint32_t* const (&rows)[kLanes], uint32_t (&columns)[kLanes][kLanes]) {
#if defined(__AVX512F__)
    Words words[kLanes];
    for (int r = 0; r < kLanes; ++r) words[r] = Words::load(rows[r]);
    transpose(words);
    for (int c = 0; c < kLanes; ++c) words[c].store(columns[c]);
#elif defined(__AVX2__)
    // Eight by eight, from halves of rows: what crosses the halves of a register is done by loads.
    for (int r = 0; r < kLanes; r += 8)
        for (int c = 0; c < kLanes; c += 8) {
            __m256 a[8], b[8];
            for (int i = 0; i < 4; ++i)
                for (int half = 0; half < 2; ++half) {
                    const float* low = reinterpret_cast<const float*>(rows[r + i] + c + 4 * half);
                    const float* high = reinterpret_cast<const float*>(rows[r + 4 + i] + c + 4 * half);
                    a[4 * half + i] =
                        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
                }
            for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
            for (int half = 0; half < 8; half += 4)
                for (int j = 0; j < 2; ++j) {
                    float* to = reinterpret_cast<float*>(columns[c + half + 2 * j] + r);
                    _mm256_storeu_ps(to, _mm256_shuffle_ps(b[half + j], b[half + 2 + j], 0x44));
                    _mm256_storeu_ps(to + kLanes, _mm256_shuffle_ps(b[half + j], b[half + 2 + j], 0xee));
                }
        }
#elif defined(__SSE2__)
    for (int r = 0; r < kLanes; r += 4)
        for (int c = 0; c < kLanes; c += 4) {
            __m128 a[4];
            for (int i = 0; i < 4; ++i) a[i] = _mm_loadu_ps(reinterpret_cast<const float*>(rows[r + i] + c));
            _MM_TRANSPOSE4_PS(a[0], a[1], a[2], a[3]);
            for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(columns[c + i] + r), a[i]);
        }
#else
    for (int r = 0; r < kLanes; ++r)
        for (int c = 0; c < kLanes; ++c) columns[c][r] = rows[r][c];
#endif
}

// Word c of rows[r] and word r of rows[c] change places.
INLINE void transpose(Words (&rows)[kLanes]) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = (__m512i)rows[i].part[0];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int half = 0; half < 16; half += 8)
        for (int j = 0; j < 4; ++j) {
            b[half + j] = _mm512_shuffle_i32x4(a[half + j], a[half + 4 + j], 0x88);
            b[half + 4 + j] = _mm512_shuffle_i32x4(a[half + j], a[half + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        const int to = (j & 3) + (j & 4);
        rows[to].part[0] = (WordPart)_mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
        rows[to + 8].part[0] = (WordPart)_mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
    }
#else
    uint32_t items[kLanes][kLanes], turned[kLanes][kLanes];
    const uint32_t* from[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r].store(items[r]), from[r] = items[r];
    transpose(from, turned);
    for (int c = 0; c < kLanes; ++c) rows[c] = Words::load(turned[c]);
#endif
}

// --- functions ----------------------------------------------------------------------------------------

// e^v to a relative error of 2e-7; below -87 about 1e-38, above 88 about 2e38. The polynomial is that of
// Cephes' expf; what is left of v after whole multiples of ln 2 is at most ln 2 / 2.
INLINE Floats exponential(const Floats& value) {
    const Floats v = larger(smaller(value, Floats::all(88.0f)), Floats::all(-87.0f));
    const Floats shifted = v * Floats::all(1.44269504f) + Floats::all(kNoFractions);
    const Floats turns = shifted - Floats::all(kNoFractions);
    Floats rest = v - turns * Floats::all(0.693359375f);
    rest = rest - turns * Floats::all(-2.12194440e-4f);
    Floats series = Floats::all(1.9875691500e-4f);
    series = series * rest + Floats::all(1.3981999507e-3f);
    series = series * rest + Floats::all(8.3334519073e-3f);
    series = series * rest + Floats::all(4.1665795894e-2f);
    series = series * rest + Floats::all(1.6666665459e-1f);
    series = series * rest + Floats::all(5.0000001201e-1f);
    series = series * (rest * rest) + rest + Floats::all(1.0f);
    const Ints power = (reinterpret<Ints>(shifted) - Ints::all(0x4B400000 - 127)) << 23;
    return series * reinterpret<Floats>(power);
}

// tanh v = 1 - 2 / (e^2v + 1); the absolute error is about 1e-7.
INLINE Floats hyperbolic_tangent(const Floats& v) {
    const Floats one = Floats::all(1.0f);
    return one - Floats::all(2.0f) / (exponential(v + v) + one);
}

}  // namespace
