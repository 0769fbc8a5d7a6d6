// The AVX-512 instructions that avx512.h and int8_avx512.h of the CPU kernels use, in plain C++, as Intel's manual describes them.
// Included before those files: names in their namespaces come before those of <immintrin.h>, and their loops run on any x86
// processor with AVX2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define AVX512 __attribute__((target("avx2,f16c")))
#define EMULATED AVX512 __attribute__((noinline)) inline  // the loops are unrolled: compilers would take a minute
#undef _mm512_cmpeq_ps_mask  // macros of some compilers
#undef _mm512_extracti64x4_epi64
#undef _mm512_inserti64x4
#undef _mm512_ternarylogic_epi64

namespace avx512 {

struct __m512 {
    float lane[16];
};

struct __m512i {
    uint8_t bytes[64];

    template <class Number>
    Number at(int lane) const {
        Number number;
        std::memcpy(&number, bytes + lane * sizeof(Number), sizeof(Number));
        return number;
    }
};

// A register of what `number` says for every lane.
template <class Number, class Function>
__m512i lanes(Function number) {
    __m512i all;
    for (int i = 0; i < int(64 / sizeof(Number)); ++i) {
        const Number one = static_cast<Number>(number(i));
        std::memcpy(all.bytes + i * sizeof(Number), &one, sizeof(Number));
    }
    return all;
}

template <class Function>
__m512 floats(Function number) {
    __m512 all;
    for (int i = 0; i < 16; ++i) all.lane[i] = number(i);
    return all;
}

EMULATED __m512 _mm512_set1_ps(float x) { return floats([&](int) { return x; }); }
EMULATED __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
EMULATED __m512 _mm512_loadu_ps(const float* from) { return floats([&](int i) { return from[i]; }); }
EMULATED void _mm512_storeu_ps(float* to, __m512 a) { std::memcpy(to, a.lane, 64); }
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return floats([&](int i) { return a.lane[i] + b.lane[i]; }); }
EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return floats([&](int i) { return a.lane[i] - b.lane[i]; }); }
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return floats([&](int i) { return a.lane[i] * b.lane[i]; }); }
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return floats([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}

EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return floats([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}

EMULATED __m512 _mm512_floor_ps(__m512 a) { return floats([&](int i) { return std::floor(a.lane[i]); }); }
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) { return lanes<int32_t>([&](int i) { return std::nearbyint(a.lane[i]); }); }

EMULATED float _mm512_reduce_min_ps(__m512 a) {
    float least = a.lane[0];
    for (float one : a.lane) least = one < least ? one : least;
    return least;
}

EMULATED __mmask16 _mm512_cmpeq_ps_mask(__m512 a, __m512 b) {
    __mmask16 mask = 0;
    for (int i = 0; i < 16; ++i) mask |= static_cast<__mmask16>(a.lane[i] == b.lane[i]) << i;
    return mask;
}

EMULATED __m512i _mm512_set1_epi8(int8_t x) { return lanes<int8_t>([&](int) { return x; }); }
EMULATED __m512i _mm512_set1_epi32(int32_t x) { return lanes<int32_t>([&](int) { return x; }); }
EMULATED __m512i _mm512_set1_epi64(int64_t x) { return lanes<int64_t>([&](int) { return x; }); }
EMULATED __m512i _mm512_setzero_si512() { return _mm512_set1_epi8(0); }

EMULATED __m512i _mm512_mask_set1_epi64(__m512i a, __mmask8 mask, int64_t x) {
    return lanes<int64_t>([&](int i) { return mask >> i & 1 ? x : a.at<int64_t>(i); });
}

// The last lane comes first.
EMULATED __m512i _mm512_set_epi64(int64_t h, int64_t g, int64_t f, int64_t e, int64_t d, int64_t c, int64_t b, int64_t a) {
    const int64_t all[8] = {a, b, c, d, e, f, g, h};
    return lanes<int64_t>([&](int i) { return all[i]; });
}

EMULATED __m512i _mm512_loadu_si512(const void* from) {
    __m512i all;
    std::memcpy(all.bytes, from, 64);
    return all;
}

EMULATED void _mm512_storeu_si512(void* to, __m512i a) { std::memcpy(to, a.bytes, 64); }

// What lies above the 16 bytes is undefined.
EMULATED __m512i _mm512_castsi128_si512(__m128i a) {
    __m512i wide = _mm512_set1_epi8(85);
    std::memcpy(wide.bytes, &a, 16);
    return wide;
}

// What lies above the 32 bytes is undefined.
EMULATED __m512i _mm512_castsi256_si512(__m256i a) {
    __m512i wide = _mm512_set1_epi8(85);
    std::memcpy(wide.bytes, &a, 32);
    return wide;
}

EMULATED __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
    std::memcpy(a.bytes + 32 * half, &b, 32);
    return a;
}

EMULATED __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
    __m256i part;
    std::memcpy(&part, a.bytes + 32 * half, 32);
    return part;
}

EMULATED __m256i _mm512_castsi512_si256(__m512i a) { return _mm512_extracti64x4_epi64(a, 0); }

