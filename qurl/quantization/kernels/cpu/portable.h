// The loops in plain C++. They are also what the numbers mean: the others give the same bits.
//
// W4A4: sums over an array are whole numbers, below 2^24 and so exact in float32; each is multiplied by the product of the two
// E4M3 scales, and these terms are added in float32 in the order of the arrays. W4A16: activations of an array become whole
// numbers of three digits, see Digits; each digit's sums are taken as above, with powers of two for the activations' scales. The
// digits' sums are added, and the scales of matrix and token applied, at the end in double. Nothing is fused, so nothing depends
// on the CPU.
#pragma once

#include <algorithm>

#include "books.h"
#include "tensors.h"

constexpr int PLANES = 63;  // of tokens that go through a tile together; a multiple of 3

using Totals = float[PLANES][HEIGHT];

// The float32 scale of a token; NaN for one that is not finite.
inline float global_scale_of(float amax, const Books& books) {
    if (!std::isfinite(amax)) return NAN;
    const float scale = static_cast<float>(books.largest * 448) / amax;
    return scale < 0x1p100f ? scale : 0x1p100f;
}

// A power of two above amax, not beyond float32; NaN for one that is not finite.
inline float power_above(float amax) {
    if (!std::isfinite(amax)) return NAN;
    int exponent;
    std::frexp(amax, &exponent);
    return std::ldexp(1.0f, std::min(exponent, 127));
}

inline float scale_of_array(float amax, float global_scale, const Books& books) {
    const float scale = amax / static_cast<float>(books.largest) * global_scale;
    return round_e4m3(scale < 448.0f ? scale : 448.0f);
}

// Where the results of a tile for a token go: * scales + bias, rounded once to float32 and once to the dtype. plane: the first of
// the token.
inline __attribute__((always_inline)) void store(const float (*totals)[HEIGHT], const Matrix& matrix, int64_t tile, int64_t plane,
                                                 const Tokens& tokens, const Target& target) {
    const int64_t first = tile * HEIGHT, token = plane / tokens.planes;
    const int count = static_cast<int>(matrix.rows - first < HEIGHT ? matrix.rows - first : HEIGHT);
    float results[HEIGHT];
    for (int r = 0; r < HEIGHT; ++r) {
        double total = totals[0][r];
        if (tokens.planes == DIGITS) total = total + totals[1][r] + totals[2][r];
        results[r] = static_cast<float>(total * (matrix.row_scales()[first + r] * tokens.factors[token]));
    }
    store_rows(results, count, token, first, matrix.rows, target);
}

namespace portable {

void encode(const Books& books, const float* values, float global_scale, int64_t first, int64_t last, int64_t token,
            Tokens& tokens) {
    const int array = tokens.layout.array, length = tokens.layout.block;
    for (int64_t g = first; g < last; ++g) {
        float amax = 0.0f;
        for (int i = 0; i < array; ++i) amax = std::max(amax, std::fabs(values[g * array + i]));
        const float scale = scale_of_array(amax, global_scale, books);
        const float inverse = scale > 0.0f ? global_scale / scale : 0.0f;
        const float largest = static_cast<float>(books.largest);
        int32_t sum = 0;
        for (int b = 0; b < array; b += length) {
            const float* block = values + g * array + b;
            int8_t* codes = tokens.codes + token * tokens.columns + g * array + b;
            int steps[WIDTH];
            float errors[ENTRIES] = {};
            for (int i = 0; i < length; ++i) {
                const float value = block[i] * inverse;
                const float clamped = value < -largest ? -largest : value > largest ? largest : value;
                steps[i] = static_cast<int>(std::floor(2.0f * clamped)) + 2 * books.largest;
                for (int book = 0; book < ENTRIES; ++book) {
                    const float error = books.nearest[steps[i]][book] - value;
                    errors[book] += error * error;
                }
            }
            int best = 0;
            for (int book = 1; book < ENTRIES; ++book) best = errors[book] < errors[best] ? book : best;
            for (int i = 0; i < length; ++i) sum += codes[i] = books.nearest_codeword[steps[i]][best];
        }
        tokens.scales[token * tokens.arrays() + g] = scale * 256.0f;
        tokens.offsets[token * tokens.arrays() + g] = 32 * sum;
    }
}

void encode_digits(const Books&, const float* values, float token_scale, int64_t first, int64_t last, int64_t token,
                   Tokens& tokens) {
    const int array = tokens.layout.array;
    for (int64_t g = first; g < last; ++g) {
        float amax = 0.0f;
        for (int i = 0; i < array; ++i) amax = std::max(amax, std::fabs(values[g * array + i]));
        const Digits digits(amax, token_scale);
        int32_t sums[DIGITS] = {};
        for (int i = 0; i < array; ++i) {
            int32_t rest = static_cast<int32_t>(std::nearbyint(values[g * array + i] * digits.first_factor * digits.second_factor));
            for (int digit = 0; digit < DIGITS; ++digit) {
                const int32_t code = ((rest + 128) & 255) - 128;
                rest = (rest - code) / 256;
                tokens.codes[(token * DIGITS + digit) * tokens.columns + g * array + i] = static_cast<int8_t>(code);
                sums[digit] += code;
            }
        }
        digits.store(sums, token, g, tokens);
    }
}

// Of a rotated block: a power of two where its size is one of four, else rounded.
inline float rotation_factor(int size) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(size))); }

