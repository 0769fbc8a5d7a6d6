// The loops for AVX-512 with its byte permutations (VBMI) and byte products (VNNI): the same bits as those in portable.h.
//
// The 16 books lie in four registers. A codeword's index is its code with the number of its block's book above: two permutations of
// 128 entries each (vpermi2b) and a blend by the index's highest bit look up 64, those of two blocks of four rows. Codewords are
// looked up 32 or 128 too large, so that products of unsigned with signed bytes serve, four of which are added in 32 bits and never
// saturate (vpdpbusd): one loop for codewords of 6 and of 8 bits, times codewords or digits. What is too much, so many times the
// sum of the activations' codes, comes off at the end.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include "avx2.h"

#ifndef AVX512  // tests define it, and the instructions' names, to run these loops on other processors
#define AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#endif
#define AVX512_INLINE AVX512 inline __attribute__((always_inline))

namespace avx512 {

using avx2::CHUNK;

inline bool is_supported() {
    return avx2::is_supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

// The book with the least sum of squared errors for a block; the first of equals. steps: of its numbers, see Books::nearest.
template <int BLOCK>
AVX512_INLINE int best_book(const Books& books, const float* block, const int32_t* steps) {
    __m512 errors = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i) {
        const __m512 error = _mm512_sub_ps(_mm512_loadu_ps(books.nearest[steps[i]]), _mm512_set1_ps(block[i]));
        errors = _mm512_add_ps(errors, _mm512_mul_ps(error, error));
    }
    return __builtin_ctz(_mm512_cmpeq_ps_mask(errors, _mm512_set1_ps(_mm512_reduce_min_ps(errors))));
}

template <int BLOCK>
AVX512 void encode_blocks(const Books& books, const float* values, float global_scale, int64_t first, int64_t last, int64_t token,
                          Tokens& tokens) {
    const __m512 largest = _mm512_set1_ps(static_cast<float>(books.largest));
    const __m512 smallest = _mm512_sub_ps(_mm512_setzero_ps(), largest);
    const __m512i middle = _mm512_set1_epi32(2 * books.largest);
    const int array = tokens.layout.array;
    const int64_t arrays = tokens.arrays();
    for (int64_t g = first; g < last; ++g) {
        const float scale = scale_of_array(avx2::amax_of(values + g * array, array), global_scale, books);
        const __m512 inverse = _mm512_set1_ps(scale > 0.0f ? global_scale / scale : 0.0f);
        alignas(64) float scaled[LARGEST_ARRAY];
        alignas(64) int32_t steps[LARGEST_ARRAY];
        for (int i = 0; i < array; i += 16) {
            const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(values + g * array + i), inverse);
            const __m512 clamped = _mm512_min_ps(_mm512_max_ps(value, smallest), largest);
            const __m512 half = _mm512_floor_ps(_mm512_add_ps(clamped, clamped));
            _mm512_storeu_ps(scaled + i, value);
            _mm512_storeu_si512(steps + i, _mm512_add_epi32(_mm512_cvtps_epi32(half), middle));
        }
        int8_t* codes = tokens.codes + token * tokens.columns + g * array;
        int32_t sum = 0;
        for (int b = 0; b < array; b += BLOCK) {
            const int best = best_book<BLOCK>(books, scaled + b, steps + b);
            for (int i = b; i < b + BLOCK; ++i) sum += codes[i] = books.nearest_codeword[steps[i]][best];
        }
        tokens.scales[token * arrays + g] = scale * 256.0f;
        tokens.offsets[token * arrays + g] = 32 * sum;
    }
}

AVX512 void encode(const Books& books, const float* values, float global_scale, int64_t first, int64_t last, int64_t token,
                   Tokens& tokens) {
    const int block = tokens.layout.block;
    const auto encode = block == 8 ? encode_blocks<8> : block == 4 ? encode_blocks<4> : encode_blocks<2>;
    encode(books, values, global_scale, first, last, token, tokens);
}

struct Entries {
    __m512i parts[4];  // of four books each
};

AVX512_INLINE Entries load(const uint8_t* entries) {
    Entries all;
    for (int i = 0; i < 4; ++i) all.parts[i] = _mm512_loadu_si512(entries + i * 64);
    return all;
}

