// What torch hands over and gets back.
#pragma once

#include <cstdint>
#include <cstring>

inline float from_bfloat16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

struct Source {
    const void* x;  // [tokens, columns]
    bool is_bfloat16;
    int rotation = 0;  // inputs of a block that is rotated, see qurl.quantization.hadamard; 0: none
};

struct Target {
    void* out;  // [tokens, rows]
    bool is_bfloat16;
    const void* bias;  // [rows] or null
    bool is_bias_bfloat16;
};

// Inf or NaN where there is one.
inline __attribute__((always_inline)) float largest_magnitude(const float* values, int64_t columns) {
    int32_t largest = 0;
    for (int64_t i = 0; i < columns; ++i) {
        int32_t bits;
        std::memcpy(&bits, values + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float amax;
    std::memcpy(&amax, &largest, 4);
    return amax;
}

// A token as float32, not rotated yet, and its largest magnitude.
inline __attribute__((always_inline)) float load_token(const Source& source, int64_t token, int64_t columns, float* values) {
    if (source.is_bfloat16) {
        const uint16_t* x = static_cast<const uint16_t*>(source.x) + token * columns;
        for (int64_t i = 0; i < columns; ++i) values[i] = from_bfloat16(x[i]);
    } else {
        std::memcpy(values, static_cast<const float*>(source.x) + token * columns, static_cast<size_t>(columns) * 4);
    }
    return largest_magnitude(values, columns);
}

// Rows first to first + count of a token: + bias, rounded once to float32 and once to the dtype. rows: of a token.
inline __attribute__((always_inline)) void store_rows(const float* results, int count, int64_t token, int64_t first, int64_t rows,
                                                      const Target& target) {
    for (int r = 0; r < count; ++r) {
        float result = results[r];
        if (target.bias && target.is_bias_bfloat16) result += from_bfloat16(static_cast<const uint16_t*>(target.bias)[first + r]);
        else if (target.bias) result += static_cast<const float*>(target.bias)[first + r];
        const int64_t place = token * rows + first + r;
        if (target.is_bfloat16) static_cast<uint16_t*>(target.out)[place] = to_bfloat16(result);
        else static_cast<float*>(target.out)[place] = result;
    }
}
