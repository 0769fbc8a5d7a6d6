// The loops for AVX2 and F16C: the same bits as those in portable.h.
//
// A byte shuffle looks 16 codes of a book up. A register of 32 codes spans four blocks of 8 and two halves: two shuffles, each with
// a book in either half, and a blend. Blocks of 4 take four shuffles and blocks of 2 eight, unless there are so few books that each
// code is looked up in all of them and the selectors' bits blend. Codewords of 6 bits are looked up 32 too large, so that unsigned
// times signed bytes (pmaddubsw) serves without splitting signs off: with activations' codewords of 6 bits the 16 products that a
// 16-bit sum gets from an array of 64 stay within 16 * 63 * 31 < 2^15; with arrays of 128, codewords of 8 bits or digits 4 do,
// 4 * 63 * 128 < 2^15. 32 times the sum of the activations' codes comes off at the end. Weights of 8 bits trade signs (psignb) and
// are widened to 32 bits after every two products, since 2 * 128 * 127 < 2^15.
//
// There are loops for arrays of 64 and blocks of 8, which the package's codebooks have, and loops for all others. Codewords of
// shorter blocks are looked up before they are multiplied, however few tokens there are.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include "portable.h"

#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace avx2 {

constexpr int AHEAD = 2368;  // bytes between what is read and what is asked for: 8 arrays of 64
constexpr int CHUNK = 8;  // arrays of a tile that are looked up before many tokens are multiplied with them

constexpr Layout USUAL = {64, 8, 4};

inline bool is_usual(const Layout& layout) { return layout.array == USUAL.array && layout.block == USUAL.block; }

inline bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

// A block of 8 * REGISTERS numbers. Partners within a register are added to each other with the sign of the second turned.
template <int REGISTERS>
AVX2_INLINE void rotate_block(float* values) {
    const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi64x(static_cast<int64_t>(1ULL << 63)));
    const __m256 odd_pairs = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 upper_half = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    __m256 x[REGISTERS];
#pragma GCC unroll 16
    for (int k = 0; k < REGISTERS; ++k) {
        x[k] = _mm256_loadu_ps(values + 8 * k);
        x[k] = _mm256_add_ps(_mm256_permute_ps(x[k], 0xB1), _mm256_xor_ps(x[k], odd));
        x[k] = _mm256_add_ps(_mm256_permute_ps(x[k], 0x4E), _mm256_xor_ps(x[k], odd_pairs));
        x[k] = _mm256_add_ps(_mm256_permute2f128_ps(x[k], x[k], 1), _mm256_xor_ps(x[k], upper_half));
    }
#pragma GCC unroll 4
    for (int half = 1; half < REGISTERS; half *= 2) {
#pragma GCC unroll 16
        for (int k = 0; k < REGISTERS; ++k)
            if (!(k & half)) {
                const __m256 first = x[k], second = x[k + half];
                x[k] = _mm256_add_ps(first, second);
                x[k + half] = _mm256_sub_ps(first, second);
            }
    }
    const __m256 factor = _mm256_set1_ps(portable::rotation_factor(8 * REGISTERS));
#pragma GCC unroll 16
    for (int k = 0; k < REGISTERS; ++k) _mm256_storeu_ps(values + 8 * k, _mm256_mul_ps(x[k], factor));
}

template <int SIZE>
AVX2_INLINE void rotate_blocks(float* values, int64_t columns) {
    for (int64_t i = 0; i < columns; i += SIZE) rotate_block<SIZE / 8>(values + i);
}

AVX2 inline void rotate(float* values, int64_t columns, int size) {
    if (size == 16) rotate_blocks<16>(values, columns);
    else if (size == 32) rotate_blocks<32>(values, columns);
    else if (size == 64) rotate_blocks<64>(values, columns);
    else rotate_blocks<128>(values, columns);
}

AVX2 float load(const Source& source, int64_t token, int64_t columns, float* values) {
    const float amax = load_token(source, token, columns, values);
    if (!source.rotation) return amax;
    rotate(values, columns, source.rotation);
    return largest_magnitude(values, columns);
}

AVX2_INLINE float largest_of(__m256 values) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

AVX2_INLINE float amax_of(const float* values, int count) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 amax = _mm256_setzero_ps();
    for (int i = 0; i < count; i += 8) amax = _mm256_max_ps(amax, _mm256_andnot_ps(sign, _mm256_loadu_ps(values + i)));
    return largest_of(amax);
}