// Blocks of `size` numbers times Sylvester's Hadamard matrix, in its stages, and then the factor.
inline void rotate(float* values, int64_t columns, int size) {
    for (int half = 1; half < size; half *= 2)
        for (int64_t start = 0; start < columns; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                const float first = values[i], second = values[i + half];
                values[i] = first + second;
                values[i + half] = first - second;
            }
    const float factor = rotation_factor(size);
    for (int64_t i = 0; i < columns; ++i) values[i] *= factor;
}

// A token as it is encoded; returns its largest magnitude.
float load(const Source& source, int64_t token, int64_t columns, float* values) {
    const float amax = load_token(source, token, columns, values);
    if (!source.rotation) return amax;
    rotate(values, columns, source.rotation);
    return largest_magnitude(values, columns);
}

inline void look_up(const Books& books, const Matrix& matrix, int64_t tile, int64_t g, int8_t numbers[HEIGHT][LARGEST_ARRAY]) {
    const Layout& layout = matrix.layout;
    const uint8_t* array = matrix.array(tile, g);
    for (int s = 0; s < layout.strips(); ++s) {
        const uint8_t* selectors = array + layout.selectors_at() + s * layout.selector_bytes();
        for (int r = 0; r < HEIGHT; ++r)
            for (int j = 0; j < WIDTH; ++j) {
                const int code = array[s * 32 + codes_at(r) + j] >> shift_of(r) & 15;
                numbers[r][s * WIDTH + j] = books.pairs[layout.book(selectors, r, j / layout.block)][code];
            }
    }
}

inline float sum_codes(const int8_t* numbers, const int8_t* x, int count) {
    int32_t sum = 0;
    for (int i = 0; i < count; ++i) sum += numbers[i] * x[i];
    return static_cast<float>(sum);
}

void multiply(const Books& books, const Matrix& matrix, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
              const Target& target) {
    Totals totals = {};
    int8_t numbers[HEIGHT][LARGEST_ARRAY];
    const int array = matrix.layout.array;
    for (int64_t g = 0; g < matrix.arrays(); ++g) {
        look_up(books, matrix, tile, g, numbers);
        for (int64_t m = first; m < last; ++m)
            for (int r = 0; r < HEIGHT; ++r) {
                const float scale = books.e4m3[matrix.scales(tile, g)[r]] * tokens.scales[m * tokens.arrays() + g];
                totals[m - first][r] += sum_codes(numbers[r], tokens.codes + m * matrix.columns + g * array, array) * scale;
            }
    }
    for (int64_t m = first; m < last; m += tokens.planes) store(totals + (m - first), matrix, tile, m, tokens, target);
}

}  // namespace portable
