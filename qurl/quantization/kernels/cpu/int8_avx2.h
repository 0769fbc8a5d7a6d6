// The loops over INT8 codes for AVX2.
//
// Two columns of 8 rows, as 16 bits, are a register of whole codes, and two codes of a token are the other factor in all of its
// places: 16 products and 8 sums are one instruction (pmaddwd), exact for every code. Four columns of the numbers of kept blocks, as
// bytes, go with four codes of a token (pmaddubsw), 2 * 30 * 128 < 2^15; sums over a group are taken in 16 bits, modulo 2^16, with
// the offset of the numbers off they stay within 8 * 15 * 128 < 2^15, and the shift is part of their way to 32 bits (pmaddwd).
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include "int8_portable.h"

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace int8::avx2 {

constexpr int AHEAD = 2048;    // bytes between what is read and what is asked for
constexpr int64_t CHUNK = 16;  // groups that are decoded before many tokens are multiplied with them

enum class Kind { whole, nibbles, plane };

constexpr int num_registers(Kind kind) { return kind == Kind::whole ? 8 : 5; }  // of a group

AVX2 float encode(const Source& source, int64_t token, int64_t columns, float* values, int8_t* codes) {
    const float scale = scale_of(load_token(source, token, columns, values));
    if (!std::isfinite(scale)) {
        std::memset(codes, 0, static_cast<size_t>(columns));
        return scale;
    }
    const float inverse = inverse_of(scale);
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
        const __m256i some = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(inverse)));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(some), _mm256_extracti128_si256(some, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packs_epi16(words, words));
    }
    for (; i < columns; ++i) codes[i] = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(values[i] * inverse)));
    return scale;
}

AVX2 void complete(const Layout& layout, int64_t token, Tokens& tokens) { int8::complete(layout, token, tokens); }

AVX2_INLINE __m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

// The same 4 bytes everywhere.
AVX2_INLINE __m256i repeat(const void* bytes) {
    int four;
    std::memcpy(&four, bytes, 4);
    return _mm256_set1_epi32(four);
}

// How the shifts of 8 rows are found.
struct Shifts {
    __m256i places;   // of their bits in a word that ends with them
    __m256i factors;  // by the number of the lowest block, whose bits above lowest_bits say nothing; two of 16 bits each

    AVX2 explicit Shifts(const Layout& layout) {
        alignas(32) int place[HEIGHT], factor[HEIGHT];
        for (int r = 0; r < HEIGHT; ++r) {
            place[r] = 32 + (r - HEIGHT) * layout.lowest_bits;
            factor[r] = (1 << (r & ((1 << layout.lowest_bits) - 1)) * layout.block_bits) * 0x10001;
        }
        places = _mm256_load_si256(reinterpret_cast<const __m256i*>(place));
        factors = _mm256_load_si256(reinterpret_cast<const __m256i*>(factor));
    }
};

struct Tile {
    const Layout& layout;
    const uint8_t* arrays;
    const Shifts& shifts;
};

// A group's numbers, and the factors of its shifts.
template <Kind KIND>
AVX2_INLINE void decode(const Tile& tile, const uint8_t* array, int half, __m256i* numbers) {
    if constexpr (KIND == Kind::whole) {
        for (int i = 0; i < 8; ++i)
            numbers[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(array + (half * 8 + i) * 16)));
        return;
    }
    const __m256i four_bits = _mm256_set1_epi8(15), fifth_bit = _mm256_set1_epi8(16);
    for (int b = 0; b < 2; ++b) {
        const __m256i both = load(array + (half * 2 + b) * PART);
        numbers[2 * b] = _mm256_and_si256(both, four_bits);
        numbers[2 * b + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), four_bits);
    }
    if constexpr (KIND == Kind::plane) {
        __m256i plane = load(array + PLANE);
        if (half == 0) plane = _mm256_slli_epi16(plane, 4);
        for (int i = 0; i < 4; ++i) numbers[i] = _mm256_or_si256(numbers[i], _mm256_and_si256(_mm256_srli_epi16(plane, i), fifth_bit));
    }
    const uint8_t* end = array + tile.layout.lowest() + (half + 1) * tile.layout.lowest_bits;
    numbers[4] = _mm256_permutevar8x32_epi32(tile.shifts.factors, _mm256_srlv_epi32(repeat(end - 4), tile.shifts.places));
}

