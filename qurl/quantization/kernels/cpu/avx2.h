// The loops for AVX2 and F16C: the same bits as those in portable.h.
//
// A byte shuffle looks 16 codes of a book up. A register of 32 codes spans four blocks and two halves: two shuffles, each with a
// book in either half, and a blend. Codewords of 6 bits are looked up 32 too large, so that unsigned times signed bytes
// (pmaddubsw) serves without splitting signs off, and all 8 products of two that a 16-bit sum gets stay within 8 * 2 * 63 * 31 <
// 2^15; 32 times the sum of the activations' codewords comes off at the end. Those of 8 bits trade signs (psignb) and are widened
// to 32 bits after every product, since 2 * 127 * 127 < 2^15 but twice that is not.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include "portable.h"

#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace avx2 {

constexpr int CHUNK = 8;  // arrays of a tile that are looked up before many tokens are multiplied with them

AVX2 float load(const Source& source, int64_t token, int64_t columns, float* values) {
    return load_token(source, token, columns, values);
}

AVX2_INLINE float largest_of(__m256 values) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

AVX2_INLINE float array_scale(const float* values, float global_scale, const Books& books) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 amax = _mm256_setzero_ps();
    for (int i = 0; i < ARRAY; i += 8) amax = _mm256_max_ps(amax, _mm256_andnot_ps(sign, _mm256_loadu_ps(values + i)));
    return scale_of_array(largest_of(amax), global_scale, books);
}

// The book with the least sum of squared errors for a block; the first of equals. steps: of its numbers, see Books::nearest.
AVX2_INLINE int best_book(const Books& books, const float* block, const int32_t* steps) {
    __m256 errors[2];
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i) {
        const __m256 value = _mm256_broadcast_ss(block + i);
        for (int part = 0; part < 2; ++part) {
            const __m256 error = _mm256_sub_ps(_mm256_load_ps(books.nearest[steps[i]] + 8 * part), value);
            const __m256 square = _mm256_mul_ps(error, error);
            errors[part] = i ? _mm256_add_ps(errors[part], square) : square;
        }
    }
    __m256 least = _mm256_min_ps(errors[0], errors[1]);
    least = _mm256_min_ps(least, _mm256_permute2f128_ps(least, least, 1));
    least = _mm256_min_ps(least, _mm256_permute_ps(least, 0x4E));
    least = _mm256_min_ps(least, _mm256_permute_ps(least, 0xB1));
    const __m256i equal = _mm256_packs_epi32(_mm256_castps_si256(_mm256_cmp_ps(errors[0], least, _CMP_EQ_OQ)),
                                             _mm256_castps_si256(_mm256_cmp_ps(errors[1], least, _CMP_EQ_OQ)));
    const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(equal, 0xD8)));
    return __builtin_ctz(bits) / 2;  // two bits for each book, in order
}

AVX2 void encode(const Books& books, const float* values, float global_scale, int64_t first, int64_t last, int64_t token,
                 Tokens& tokens) {
    const __m256 largest = _mm256_set1_ps(static_cast<float>(books.largest)), smallest = _mm256_sub_ps(_mm256_setzero_ps(), largest);
    const __m256i middle = _mm256_set1_epi32(2 * books.largest);
    for (int64_t g = first; g < last; ++g) {
        const float scale = array_scale(values + g * ARRAY, global_scale, books);
        const __m256 inverse = _mm256_set1_ps(scale > 0.0f ? global_scale / scale : 0.0f);
        alignas(32) float scaled[ARRAY];
        alignas(32) int32_t steps[ARRAY];
        for (int i = 0; i < ARRAY; i += 8) {
            const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(values + g * ARRAY + i), inverse);
            const __m256 clamped = _mm256_min_ps(_mm256_max_ps(value, smallest), largest);
            const __m256 half = _mm256_floor_ps(_mm256_add_ps(clamped, clamped));
            _mm256_store_ps(scaled + i, value);
            _mm256_store_si256(reinterpret_cast<__m256i*>(steps + i), _mm256_add_epi32(_mm256_cvtps_epi32(half), middle));
        }
        int8_t* codes = tokens.codes + token * tokens.columns + g * ARRAY;
        int best[BLOCKS];
        for (int b = 0; b < BLOCKS; ++b) best[b] = best_book(books, scaled + b * BLOCK, steps + b * BLOCK);
        int32_t sum = 0;
        for (int i = 0; i < ARRAY; ++i) sum += codes[i] = books.nearest_codeword[steps[i]][best[i / BLOCK]];
        tokens.scales[token * tokens.arrays() + g] = scale * 256.0f;
        tokens.offsets[token * tokens.arrays() + g] = 32 * sum;
    }
}

AVX2_INLINE __m256i pair(const uint8_t* pairs, uint32_t selector) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(pairs + selector * 2 * ENTRIES));
}

