// The loops over INT8 codes for AVX-512 with its byte permutations (VBMI) and byte products (VNNI).
//
// Two tiles go together. Four columns of their 16 rows are a register, and four codes of a token are the other factor in all of its
// places: 64 products, of unsigned with signed bytes, and the sums of four are one instruction (vpdpbusd). Weights of every kind
// become whole codes, 128 too large: those that are stored so are put in order (vpermb), and the number of a kept weight, with that
// of its row's lowest block above it, is an index of at most 7 bits into a table of them (vpermi2b). What that is too much, 128
// times the sum of a token's codes, comes off before all else. Sums are modulo 2^32 on the way, never saturated, and exact.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "int8_avx2.h"

#ifndef AVX512  // tests define it, and the instructions' names, to run these loops on other processors
#define AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#endif
#define AVX512_INLINE AVX512 inline __attribute__((always_inline))

namespace int8::avx512 {

using avx2::Kind;

constexpr int TILES = 2;  // that go together
constexpr int ROWS = TILES * HEIGHT;
constexpr int REGISTERS = WIDTH / 4;  // of an array of both
constexpr int64_t CHUNK = 8;  // arrays that are decoded before many tokens are multiplied with them
constexpr int SELECT = 0xE2;  // bits of the first where the second has ones, else of the third

AVX512 void complete(const Layout&, int64_t token, Tokens& tokens) {
    const int8_t* codes = tokens.codes + token * tokens.columns;
    int32_t sum = 0;
    for (int64_t i = 0; i < tokens.columns; ++i) sum += codes[i];
    tokens.sums[token] = sum;
}

// 32 bytes of either tile.
AVX512_INLINE __m512i beside(const uint8_t* one, const uint8_t* other) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(avx2::load(one)), avx2::load(other), 1);
}

AVX512_INLINE int64_t eight(const uint8_t* bytes) {
    int64_t all;
    std::memcpy(&all, bytes, 8);
    return all;
}

// The same 4 bytes everywhere.
AVX512_INLINE __m512i repeat(const int8_t* bytes) {
    int four;
    std::memcpy(&four, bytes, 4);
    return _mm512_set1_epi32(four);
}

// How kept blocks become codes.
struct Expansion {
    __m512i codes[2];   // 128 too large, by the number of a weight and, above it, of the lowest block; bits above say nothing
    __m512i places[2];  // for either group, of the bits in the 8 bytes that an array ends with which come to stand there

    AVX512_INLINE explicit Expansion(const Layout& layout) {
        const int number_bits = layout.magnitude_bits + 1, lowest_bits = layout.lowest_bits;
        alignas(64) uint8_t code[2 * 64], place[2 * 64];
        for (int i = 0; i < 2 * 64; ++i) {
            const int number = i & ((1 << number_bits) - 1), lowest = i >> number_bits & ((1 << lowest_bits) - 1);
            code[i] = static_cast<uint8_t>((number - layout.offset()) * (1 << lowest * layout.block_bits) + 128);
            place[i] = static_cast<uint8_t>(64 - (2 - i / 64) * HEIGHT * lowest_bits + i / 4 % HEIGHT * lowest_bits - number_bits);
        }
        for (int i = 0; i < 2; ++i) {
            codes[i] = _mm512_loadu_si512(code + 64 * i);
            places[i] = _mm512_loadu_si512(place + 64 * i);
        }
    }
};

// How whole codes, two columns of all rows and two more, become four columns of each row.
struct Order {
    __m512i bytes;

    AVX512_INLINE explicit Order(const Layout&) {
        constexpr int64_t ROW_0_1 = 0x1312030211100100, ROW = 0x0202020202020202, OTHER_TILE = 16 * ROW;
        bytes = _mm512_set_epi64(ROW_0_1 + 6 * ROW + OTHER_TILE, ROW_0_1 + 4 * ROW + OTHER_TILE, ROW_0_1 + 2 * ROW + OTHER_TILE,
                                 ROW_0_1 + OTHER_TILE, ROW_0_1 + 6 * ROW, ROW_0_1 + 4 * ROW, ROW_0_1 + 2 * ROW, ROW_0_1);
    }
};

// Two tiles as they are stored.
template <Kind KIND>
struct Packed {
    using Tables = std::conditional_t<KIND == Kind::whole, Order, Expansion>;

    const uint8_t *one, *other;
    int64_t array_bytes;
    Tables tables;

    // The codes of an array, 128 too large: register i has columns 4 i to 4 i + 3.
    AVX512_INLINE void decode(int64_t array, __m512i* codes) const {
        const uint8_t *first = one + array * array_bytes, *second = other + array * array_bytes;
        for (int line = 0; line < (KIND == Kind::whole ? 256 : 192); line += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(first + avx2::AHEAD + line), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(second + avx2::AHEAD + line), _MM_HINT_T0);
        }
        if constexpr (KIND == Kind::whole) {
            for (int i = 0; i < REGISTERS; ++i) {
                const __m512i ordered = _mm512_permutexvar_epi8(tables.bytes, beside(first + 32 * i, second + 32 * i));
                codes[i] = _mm512_xor_si512(ordered, _mm512_set1_epi8(-128));
            }
        } else {
            const __m512i four_bits = _mm512_set1_epi8(15), fifth_bit = _mm512_set1_epi8(16);
            __m512i ends = _mm512_set1_epi64(eight(first + array_bytes - 8)), plane;
            ends = _mm512_mask_set1_epi64(ends, 0xF0, eight(second + array_bytes - 8));
            if constexpr (KIND == Kind::plane) plane = beside(first + PLANE, second + PLANE);
            for (int part = 0; part < PARTS; ++part) {
                const __m512i both = beside(first + part * PART, second + part * PART);
                const __m512i lowest = _mm512_multishift_epi64_epi8(tables.places[part / 2], ends);
                __m512i index[2] = {both, _mm512_srli_epi16(both, 4)};
                for (int half = 0; half < 2; ++half) {
                    const int i = 2 * part + half;
                    index[half] = _mm512_ternarylogic_epi64(index[half], four_bits, lowest, SELECT);
                    if constexpr (KIND == Kind::plane) {
                        const __m512i fifth = i < 4 ? _mm512_slli_epi16(plane, 4 - i) : _mm512_srli_epi16(plane, i - 4);
                        index[half] = _mm512_ternarylogic_epi64(fifth, fifth_bit, index[half], SELECT);
                    }
                    codes[i] = _mm512_permutex2var_epi8(tables.codes[0], index[half], tables.codes[1]);
                }
            }
        }
    }
};