// Groups first to last of a tile times NUM_TOKENS tokens, added to totals. numbers: decoded before, or null.
template <int NUM_TOKENS, Kind KIND, bool IS_DECODED>
AVX2_INLINE void add_codes(const Tile& tile, const __m256i* numbers, const Tokens& tokens, int64_t token, int64_t first, int64_t last,
                           int32_t (*totals)[HEIGHT]) {
    __m256i total[NUM_TOKENS];
    for (int t = 0; t < NUM_TOKENS; ++t) total[t] = load(totals[t]);
    const int64_t bytes = tile.layout.array_bytes();
    for (int64_t a = first / 2; a < last / 2; ++a) {
        const uint8_t* array = tile.arrays + a * bytes;
        if (!IS_DECODED)
            for (int line = 0; line < (KIND == Kind::whole ? 256 : 192); line += 64)
                _mm_prefetch(reinterpret_cast<const char*>(array + AHEAD + line), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const int64_t g = 2 * a + half;
            __m256i own[num_registers(KIND)];
            if (!IS_DECODED) decode<KIND>(tile, array, half, own);
            const __m256i* weights = IS_DECODED ? numbers + (g - first) * num_registers(KIND) : own;
#pragma GCC unroll 8
            for (int t = 0; t < NUM_TOKENS; ++t) {
                if constexpr (KIND == Kind::whole) {
                    const int16_t* x = tokens.wide + (token + t) * tokens.columns + g * GROUP;
                    for (int i = 0; i < 8; ++i)
                        total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(weights[i], repeat(x + 2 * i)));
                } else {
                    const int8_t* x = tokens.codes + (token + t) * tokens.columns + g * GROUP;
                    __m256i sums = repeat(tokens.offsets + ((token + t) * tokens.groups() + g) * 2);
                    for (int i = 0; i < 4; ++i) sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights[i], repeat(x + 4 * i)));
                    total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(sums, weights[4]));
                }
            }
        }
    }
    for (int t = 0; t < NUM_TOKENS; ++t) _mm256_storeu_si256(reinterpret_cast<__m256i*>(totals[t]), total[t]);
}

template <Kind KIND, bool IS_DECODED>
AVX2_INLINE void add_codes(const Tile& tile, const __m256i* numbers, const Tokens& tokens, int64_t token, int64_t count, int64_t first,
                           int64_t last, int32_t (*totals)[HEIGHT]) {
    if (count == 1) add_codes<1, KIND, IS_DECODED>(tile, numbers, tokens, token, first, last, totals);
    else if (count == 2) add_codes<2, KIND, IS_DECODED>(tile, numbers, tokens, token, first, last, totals);
    else if (count == 3) add_codes<3, KIND, IS_DECODED>(tile, numbers, tokens, token, first, last, totals);
    else add_codes<4, KIND, IS_DECODED>(tile, numbers, tokens, token, first, last, totals);
}

template <Kind KIND>
AVX2 void multiply_codes(const Tile& tile, const Tokens& tokens, int64_t first, int64_t last, Totals& totals) {
    const int64_t groups = tokens.groups();
    if (last - first <= 4) {
        add_codes<KIND, false>(tile, nullptr, tokens, first, last - first, 0, groups, totals);
        return;
    }
    __m256i numbers[CHUNK * num_registers(KIND)];
    for (int64_t g = 0; g < groups; g += CHUNK) {
        const int64_t end = std::min(g + CHUNK, groups);
        for (int64_t a = g / 2; a < end / 2; ++a) {
            const uint8_t* array = tile.arrays + a * tile.layout.array_bytes();
            for (int half = 0; half < 2; ++half) decode<KIND>(tile, array, half, numbers + (2 * a + half - g) * num_registers(KIND));
        }
        for (int64_t m = first; m < last; m += 4)
            add_codes<KIND, true>(tile, numbers, tokens, m, std::min<int64_t>(last - m, 4), g, end, totals + (m - first));
    }
}

AVX2 void multiply(const Matrix& matrix, const float* row_scales, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
                   const Target& target) {
    Totals totals;
    std::memset(totals, 0, sizeof(int32_t) * HEIGHT * static_cast<size_t>(last - first));
    const Shifts shifts(matrix.layout);
    const Tile here{matrix.layout, matrix.array(tile, 0), shifts};
    if (matrix.layout.is_whole()) multiply_codes<Kind::whole>(here, tokens, first, last, totals);
    else if (matrix.layout.has_plane()) multiply_codes<Kind::plane>(here, tokens, first, last, totals);
    else multiply_codes<Kind::nibbles>(here, tokens, first, last, totals);
    store<HEIGHT>(totals, matrix, row_scales, tile * HEIGHT, first, last, tokens, target);
}

}  // namespace int8::avx2

#undef AVX2
#undef AVX2_INLINE

#endif