EMULATED __m512i _mm512_add_epi8(__m512i a, __m512i b) { return lanes<uint8_t>([&](int i) { return a.bytes[i] + b.bytes[i]; }); }

EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return lanes<uint32_t>([&](int i) { return a.at<uint32_t>(i) + b.at<uint32_t>(i); });
}

EMULATED __m512i _mm512_slli_epi16(__m512i a, unsigned count) {
    return lanes<uint16_t>([&](int i) { return a.at<uint16_t>(i) << count; });
}

EMULATED __m512i _mm512_srli_epi16(__m512i a, unsigned count) {
    return lanes<uint16_t>([&](int i) { return a.at<uint16_t>(i) >> count; });
}

EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return lanes<uint8_t>([&](int i) { return a.bytes[i] ^ b.bytes[i]; }); }
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return lanes<uint8_t>([&](int i) { return a.bytes[i] & b.bytes[i]; }); }

// Bit i of `table` is the result where the three have the bits of i, that of the first the highest.
EMULATED __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
    return lanes<uint8_t>([&](int i) {
        int byte = 0;
        for (int bit = 0; bit < 8; ++bit) {
            const int which = (a.bytes[i] >> bit & 1) << 2 | (b.bytes[i] >> bit & 1) << 1 | (c.bytes[i] >> bit & 1);
            byte |= (table >> which & 1) << bit;
        }
        return byte;
    });
}

// Each byte: eight bits of the lane of 64, from the one that its control names on, around the end.
EMULATED __m512i _mm512_multishift_epi64_epi8(__m512i controls, __m512i a) {
    return lanes<uint8_t>([&](int i) {
        const uint64_t lane = a.at<uint64_t>(i / 8);
        const int first = controls.bytes[i] & 63;
        return first ? lane >> first | lane << (64 - first) : lane;
    });
}

EMULATED __m512i _mm512_permutexvar_epi64(__m512i index, __m512i a) {
    return lanes<uint64_t>([&](int i) { return a.at<uint64_t>(static_cast<int>(index.at<uint64_t>(i) & 7)); });
}

EMULATED __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
    return lanes<uint8_t>([&](int i) { return (index.bytes[i] & 64 ? b : a).bytes[index.bytes[i] & 63]; });
}

EMULATED __m512i _mm512_permutexvar_epi8(__m512i index, __m512i a) {
    return lanes<uint8_t>([&](int i) { return a.bytes[index.bytes[i] & 63]; });
}

EMULATED __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
    __mmask64 mask = 0;
    for (int i = 0; i < 64; ++i) mask |= static_cast<__mmask64>((a.bytes[i] & b.bytes[i]) != 0) << i;
    return mask;
}

EMULATED __m512i _mm512_mask_add_epi8(__m512i source, __mmask64 mask, __m512i a, __m512i b) {
    return lanes<uint8_t>([&](int i) { return mask >> i & 1 ? a.bytes[i] + b.bytes[i] : source.bytes[i]; });
}

EMULATED __mmask64 _mm512_movepi8_mask(__m512i a) {
    __mmask64 mask = 0;
    for (int i = 0; i < 64; ++i) mask |= static_cast<__mmask64>(a.bytes[i] >> 7) << i;
    return mask;
}

EMULATED __m512i _mm512_mask_blend_epi8(__mmask64 mask, __m512i a, __m512i b) {
    return lanes<uint8_t>([&](int i) { return (mask >> i & 1 ? b : a).bytes[i]; });
}

// Four products of unsigned with signed bytes are added to each lane of 32 bits, modulo 2^32.
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    return lanes<uint32_t>([&](int i) {
        uint32_t sum = sums.at<uint32_t>(i);
        for (int k = 4 * i; k < 4 * i + 4; ++k) sum += static_cast<uint32_t>(a.bytes[k] * static_cast<int8_t>(b.bytes[k]));
        return sum;
    });
}

}  // namespace avx512

namespace int8::avx512 {

using ::avx512::__m512i;
using ::avx512::_mm512_add_epi32;
using ::avx512::_mm512_castsi256_si512;
using ::avx512::_mm512_dpbusd_epi32;
using ::avx512::_mm512_inserti64x4;
using ::avx512::_mm512_loadu_si512;
using ::avx512::_mm512_mask_set1_epi64;
using ::avx512::_mm512_multishift_epi64_epi8;
using ::avx512::_mm512_permutex2var_epi8;
using ::avx512::_mm512_permutexvar_epi8;
using ::avx512::_mm512_set1_epi32;
using ::avx512::_mm512_set1_epi64;
using ::avx512::_mm512_set1_epi8;
using ::avx512::_mm512_set_epi64;
using ::avx512::_mm512_setzero_si512;
using ::avx512::_mm512_slli_epi16;
using ::avx512::_mm512_srli_epi16;
using ::avx512::_mm512_storeu_si512;
using ::avx512::_mm512_ternarylogic_epi64;
using ::avx512::_mm512_xor_si512;

}  // namespace int8::avx512