// Sums of tokens, in two parts that need not wait for each other.
template <int NUM_TOKENS>
using Sums = __m512i[NUM_TOKENS][2];

// x: columns of an array of the first token, `columns` before those of the next.
template <int NUM_TOKENS>
AVX512_INLINE void add_array(const __m512i* codes, const int8_t* x, int64_t columns, Sums<NUM_TOKENS>& sums) {
#pragma GCC unroll 8
    for (int i = 0; i < REGISTERS; ++i)
#pragma GCC unroll 4
        for (int t = 0; t < NUM_TOKENS; ++t)
            sums[t][i % 2] = _mm512_dpbusd_epi32(sums[t][i % 2], codes[i], repeat(x + t * columns + 4 * i));
}

// Arrays first to last, which are decoded, times NUM_TOKENS tokens, added to totals.
template <int NUM_TOKENS>
AVX512_INLINE void add_codes(const __m512i* codes, const Tokens& tokens, int64_t token, int64_t first, int64_t last,
                             int32_t (*totals)[ROWS]) {
    Sums<NUM_TOKENS> sums;
#pragma GCC unroll 4
    for (int t = 0; t < NUM_TOKENS; ++t) {
        sums[t][0] = _mm512_loadu_si512(totals[t]);
        sums[t][1] = _mm512_setzero_si512();
    }
    const int8_t* x = tokens.codes + token * tokens.columns + first * WIDTH;
    for (int64_t a = first; a < last; ++a, codes += REGISTERS, x += WIDTH) add_array<NUM_TOKENS>(codes, x, tokens.columns, sums);
#pragma GCC unroll 4
    for (int t = 0; t < NUM_TOKENS; ++t) _mm512_storeu_si512(totals[t], _mm512_add_epi32(sums[t][0], sums[t][1]));
}

AVX512 void add_codes(const __m512i* codes, const Tokens& tokens, int64_t token, int64_t count, int64_t first, int64_t last,
                      int32_t (*totals)[ROWS]) {
    if (count == 1) add_codes<1>(codes, tokens, token, first, last, totals);
    else if (count == 2) add_codes<2>(codes, tokens, token, first, last, totals);
    else if (count == 3) add_codes<3>(codes, tokens, token, first, last, totals);
    else add_codes<4>(codes, tokens, token, first, last, totals);
}

template <Kind KIND>
AVX512 void multiply_codes(const Matrix& matrix, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
                           int32_t (*totals)[ROWS]) {
    const int64_t arrays = matrix.arrays(), next = std::min(tile + 1, matrix.tiles() - 1);  // an odd last tile goes with itself
    const Packed<KIND> packed = {matrix.array(tile, 0), matrix.array(next, 0), matrix.layout.array_bytes(),
                                 typename Packed<KIND>::Tables(matrix.layout)};
    if (last - first == 1) {
        Sums<1> sums = {{_mm512_loadu_si512(totals[0]), _mm512_setzero_si512()}};
        for (int64_t a = 0; a < arrays; ++a) {
            __m512i codes[REGISTERS];
            packed.decode(a, codes);
            add_array<1>(codes, tokens.codes + first * tokens.columns + a * WIDTH, 0, sums);
        }
        _mm512_storeu_si512(totals[0], _mm512_add_epi32(sums[0][0], sums[0][1]));
        return;
    }
    __m512i codes[CHUNK * REGISTERS];
    for (int64_t a = 0; a < arrays; a += CHUNK) {
        const int64_t end = std::min(a + CHUNK, arrays);
        for (int64_t b = a; b < end; ++b) packed.decode(b, codes + (b - a) * REGISTERS);
        for (int64_t m = first; m < last; m += 4)
            add_codes(codes, tokens, m, std::min<int64_t>(last - m, 4), a, end, totals + (m - first));
    }
}

AVX512 void multiply(const Matrix& matrix, const float* row_scales, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
                     const Target& target) {
    int32_t totals[TOKENS][ROWS];
    for (int64_t m = first; m < last; ++m) std::fill_n(totals[m - first], ROWS, -128 * tokens.sums[m]);
    if (matrix.layout.is_whole()) multiply_codes<Kind::whole>(matrix, tokens, tile, first, last, totals);
    else if (matrix.layout.has_plane()) multiply_codes<Kind::plane>(matrix, tokens, tile, first, last, totals);
    else multiply_codes<Kind::nibbles>(matrix, tokens, tile, first, last, totals);
    store<ROWS>(totals, matrix, row_scales, tile * HEIGHT, first, last, tokens, target);
}

}  // namespace int8::avx512

#endif
