// The loops over INT8 codes in plain C++, and what they and others compute.
//
// Sums of products of codes are whole numbers below 2^31 and exact. Each is rounded to float32 and multiplied by the scale of the
// token, then by that of the row; the bias is added. Nothing is fused, so every set of instructions gives the same bits.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "int8_tiles.h"
#include "tensors.h"

namespace int8 {

constexpr int TOKENS = 64;  // that go through a tile together

// Activations as they are multiplied, with zeros up to whole arrays.
struct Tokens {
    int64_t count, columns;  // columns: a multiple of WIDTH
    int8_t* codes;     // [count, columns]
    int16_t* wide;     // the same numbers where weights are whole, else null
    int16_t* offsets;  // [count, groups, 2] where they are not: what numbers being too large by layout.offset() adds to the sums
                       // over columns 0, 1, 4, 5, ... and 2, 3, 6, 7, ... of a group, negated; modulo 2^16
    int32_t* sums;     // [count] of the codes of a token, for AVX-512
    float* scales;     // [count]

    int64_t groups() const { return columns / GROUP; }
};

using Totals = int32_t[TOKENS][HEIGHT];

// The scale of a token; NaN for one that is not finite.
inline float scale_of(float amax) { return std::isfinite(amax) ? amax / 127.0f : NAN; }

// What activations are multiplied by; 0 for a token that is too small for a finite one, or not finite.
inline float inverse_of(float scale) { return scale >= FLT_MIN ? 1.0f / scale : 0.0f; }

// The other forms of a token's codes.
inline __attribute__((always_inline)) void complete(const Layout& layout, int64_t token, Tokens& tokens) {
    const int8_t* codes = tokens.codes + token * tokens.columns;
    if (layout.is_whole()) {
        int16_t* wide = tokens.wide + token * tokens.columns;
        for (int64_t i = 0; i < tokens.columns; ++i) wide[i] = codes[i];
        return;
    }
    for (int64_t g = 0; g < tokens.groups(); ++g) {
        int sums[2] = {};
        for (int i = 0; i < GROUP; ++i) sums[i >> 1 & 1] += codes[g * GROUP + i];
        int16_t* offsets = tokens.offsets + (token * tokens.groups() + g) * 2;
        for (int i = 0; i < 2; ++i) offsets[i] = static_cast<int16_t>(-layout.offset() * sums[i]);
    }
}

// Rows from `row` on.
template <int ROWS>
inline __attribute__((always_inline)) void store(const int32_t (*totals)[ROWS], const Matrix& matrix, const float* row_scales,
                                                 int64_t row, int64_t first, int64_t last, const Tokens& tokens,
                                                 const Target& target) {
    const int count = static_cast<int>(std::min<int64_t>(matrix.rows - row, ROWS));
    for (int64_t m = first; m < last; ++m) {
        float results[ROWS];
        for (int r = 0; r < count; ++r)
            results[r] = static_cast<float>(totals[m - first][r]) * tokens.scales[m] * row_scales[row + r];
        store_rows(results, count, m, row, matrix.rows, target);
    }
}

namespace portable {

// Codes of a token: round(x / scale), ties to even. Returns the scale.
float encode(const Source& source, int64_t token, int64_t columns, float* values, int8_t* codes) {
    const float scale = scale_of(load_token(source, token, columns, values)), inverse = inverse_of(scale);
    const bool is_finite = std::isfinite(scale);
    for (int64_t i = 0; i < columns; ++i)
        codes[i] = is_finite ? static_cast<int8_t>(std::nearbyint(values[i] * inverse)) : 0;
    return scale;
}

void complete(const Layout& layout, int64_t token, Tokens& tokens) { int8::complete(layout, token, tokens); }

void multiply(const Matrix& matrix, const float* row_scales, const Tokens& tokens, int64_t tile, int64_t first, int64_t last,
              const Target& target) {
    Totals totals = {};
    int8_t codes[HEIGHT][WIDTH];
    for (int64_t a = 0; a < matrix.arrays(); ++a) {
        unpack_array(matrix.layout, matrix.array(tile, a), codes);
        for (int64_t m = first; m < last; ++m) {
            const int8_t* x = tokens.codes + m * tokens.columns + a * WIDTH;
            for (int r = 0; r < HEIGHT; ++r) {
                int32_t sum = 0;
                for (int i = 0; i < WIDTH; ++i) sum += codes[r][i] * x[i];
                totals[m - first][r] += sum;
            }
        }
    }
    store<HEIGHT>(totals, matrix, row_scales, tile * HEIGHT, first, last, tokens, target);
}

}  // namespace portable

}  // namespace int8