// The book with the least sum of squared errors for a block; the first of equals. steps: of its numbers, see Books::nearest.
template <int BLOCK>
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

template <int BLOCK>
AVX2 void encode_blocks(const Books& books, const float* values, float global_scale, int64_t first, int64_t last, int64_t token,
                        Tokens& tokens) {
    const __m256 largest = _mm256_set1_ps(static_cast<float>(books.largest));
    const __m256 smallest = _mm256_sub_ps(_mm256_setzero_ps(), largest);
    const __m256i middle = _mm256_set1_epi32(2 * books.largest);
    const int array = tokens.layout.array;
    const int64_t arrays = tokens.arrays();
    for (int64_t g = first; g < last; ++g) {
        const float scale = scale_of_array(amax_of(values + g * array, array), global_scale, books);
        const __m256 inverse = _mm256_set1_ps(scale > 0.0f ? global_scale / scale : 0.0f);
        alignas(32) float scaled[LARGEST_ARRAY];
        alignas(32) int32_t steps[LARGEST_ARRAY];
        for (int i = 0; i < array; i += 8) {
            const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(values + g * array + i), inverse);
            const __m256 clamped = _mm256_min_ps(_mm256_max_ps(value, smallest), largest);
            const __m256 half = _mm256_floor_ps(_mm256_add_ps(clamped, clamped));
            _mm256_store_ps(scaled + i, value);
            _mm256_store_si256(reinterpret_cast<__m256i*>(steps + i), _mm256_add_epi32(_mm256_cvtps_epi32(half), middle));
        }
        int8_t* codes = tokens.codes + token * tokens.columns + g * array;
        int best[LARGEST_ARRAY / BLOCK];
        for (int i = 0; i < array; i += BLOCK) best[i / BLOCK] = best_book<BLOCK>(books, scaled + i, steps + i);
        int32_t sum = 0;
        for (int i = 0; i < array; ++i) sum += codes[i] = books.nearest_codeword[steps[i]][best[i / BLOCK]];
        tokens.scales[token * arrays + g] = scale * 256.0f;
        tokens.offsets[token * arrays + g] = 32 * sum;
    }
}

AVX2 void encode(const Books& books, const float* values, float global_scale, int64_t first, int64_t last, int64_t token,
                 Tokens& tokens) {
    const int block = tokens.layout.block;
    const auto encode = block == 8 ? encode_blocks<8> : block == 4 ? encode_blocks<4> : encode_blocks<2>;
    encode(books, values, global_scale, first, last, token, tokens);
}

AVX2_INLINE int32_t sum_of(__m256i values) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

AVX2 void encode_digits(const Books&, const float* values, float token_scale, int64_t first, int64_t last, int64_t token,
                        Tokens& tokens) {
    const __m256i low_byte = _mm256_set1_epi32(255), half = _mm256_set1_epi32(128);
    const __m256i first_bytes = _mm256_set1_epi32(0x0C080400);
    const int array = tokens.layout.array;
    for (int64_t g = first; g < last; ++g) {
        const Digits digits(amax_of(values + g * array, array), token_scale);
        __m256i sums[DIGITS] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int i = 0; i < array; i += 8) {
            const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(values + g * array + i), _mm256_set1_ps(digits.first_factor));
            __m256i rest = _mm256_cvtps_epi32(_mm256_mul_ps(value, _mm256_set1_ps(digits.second_factor)));
            for (int digit = 0; digit < DIGITS; ++digit) {
                rest = _mm256_add_epi32(rest, half);
                const __m256i code = _mm256_sub_epi32(_mm256_and_si256(rest, low_byte), half);
                const __m256i bytes = _mm256_shuffle_epi8(code, first_bytes);  // of four numbers in either half
                rest = _mm256_srai_epi32(rest, 8);
                sums[digit] = _mm256_add_epi32(sums[digit], code);
                int8_t* codes = tokens.codes + (token * DIGITS + digit) * tokens.columns + g * array + i;
                _mm_storel_epi64(reinterpret_cast<__m128i*>(codes),
                                 _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
            }
        }
        const int32_t totals[DIGITS] = {sum_of(sums[0]), sum_of(sums[1]), sum_of(sums[2])};
        digits.store(totals, token, g, tokens);
    }
}

AVX2_INLINE __m256i pair(const uint8_t* pairs, uint32_t selector) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(pairs + selector * 2 * ENTRIES));
}