// 64 codewords: `low` of rows 0, 1, 4, 5 and `high` of rows 2, 3, 6, 7.
AVX2_INLINE void look_up(const uint8_t* pairs, const uint8_t* codes, const uint8_t* selectors, __m256i& low, __m256i& high) {
    const __m256i four_bits = _mm256_set1_epi8(15);
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i first = _mm256_and_si256(both, four_bits), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), four_bits);
    low = _mm256_blend_epi32(_mm256_shuffle_epi8(pair(pairs, selectors[0]), first),
                             _mm256_shuffle_epi8(pair(pairs, selectors[1]), first), 0xCC);
    high = _mm256_blend_epi32(_mm256_shuffle_epi8(pair(pairs, selectors[2]), second),
                              _mm256_shuffle_epi8(pair(pairs, selectors[3]), second), 0xCC);
}

// E4M3 scales of rows 0 to 7, times 2^-8.
AVX2_INLINE __m256 weight_scales(const uint8_t* scales) {
    const __m128i halves = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
    return _mm256_cvtph_ps(_mm_slli_epi16(halves, 7));  // E4M3 is float16 with fewer bits and another bias
}

struct Tile {
    const uint8_t *codes, *selectors, *scales;
    const __m256i* numbers;  // codewords that were looked up before, 16 registers per array, or null
};

// Arrays first to last of a tile times NUM_TOKENS tokens, added to totals.
template <int NUM_TOKENS, bool IS_NARROW, bool IS_LOOKED_UP>
AVX2_INLINE void add_codes(const uint8_t* pairs, const Tile& tile, const Tokens& tokens, int64_t token, int64_t first, int64_t last,
                           float (*totals)[HEIGHT]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 total[NUM_TOKENS];
    for (int t = 0; t < NUM_TOKENS; ++t) total[t] = _mm256_loadu_ps(totals[t]);
    for (int64_t g = first; g < last; ++g) {
        __m256i sums[NUM_TOKENS][2];
        for (int t = 0; t < NUM_TOKENS; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
        for (int b = 0; b < BLOCKS; ++b) {
            __m256i weights[2];
            if (IS_LOOKED_UP) {
                weights[0] = tile.numbers[((g - first) * BLOCKS + b) * 2];
                weights[1] = tile.numbers[((g - first) * BLOCKS + b) * 2 + 1];
            } else {
                look_up(pairs, tile.codes + (g * BLOCKS + b) * 32, tile.selectors + (g * BLOCKS + b) * 4, weights[0], weights[1]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < NUM_TOKENS; ++t) {
                int64_t eight;
                std::memcpy(&eight, tokens.codes + (token + t) * tokens.columns + g * ARRAY + b * BLOCK, 8);
                const __m256i x = _mm256_set1_epi64x(eight);
                for (int part = 0; part < 2; ++part) {
                    __m256i products;
                    if (IS_NARROW) {
                        products = _mm256_maddubs_epi16(weights[part], x);
                        sums[t][part] = _mm256_add_epi16(sums[t][part], products);
                    } else {
                        products = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights[part], x));
                        products = _mm256_madd_epi16(products, ones);
                        sums[t][part] = _mm256_add_epi32(sums[t][part], products);
                    }
                }
            }
        }
        const __m256 scales = weight_scales(tile.scales + g * HEIGHT);
#pragma GCC unroll 4
        for (int t = 0; t < NUM_TOKENS; ++t) {
            const int64_t place = (token + t) * tokens.arrays() + g;
            __m256i sum;
            if (IS_NARROW) {
                sum = _mm256_hadd_epi32(_mm256_madd_epi16(sums[t][0], ones), _mm256_madd_epi16(sums[t][1], ones));
                sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(tokens.offsets[place]));
            } else {
                sum = _mm256_hadd_epi32(sums[t][0], sums[t][1]);
            }
            const __m256 both = _mm256_mul_ps(scales, _mm256_set1_ps(tokens.scales[place]));
            total[t] = _mm256_add_ps(total[t], _mm256_mul_ps(_mm256_cvtepi32_ps(sum), both));
        }
    }
    for (int t = 0; t < NUM_TOKENS; ++t) _mm256_storeu_ps(totals[t], total[t]);
}

template <bool IS_NARROW, bool IS_LOOKED_UP>
AVX2_INLINE void add_codes(const uint8_t* pairs, const Tile& tile, const Tokens& tokens, int64_t token, int64_t count, int64_t first,
                           int64_t last, float (*totals)[HEIGHT]) {
    if (count == 1) add_codes<1, IS_NARROW, IS_LOOKED_UP>(pairs, tile, tokens, token, first, last, totals);
    else if (count == 2) add_codes<2, IS_NARROW, IS_LOOKED_UP>(pairs, tile, tokens, token, first, last, totals);
    else if (count == 3) add_codes<3, IS_NARROW, IS_LOOKED_UP>(pairs, tile, tokens, token, first, last, totals);
    else add_codes<4, IS_NARROW, IS_LOOKED_UP>(pairs, tile, tokens, token, first, last, totals);
}

