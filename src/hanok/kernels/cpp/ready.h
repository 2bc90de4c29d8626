// Whole-number products for several tokens where the processor multiplies bytes in pairs only (AVX2).
//
// A chunk of a panel is made ready once and multiplied with all tokens. Four bits, 0 to 15, times int8 are
// added in pairs to 16 bits, and the eight pairs of a block still fit: 8 * 2 * 15 * 127 < 2^15. Eight bits
// do not, so both sides become 16 bits wide, two of them in a word.

#pragma once

#include "kernels.h"
#include "lanes.h"

namespace {

// A tile is 16 rows, two registers, and so many tokens.
constexpr int kReadyTokens = 4;

constexpr bool is_wide(int kind) { return kind == kBytes || kind == kTable; }
// Of a block of 32 columns and 16 rows.
constexpr int64_t ready_bytes(int kind) { return is_wide(kind) ? 1024 : 512; }

INLINE __m256i load_register(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
INLINE void store_register(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

// Signed bytes as two registers of 16 bits: bytes 0 and 2 of each word, then 1 and 3.
INLINE void store_wide(uint8_t* to, int64_t apart, __m256i bytes) {
    store_register(to, _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
    store_register(to + apart, _mm256_srai_epi16(bytes, 8));
}

// One block of codes: vectors of 16 words, in each four columns of a row, or two where they are wide.
template <int kKind>
INLINE void make_ready(const uint8_t* codes, const uint8_t* table, uint8_t* to) {
    const __m256i half = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(-128);
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    for (int j = 0; j < (kKind == kBytes ? 8 : 4); ++j)
        for (int part = 0; part < 2; ++part) {
            const __m256i words = load_register(codes + 64 * j + 32 * part);
            const __m256i low = _mm256_and_si256(words, half);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(words, 4), half);
            if (kKind == kBytes) {
                store_wide(to + 128 * j + 32 * part, 64, _mm256_xor_si256(words, sign));
            } else if (kKind == kTable) {
                store_wide(to + 128 * j + 32 * part, 64, _mm256_xor_si256(_mm256_shuffle_epi8(entries, low), sign));
                store_wide(to + 128 * (4 + j) + 32 * part, 64,
                           _mm256_xor_si256(_mm256_shuffle_epi8(entries, high), sign));
            } else {
                store_register(to + 64 * j + 32 * part, low);
                store_register(to + 64 * (4 + j) + 32 * part, high);
            }
        }
}

// x of a block as the product wants it: bytes as they are, or words of 16 bits in make_ready's order.
INLINE void widen_codes(const int8_t* from, int64_t count, int16_t* to) {
    for (int64_t i = 0; i < count; i += 4) {
        to[i] = from[i], to[i + 1] = from[i + 2];
        to[i + 2] = from[i + 1], to[i + 3] = from[i + 3];
    }
}

INLINE __m256i word_of(const void* from) {
    int32_t word;
    std::memcpy(&word, from, 4);
    return _mm256_set1_epi32(word);
}

// whole[t] += a block times the tokens' x, `stride` bytes from token to token.
template <int kKind, int kTokens>
INLINE void add_block(const uint8_t* ready, const char* x, int64_t stride, __m256i (&whole)[kTokens][2]) {
    if constexpr (is_wide(kKind)) {
#pragma GCC unroll 4
        for (int j = 0; j < 16; ++j) {
            const __m256i first = load_register(ready + 64 * j), second = load_register(ready + 64 * j + 32);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
                const __m256i factors = word_of(x + t * stride + 4 * j);
                whole[t][0] = _mm256_add_epi32(whole[t][0], _mm256_madd_epi16(first, factors));
                whole[t][1] = _mm256_add_epi32(whole[t][1], _mm256_madd_epi16(second, factors));
            }
        }
    } else {
        __m256i pairs[kTokens][2];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const __m256i first = load_register(ready + 64 * j), second = load_register(ready + 64 * j + 32);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
                const __m256i factors = word_of(x + t * stride + 4 * j);
                const __m256i low = _mm256_maddubs_epi16(first, factors);
                const __m256i high = _mm256_maddubs_epi16(second, factors);
                pairs[t][0] = j ? _mm256_add_epi16(pairs[t][0], low) : low;
                pairs[t][1] = j ? _mm256_add_epi16(pairs[t][1], high) : high;
            }
        }
        const __m256i ones = _mm256_set1_epi16(1);
        for (int t = 0; t < kTokens; ++t)
            for (int part = 0; part < 2; ++part)
                whole[t][part] =
                    _mm256_add_epi32(whole[t][part], _mm256_madd_epi16(pairs[t][part], ones));
    }
}

}  // namespace