AVX512_INLINE __m512i pick(const Entries& entries, __m512i index) {
    const __m512i low = _mm512_permutex2var_epi8(entries.parts[0], index, entries.parts[1]);
    const __m512i high = _mm512_permutex2var_epi8(entries.parts[2], index, entries.parts[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

constexpr int64_t EACH = 0x0101010101010101;  // byte of a lane
constexpr int SELECT = 0xB8;  // for ternarylogic: bits of the third where the second has ones, else of the first

// 128 codewords of two strips of blocks of 8: `low` of rows 0, 1, 4, 5 and `high` of rows 2, 3, 6, 7, the second strip's after the
// first's.
AVX512_INLINE void look_up(const Entries& entries, const uint8_t* codes, const uint8_t* selectors, __m512i& low, __m512i& high) {
    const __m512i four_bits = _mm512_set1_epi8(15), down = _mm512_set1_epi8(16);
    // Four bits before those that have a book in the selectors of two strips, so that it comes to stand above a code.
    const __m512i first = _mm512_set_epi64(40 * EACH, 32 * EACH, 36 * EACH, 28 * EACH, 8 * EACH, 0, 4 * EACH, 60 * EACH);
    int64_t sixteen;
    std::memcpy(&sixteen, selectors, 8);
    const __m512i books = _mm512_set1_epi64(sixteen), both = _mm512_loadu_si512(codes);
    const __m512i first_books = _mm512_multishift_epi64_epi8(first, books);
    const __m512i second_books = _mm512_multishift_epi64_epi8(_mm512_add_epi8(first, down), books);
    low = pick(entries, _mm512_ternarylogic_epi64(first_books, four_bits, both, SELECT));
    high = pick(entries, _mm512_ternarylogic_epi64(second_books, four_bits, _mm512_srli_epi16(both, 4), SELECT));
}

// Above each code its book, whose halves of bytes are at `place` in `selectors`.
AVX512_INLINE __m512i with_books(__m512i codes, __m512i place, __m512i selectors) {
    const __m512i books = _mm512_permutexvar_epi8(place, selectors);
    constexpr __mmask64 LOW_HALVES = 0x0000FFFF0000FFFF;  // rows 0 to 3
    const __m512i above = _mm512_mask_blend_epi8(LOW_HALVES, books, _mm512_slli_epi16(books, 4));
    return _mm512_ternarylogic_epi64(above, _mm512_set1_epi8(15), codes, SELECT);
}

// The same of shorter blocks.
AVX512_INLINE void look_up(const Entries& entries, const Layout& layout, const uint8_t* codes, const uint8_t* selectors,
                           __m512i& low, __m512i& high) {
    const int64_t here = layout.block == 4 ? 0x0101010100000000 : 0x0303020201010000;  // blocks of a strip's columns
    const int64_t next = here + layout.selector_bytes() * EACH, row = layout.has_bits() ? 0 : layout.blocks() * EACH;
    const __m512i all = _mm512_loadu_si512(selectors), both = _mm512_loadu_si512(codes);
    __m512i place = _mm512_set_epi64(next + row, next, next + row, next, here + row, here, here + row, here);
    low = _mm512_and_si512(both, _mm512_set1_epi8(15));
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
    if (layout.has_bits()) {
        const __m512i low_rows = _mm512_set_epi64(32 * EACH, 16 * EACH, 2 * EACH, EACH, 32 * EACH, 16 * EACH, 2 * EACH, EACH);
        const __m512i high_rows = _mm512_slli_epi16(low_rows, 2);
        for (int bit = 0; bit < layout.selector_bits; ++bit) {
            const __m512i bits = _mm512_permutexvar_epi8(place, all), book = _mm512_set1_epi8(static_cast<char>(ENTRIES << bit));
            low = _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(bits, low_rows), low, book);
            high = _mm512_mask_add_epi8(high, _mm512_test_epi8_mask(bits, high_rows), high, book);
            place = _mm512_add_epi8(place, _mm512_set1_epi8(static_cast<char>(layout.blocks())));
        }
    } else {
        low = with_books(low, place, all);
        high = with_books(high, _mm512_add_epi8(place, _mm512_set1_epi8(static_cast<char>(2 * layout.blocks()))), all);
    }
    low = pick(entries, low);
    high = pick(entries, high);
}

// 16 activations of two strips beside the codewords of either.
AVX512_INLINE __m512i beside(const int8_t* codes) {
    const __m512i sixteen = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_permutexvar_epi64(_mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0), sixteen);
}

// Sums of a row stand in two places of either half.
AVX512_INLINE __m256i sum_of_halves(__m512i sums) {
    return _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
}

struct Tile {
    const Layout& layout;
    const uint8_t* arrays;
    const __m512i* numbers;  // codewords that were looked up before, a register per strip, or null
    int too_large;  // what was added to codewords, over 32
};

// Arrays first to last of a tile times NUM_TOKENS tokens, added to totals. IS_USUAL: the tile has the layout USUAL.
template <int NUM_TOKENS, bool IS_LOOKED_UP, bool IS_USUAL>
AVX512_INLINE void add_codes(const Entries& entries, const Tile& tile, const Tokens& tokens, int64_t token, int64_t first,
                             int64_t last, float (*totals)[HEIGHT]) {
    const Layout layout = IS_USUAL ? avx2::USUAL : tile.layout;
    const int strips = layout.strips();
    const int64_t arrays = tokens.arrays();
    __m256 total[NUM_TOKENS];
    for (int t = 0; t < NUM_TOKENS; ++t) total[t] = _mm256_loadu_ps(totals[t]);
    for (int64_t g = first; g < last; ++g) {
        const uint8_t* array = tile.arrays + g * layout.array_bytes();
        if (!IS_LOOKED_UP) avx2::prefetch(array, layout.array_bytes());
        __m512i sums[NUM_TOKENS][2];
        for (int t = 0; t < NUM_TOKENS; ++t) sums[t][0] = sums[t][1] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int s = 0; s < strips; s += 2) {
            __m512i weights[2];
            if (IS_LOOKED_UP) {
                for (int part = 0; part < 2; ++part) weights[part] = tile.numbers[(g - first) * strips + s + part];
            } else {
                look_up(entries, array + s * 32, array + layout.selectors_at() + s * 4, weights[0], weights[1]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < NUM_TOKENS; ++t) {
                const __m512i x = beside(tokens.codes + (token + t) * tokens.columns + (g * strips + s) * WIDTH);
                for (int part = 0; part < 2; ++part) sums[t][part] = _mm512_dpbusd_epi32(sums[t][part], weights[part], x);
            }
        }
        const __m256 scales = avx2::weight_scales(array + layout.scales_at());
#pragma GCC unroll 4
        for (int t = 0; t < NUM_TOKENS; ++t) {
            const int64_t place = (token + t) * arrays + g;
            __m256i sum = _mm256_hadd_epi32(sum_of_halves(sums[t][0]), sum_of_halves(sums[t][1]));
            sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(tile.too_large * tokens.offsets[place]));
            const __m256 both = _mm256_mul_ps(scales, _mm256_set1_ps(tokens.scales[place]));
            total[t] = _mm256_add_ps(total[t], _mm256_mul_ps(_mm256_cvtepi32_ps(sum), both));
        }
    }
    for (int t = 0; t < NUM_TOKENS; ++t) _mm256_storeu_ps(totals[t], total[t]);
}