// Of a strip: `low` of rows 0, 1, 4, 5 and `high` of rows 2, 3, 6, 7.
struct Halves {
    __m256i low, high;
};

AVX2_INLINE Halves split(const uint8_t* codes) {
    const __m256i four_bits = _mm256_set1_epi8(15);
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return {_mm256_and_si256(both, four_bits), _mm256_and_si256(_mm256_srli_epi16(both, 4), four_bits)};
}

// Of half a strip the codewords of two rows' first blocks, up to number LAST, on either side.
template <int BLOCK, int LAST = 2 * WIDTH / BLOCK - 1>
AVX2_INLINE __m256i look_up_half(const uint8_t* pairs, __m256i codes, const uint8_t* selectors) {
    const __m256i last = _mm256_shuffle_epi8(pair(pairs, selectors[LAST]), codes);
    if constexpr (LAST == 0) {
        return last;
    } else {
        const __m256i others = look_up_half<BLOCK, LAST - 1>(pairs, codes, selectors);
        constexpr int SIDE = (BLOCK == 8 ? 3 : 1) << LAST * BLOCK / 4;
        if constexpr (BLOCK == 2) return _mm256_blend_epi16(others, last, 1 << LAST);
        else return _mm256_blend_epi32(others, last, SIDE | SIDE << 4);
    }
}

// A strip's codewords.
template <int BLOCK>
AVX2_INLINE Halves look_up(const uint8_t* pairs, const uint8_t* codes, const uint8_t* selectors) {
    const Halves here = split(codes);
    return {look_up_half<BLOCK>(pairs, here.low, selectors),
            look_up_half<BLOCK>(pairs, here.high, selectors + 2 * WIDTH / BLOCK)};
}

// A strip's codewords, each from one of 2^BITS books: bit i of its number is the sign of choices[i].
template <int BITS>
AVX2_INLINE Halves choose(const __m256i* books, const Halves& codes, const Halves* choices) {
    if constexpr (BITS == 0) {
        return {_mm256_shuffle_epi8(books[0], codes.low), _mm256_shuffle_epi8(books[0], codes.high)};
    } else {
        const Halves zero = choose<BITS - 1>(books, codes, choices);
        const Halves one = choose<BITS - 1>(books + (1 << (BITS - 1)), codes, choices);
        return {_mm256_blendv_epi8(zero.low, one.low, choices[BITS - 1].low),
                _mm256_blendv_epi8(zero.high, one.high, choices[BITS - 1].high)};
    }
}

// An array's codewords, whose selectors are bits.
template <int BITS>
AVX2 void look_up_bits(const uint8_t* pairs, const uint8_t* array, const Layout& layout, Halves* numbers) {
    const int strips = layout.strips(), blocks = layout.blocks();
    const __m256i low_shifts = _mm256_setr_epi64x(7, 6, 3, 2), high_shifts = _mm256_setr_epi64x(5, 4, 1, 0);  // of bits to signs
    __m256i books[1 << BITS], places[BITS + 1];  // places: bytes of a bit for the columns
    for (int i = 0; i < 1 << BITS; ++i) books[i] = pair(pairs, i * (ENTRIES + 1));
    places[0] = _mm256_set1_epi64x(layout.block == 4 ? 0x0101010100000000 : 0x0303020201010000);
    for (int i = 0; i < BITS; ++i) places[i + 1] = _mm256_add_epi8(places[i], _mm256_set1_epi8(static_cast<char>(blocks)));
    const uint8_t* selectors = array + layout.selectors_at();
    for (int s = 0; s < strips; ++s, selectors += BITS * blocks) {
        const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(selectors)));
        Halves choices[BITS + 1];
#pragma GCC unroll 4
        for (int i = 0; i < BITS; ++i) {
            const __m256i bits = _mm256_shuffle_epi8(all, places[i]);
            choices[i] = {_mm256_sllv_epi64(bits, low_shifts), _mm256_sllv_epi64(bits, high_shifts)};
        }
        numbers[s] = choose<BITS>(books, split(array + s * 32), choices);
    }
}

// An array's codewords, whose selectors are halves of bytes.
template <int BLOCK>
AVX2_INLINE void look_up_blocks(const uint8_t* pairs, const uint8_t* array, const Layout& layout, Halves* numbers) {
    const int strips = layout.strips();
    const uint8_t* selectors = array + layout.selectors_at();
    for (int s = 0; s < strips; ++s) numbers[s] = look_up<BLOCK>(pairs, array + s * 32, selectors + s * 32 / BLOCK);
}