template <bool IS_NARROW>
AVX2 void multiply_codes(const uint8_t* pairs, Tile tile, const Tokens& tokens, int64_t first, int64_t last, Totals& totals) {
    const int64_t arrays = tokens.arrays();
    if (last - first <= 4) {
        add_codes<IS_NARROW, false>(pairs, tile, tokens, first, last - first, 0, arrays, totals);
        return;
    }
    __m256i numbers[CHUNK * BLOCKS * 2];
    tile.numbers = numbers;
    for (int64_t g = 0; g < arrays; g += CHUNK) {
        const int64_t end = g + CHUNK < arrays ? g + CHUNK : arrays;
        for (int64_t b = g * BLOCKS; b < end * BLOCKS; ++b)
            look_up(pairs, tile.codes + b * 32, tile.selectors + b * 4, numbers[2 * (b - g * BLOCKS)], numbers[2 * (b - g * BLOCKS) + 1]);
        for (int64_t m = first; m < last; m += 4)
            add_codes<IS_NARROW, true>(pairs, tile, tokens, m, last - m < 4 ? last - m : 4, g, end, totals + (m - first));
    }
}

AVX2_INLINE __m256 widened(const int8_t* eight) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight))));
}

// One array of a tile times one token. numbers: codewords [8 blocks][rows 0, 1, 4, 5, 2, 3, 6, 7][8].
template <typename Number>
AVX2_INLINE __m256 sum_values(const Number* numbers, const float* x) {
    __m256 sums[HEIGHT];
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
        const __m256 eight = _mm256_loadu_ps(x + b * BLOCK);
#pragma GCC unroll 8
        for (int r = 0; r < HEIGHT; ++r) {
            const Number* place = numbers + (b * HEIGHT + r) * BLOCK;
            __m256 weights;
            if constexpr (sizeof(Number) == 1) weights = widened(place);
            else weights = _mm256_load_ps(place);
            const __m256 products = _mm256_mul_ps(weights, eight);
            sums[r] = b ? _mm256_add_ps(sums[r], products) : products;
        }
    }
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[4], sums[5]));   // rows 0 1 2 3
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(sums[2], sums[3]), _mm256_hadd_ps(sums[6], sums[7]));  // rows 4 5 6 7
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

AVX2 void multiply_values(const uint8_t* pairs, const Tile& tile, const Tokens& tokens, int64_t first, int64_t last, Totals& totals) {
    alignas(32) int8_t numbers[HEIGHT * ARRAY];
    alignas(32) float wide[HEIGHT * ARRAY];
    for (int64_t g = 0; g < tokens.arrays(); ++g) {
        for (int b = 0; b < BLOCKS; ++b) {
            __m256i low, high;
            look_up(pairs, tile.codes + (g * BLOCKS + b) * 32, tile.selectors + (g * BLOCKS + b) * 4, low, high);
            _mm256_store_si256(reinterpret_cast<__m256i*>(numbers + b * 64), low);
            _mm256_store_si256(reinterpret_cast<__m256i*>(numbers + b * 64 + 32), high);
        }
        const __m256 scales = _mm256_mul_ps(weight_scales(tile.scales + g * HEIGHT), _mm256_set1_ps(256.0f));
        if (last - first > 1)
            for (int i = 0; i < HEIGHT * ARRAY; i += 8) _mm256_store_ps(wide + i, widened(numbers + i));
        for (int64_t m = first; m < last; ++m) {
            const float* x = tokens.values + m * tokens.columns + g * ARRAY;
            const __m256 sum = last - first > 1 ? sum_values(wide, x) : sum_values(numbers, x);
            const __m256 total = _mm256_loadu_ps(totals[m - first]);
            _mm256_storeu_ps(totals[m - first], _mm256_add_ps(total, _mm256_mul_ps(sum, scales)));
        }
    }
}

AVX2 void multiply(const Books& books, const Matrix& matrix, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
                   const Target& target) {
    Totals totals;
    std::memset(totals, 0, sizeof(float) * HEIGHT * static_cast<size_t>(last - first));
    const Tile here{matrix.codes(tile), matrix.selectors(tile), matrix.scales(tile), nullptr};
    const uint8_t* pairs = reinterpret_cast<const uint8_t*>(books.pairs);
    if (tokens.values) multiply_values(pairs, here, tokens, first, last, totals);
    else if (books.is_narrow()) multiply_codes<true>(books.shifted_pairs[0], here, tokens, first, last, totals);
    else multiply_codes<false>(pairs, here, tokens, first, last, totals);
    for (int64_t m = first; m < last; ++m) store(totals[m - first], matrix, tile, m, tokens.values ? 1.0 : tokens.factors[m], target);
}

}  // namespace avx2

#endif