template <bool IS_LOOKED_UP, bool IS_USUAL>
AVX512_INLINE void add_codes(const Entries& entries, const Tile& tile, const Tokens& tokens, int64_t token, int64_t count,
                             int64_t first, int64_t last, float (*totals)[HEIGHT]) {
    if (count == 1) add_codes<1, IS_LOOKED_UP, IS_USUAL>(entries, tile, tokens, token, first, last, totals);
    else if (count == 2) add_codes<2, IS_LOOKED_UP, IS_USUAL>(entries, tile, tokens, token, first, last, totals);
    else if (count == 3) add_codes<3, IS_LOOKED_UP, IS_USUAL>(entries, tile, tokens, token, first, last, totals);
    else add_codes<4, IS_LOOKED_UP, IS_USUAL>(entries, tile, tokens, token, first, last, totals);
}

template <bool IS_USUAL>
AVX512 void multiply_tile(const Entries& entries, Tile tile, const Tokens& tokens, int64_t first, int64_t last, Totals& totals) {
    const Layout layout = IS_USUAL ? avx2::USUAL : tile.layout;
    const int64_t arrays = tokens.arrays();
    if (last - first <= 4 && layout.block == 8) {
        add_codes<false, IS_USUAL>(entries, tile, tokens, first, last - first, 0, arrays, totals);
        return;
    }
    __m512i numbers[CHUNK * MOST_STRIPS];
    tile.numbers = numbers;
    for (int64_t g = 0; g < arrays; g += CHUNK) {
        const int64_t end = g + CHUNK < arrays ? g + CHUNK : arrays;
        for (int64_t h = g; h < end; ++h) {
            const uint8_t* array = tile.arrays + h * layout.array_bytes();
            avx2::prefetch(array, layout.array_bytes());
            for (int s = 0; s < layout.strips(); s += 2) {
                __m512i* both = numbers + (h - g) * layout.strips() + s;
                const uint8_t *codes = array + s * 32, *selectors = array + layout.selectors_at() + s * layout.selector_bytes();
                if (layout.block == 8) look_up(entries, codes, selectors, both[0], both[1]);
                else look_up(entries, layout, codes, selectors, both[0], both[1]);
            }
        }
        for (int64_t m = first; m < last; m += 4)
            add_codes<true, IS_USUAL>(entries, tile, tokens, m, last - m < 4 ? last - m : 4, g, end, totals + (m - first));
    }
}

AVX512 void multiply(const Books& books, const Matrix& matrix, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
                     const Target& target) {
    Totals totals;
    std::memset(totals, 0, sizeof(float) * HEIGHT * static_cast<size_t>(last - first));
    const Entries entries = load(books.shifted[0]);
    const Tile here{matrix.layout, matrix.array(tile, 0), nullptr, books.is_narrow() ? 1 : 4};
    if (avx2::is_usual(matrix.layout)) multiply_tile<true>(entries, here, tokens, first, last, totals);
    else multiply_tile<false>(entries, here, tokens, first, last, totals);
    for (int64_t m = first; m < last; m += tokens.planes) store(totals + (m - first), matrix, tile, m, tokens, target);
}

}  // namespace avx512

#endif