inline decltype(&look_up_blocks<8>) array_look_up(const Layout& layout) {
    const int bits = layout.selector_bits, block = layout.block;
    if (layout.has_bits()) return bits == 0 ? look_up_bits<0> : bits == 1 ? look_up_bits<1> : look_up_bits<2>;
    return block == 8 ? look_up_blocks<8> : block == 4 ? look_up_blocks<4> : look_up_blocks<2>;
}

// E4M3 scales of rows 0 to 7, times 2^-8.
AVX2_INLINE __m256 weight_scales(const uint8_t* scales) {
    const __m128i halves = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
    return _mm256_cvtph_ps(_mm_slli_epi16(halves, 7));  // E4M3 is float16 with fewer bits and another bias
}

// Ask for what is some arrays ahead: the processor's own prefetching starts anew on every page.
AVX2_INLINE void prefetch(const uint8_t* array, int bytes) {
    const char* ahead = reinterpret_cast<const char*>(array + AHEAD);
    for (int line = 0; line < bytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
}

struct Tile {
    const Layout& layout;
    const uint8_t* arrays;
    const Halves* numbers;  // codewords that were looked up before, or null
};

// Weights of 6 bits times codewords of 6 bits, weights of 6 bits times codewords or digits of 8, weights of 8 bits times any.
enum class Kind { small, digits, wide };

// Arrays first to last of a tile times NUM_TOKENS tokens, added to totals. IS_USUAL: the tile has the layout USUAL.
template <int NUM_TOKENS, Kind KIND, bool IS_LOOKED_UP, bool IS_USUAL>
AVX2_INLINE void add_codes(const uint8_t* pairs, const Tile& tile, const Tokens& tokens, int64_t token, int64_t first, int64_t last,
                           float (*totals)[HEIGHT]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const Layout layout = IS_USUAL ? USUAL : tile.layout;
    const int strips = layout.strips();
    const int64_t arrays = tokens.arrays();
    __m256 total[NUM_TOKENS];
    for (int t = 0; t < NUM_TOKENS; ++t) total[t] = _mm256_loadu_ps(totals[t]);
    for (int64_t g = first; g < last; ++g) {
        const uint8_t* array = tile.arrays + g * layout.array_bytes();
        if (!IS_LOOKED_UP) prefetch(array, layout.array_bytes());
        __m256i sums[NUM_TOKENS][2];
        for (int t = 0; t < NUM_TOKENS; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
        for (int s = 0; s < strips; s += 2) {
            Halves weights[2];
            for (int k = 0; k < 2; ++k)
                weights[k] = IS_LOOKED_UP ? tile.numbers[(g - first) * strips + s + k]
                                          : look_up<8>(pairs, array + (s + k) * 32, array + layout.selectors_at() + (s + k) * 4);
#pragma GCC unroll 4
            for (int t = 0; t < NUM_TOKENS; ++t) {
                int64_t eight[2];
                std::memcpy(eight, tokens.codes + (token + t) * tokens.columns + (g * strips + s) * WIDTH, 16);
                const __m256i x[2] = {_mm256_set1_epi64x(eight[0]), _mm256_set1_epi64x(eight[1])};
                for (int part = 0; part < 2; ++part) {
                    __m256i products[2];
                    for (int k = 0; k < 2; ++k) {
                        const __m256i weight = part ? weights[k].high : weights[k].low;
                        if (KIND == Kind::wide) {
                            const __m256i turned = _mm256_sign_epi8(weight, x[k]);
                            products[k] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(x[k]), turned), ones);
                        } else {
                            products[k] = _mm256_maddubs_epi16(weight, x[k]);
                        }
                    }
                    if (KIND == Kind::small) {
                        sums[t][part] = _mm256_add_epi16(_mm256_add_epi16(sums[t][part], products[0]), products[1]);
                    } else if (KIND == Kind::digits) {
                        const __m256i both = _mm256_add_epi16(products[0], products[1]);
                        sums[t][part] = _mm256_add_epi32(sums[t][part], _mm256_madd_epi16(both, ones));
                    } else {
                        sums[t][part] = _mm256_add_epi32(_mm256_add_epi32(sums[t][part], products[0]), products[1]);
                    }
                }
            }
        }
        const __m256 scales = weight_scales(array + layout.scales_at());
#pragma GCC unroll 4
        for (int t = 0; t < NUM_TOKENS; ++t) {
            const int64_t place = (token + t) * arrays + g;
            if (KIND == Kind::small)
                for (int part = 0; part < 2; ++part) sums[t][part] = _mm256_madd_epi16(sums[t][part], ones);
            __m256i sum = _mm256_hadd_epi32(sums[t][0], sums[t][1]);
            if (KIND != Kind::wide) sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(tokens.offsets[place]));
            const __m256 both = _mm256_mul_ps(scales, _mm256_set1_ps(tokens.scales[place]));
            total[t] = _mm256_add_ps(total[t], _mm256_mul_ps(_mm256_cvtepi32_ps(sum), both));
        }
    }
    for (int t = 0; t < NUM_TOKENS; ++t) _mm256_storeu_ps(totals[t], total[t]);
}

