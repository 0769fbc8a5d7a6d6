// Codebooks in the forms that the loops look up, and the numbers that go with them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tiles.h"

struct alignas(64) Books {
    int8_t pairs[ENTRIES * ENTRIES][2 * ENTRIES];         // book i, then book k, at i + 16 k
    uint8_t shifted_pairs[ENTRIES * ENTRIES][2 * ENTRIES]; // the same + 32, where codewords have 6 bits
    uint8_t shifted[ENTRIES][ENTRIES];                     // by book: entries + 32, of 8 bits + 128, so that none is negative
    float nearest[4 * 127 + 1][ENTRIES];                   // by half step from -largest on and book: the nearest entry
    int8_t nearest_codeword[4 * 127 + 1][ENTRIES];         // the same numbers
    float e4m3[256];                                       // 2^-8 of what a byte stands for
    int largest;

    bool is_narrow() const { return largest == 31; }

    Books(const int8_t* entries, int largest) : largest(largest) {
        for (int i = 0; i < ENTRIES; ++i)
            for (int k = 0; k < ENTRIES; ++k) {
                std::memcpy(pairs[i + ENTRIES * k], entries + ENTRIES * i, ENTRIES);
                std::memcpy(pairs[i + ENTRIES * k] + ENTRIES, entries + ENTRIES * k, ENTRIES);
            }
        for (int i = 0; i < ENTRIES * ENTRIES; ++i)
            for (int j = 0; j < 2 * ENTRIES; ++j) shifted_pairs[i][j] = static_cast<uint8_t>(pairs[i][j] + 32);
        for (int i = 0; i < ENTRIES * ENTRIES; ++i)
            shifted[i / ENTRIES][i % ENTRIES] = static_cast<uint8_t>(entries[i] + (is_narrow() ? 32 : 128));
        for (int step = 0; step <= 4 * largest; ++step)
            for (int book = 0; book < ENTRIES; ++book) {
                const int8_t* entry = entries + ENTRIES * book;
                int code = 0;  // a number halfway between two entries gets the larger
                while (code < ENTRIES - 1 && step - 2 * largest >= entry[code] + entry[code + 1]) ++code;
                nearest[step][book] = nearest_codeword[step][book] = entry[code];
            }
        for (int byte = 0; byte < 256; ++byte) {
            const int exponent = byte >> 3 & 15, mantissa = byte & 7;
            e4m3[byte] = std::ldexp(exponent ? 8.0f + mantissa : 2.0f * mantissa, (exponent ? exponent : 0) - 18);
        }
    }
};

// The E4M3 number nearest to one in [0, 448], ties to even.
inline float round_e4m3(float value) {
    if (value < 0.015625f) return std::nearbyint(value * 512.0f) / 512.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7FFFF + (bits >> 20 & 1)) & 0xFFF00000;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Activations as they are multiplied. A token of W4A4 is one plane of codewords, one of W4A16 is three planes of digits.
struct Tokens {
    const Layout& layout;
    int64_t count, columns;
    int planes;
    int largest;       // no code is larger: that of the activations' codebooks, or 128 for digits
    int8_t* codes;     // [count, planes, columns]
    float* scales;     // [count, planes, arrays], times 2^8
    int32_t* offsets;  // [count, planes, arrays], 32 times the sum of an array's codes
    double* factors;   // [count], by which a token's results are multiplied; NaN for a token that is not finite

    int64_t arrays() const { return columns / layout.array; }
};

constexpr int DIGITS = 3;

// An array of W4A16: whole numbers up to 2^22 of three digits from -128 to 127 to the base 256, the last first, times a power of
// two. What is lost is below 2^-22 of the array's largest number, and nothing of a bfloat16 above 2^-14 of it.
struct Digits {
    float first_factor = 0.0f, second_factor = 0.0f;  // their product turns activations into whole numbers
    float scale = 0.0f;

    // amax: of the array. token_scale: a power of two that the token's numbers stay below.
    Digits(float amax, float token_scale) {
        if (amax == 0.0f) return;
        int exponent, token_exponent;
        std::frexp(amax, &exponent);  // amax < 2^exponent
        std::frexp(token_scale, &token_exponent);
        first_factor = std::ldexp(1.0f, (22 - exponent) / 2);
        second_factor = std::ldexp(1.0f, 22 - exponent - (22 - exponent) / 2);
        scale = std::ldexp(1.0f, exponent - token_exponent);
    }

    void store(const int32_t* sums, int64_t token, int64_t g, Tokens& tokens) const {
        for (int digit = 0; digit < DIGITS; ++digit) {
            const int64_t place = (token * DIGITS + digit) * tokens.arrays() + g;
            tokens.scales[place] = scale * static_cast<float>(1 << (8 * digit));
            tokens.offsets[place] = 32 * sums[digit];
        }
    }
};