template <Kind KIND, bool IS_LOOKED_UP, bool IS_USUAL>
AVX2_INLINE void add_codes(const uint8_t* pairs, const Tile& tile, const Tokens& tokens, int64_t token, int64_t count,
                           int64_t first, int64_t last, float (*totals)[HEIGHT]) {
    if (count == 1) add_codes<1, KIND, IS_LOOKED_UP, IS_USUAL>(pairs, tile, tokens, token, first, last, totals);
    else if (count == 2) add_codes<2, KIND, IS_LOOKED_UP, IS_USUAL>(pairs, tile, tokens, token, first, last, totals);
    else if (count == 3) add_codes<3, KIND, IS_LOOKED_UP, IS_USUAL>(pairs, tile, tokens, token, first, last, totals);
    else add_codes<4, KIND, IS_LOOKED_UP, IS_USUAL>(pairs, tile, tokens, token, first, last, totals);
}

template <Kind KIND, bool IS_USUAL>
AVX2 void multiply_codes(const uint8_t* pairs, Tile tile, const Tokens& tokens, int64_t first, int64_t last, Totals& totals) {
    const int64_t arrays = tokens.arrays();
    const Layout layout = IS_USUAL ? USUAL : tile.layout;
    if (last - first <= 4 && layout.block == 8) {
        add_codes<KIND, false, IS_USUAL>(pairs, tile, tokens, first, last - first, 0, arrays, totals);
        return;
    }
    const auto look_up_array = IS_USUAL ? look_up_blocks<8> : array_look_up(layout);
    Halves numbers[CHUNK * MOST_STRIPS];
    tile.numbers = numbers;
    for (int64_t g = 0; g < arrays; g += CHUNK) {
        const int64_t end = g + CHUNK < arrays ? g + CHUNK : arrays;
        for (int64_t h = g; h < end; ++h) {
            const uint8_t* array = tile.arrays + h * layout.array_bytes();
            prefetch(array, layout.array_bytes());
            look_up_array(pairs, array, layout, numbers + (h - g) * layout.strips());
        }
        for (int64_t m = first; m < last; m += 4)
            add_codes<KIND, true, IS_USUAL>(pairs, tile, tokens, m, last - m < 4 ? last - m : 4, g, end, totals + (m - first));
    }
}

template <bool IS_USUAL>
AVX2 void multiply_tile(const Books& books, const Tile& tile, const Tokens& tokens, int64_t first, int64_t last, Totals& totals) {
    const uint8_t *pairs = reinterpret_cast<const uint8_t*>(books.pairs), *shifted = books.shifted_pairs[0];
    const bool is_small = tokens.largest == 31 && tile.layout.array <= 64;
    if (!books.is_narrow()) multiply_codes<Kind::wide, IS_USUAL>(pairs, tile, tokens, first, last, totals);
    else if (is_small) multiply_codes<Kind::small, IS_USUAL>(shifted, tile, tokens, first, last, totals);
    else multiply_codes<Kind::digits, IS_USUAL>(shifted, tile, tokens, first, last, totals);
}

AVX2 void multiply(const Books& books, const Matrix& matrix, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
                   const Target& target) {
    Totals totals;
    std::memset(totals, 0, sizeof(float) * HEIGHT * static_cast<size_t>(last - first));
    const Tile here{matrix.layout, matrix.array(tile, 0), nullptr};
    if (is_usual(matrix.layout)) multiply_tile<true>(books, here, tokens, first, last, totals);
    else multiply_tile<false>(books, here, tokens, first, last, totals);
    for (int64_t m = first; m < last; m += tokens.planes) store(totals + (m - first), matrix, tile, m, tokens, target);
}

}  // namespace avx2

#endif
