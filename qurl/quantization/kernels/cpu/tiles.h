// How weights lie in memory: tiles of 8 rows, with blocks of 8 columns that share a codebook and arrays of 64 that share a scale.
//
// A tile holds, for one array after the other,
//   codes      8 times 32 bytes, per block. Byte 8 q + j has column j of row LOW[q], where LOW = 0, 1, 4, 5, in its low half and
//              that of row LOW[q] + 2 in its high half.
//   selectors  8 times 4 bytes, per block. Byte q has the book of row q in its low half and of row q + 4 in its high half.
//   scales     8 bytes, E4M3 of rows 0 to 7
// That is what is on the wire, 37 bytes per 64 weights, and all of it is read from the first byte to the last. After all tiles
// comes a double for each row: the reciprocal of the float32 scale of its matrix. Rows beyond the last are zeros.
//
// The order of rows is such that a table lookup in each half of a 32-byte register serves two books, and that adding neighbors
// of two sums of products leaves rows 0 to 7 in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "nibbles.h"

constexpr int BLOCK = 8;    // columns that share a book
constexpr int ARRAY = 64;   // columns that share a scale
constexpr int BLOCKS = ARRAY / BLOCK;
constexpr int HEIGHT = 8;   // rows of a tile
constexpr int ENTRIES = 16; // of a book, and books

// Of the array of a tile: where its selectors and scales are, and its end.
constexpr int SELECTORS = BLOCKS * 32, SCALES = SELECTORS + BLOCKS * 4, ARRAY_BYTES = SCALES + HEIGHT;

struct Matrix {
    const uint8_t* packed;
    int64_t rows, columns;

    int64_t arrays() const { return columns / ARRAY; }
    int64_t tiles() const { return (rows + HEIGHT - 1) / HEIGHT; }
    int64_t tile_bytes() const { return arrays() * ARRAY_BYTES; }
    const uint8_t* codes(int64_t tile, int64_t g) const { return packed + tile * tile_bytes() + g * ARRAY_BYTES; }
    const uint8_t* selectors(int64_t tile, int64_t g) const { return codes(tile, g) + SELECTORS; }
    const uint8_t* scales(int64_t tile, int64_t g) const { return codes(tile, g) + SCALES; }
    const double* row_scales() const { return reinterpret_cast<const double*>(packed + tiles() * tile_bytes()); }
    int64_t bytes() const { return tiles() * (tile_bytes() + HEIGHT * 8); }
};

inline void pack_tile(const Matrix& matrix, int64_t tile, uint8_t* packed, const uint8_t* codes, const uint8_t* selectors,
                      const uint8_t* scales, const float* global_scales) {
    const int64_t arrays = matrix.arrays(), blocks = arrays * BLOCKS, first = tile * HEIGHT;
    const int count = static_cast<int>(matrix.rows - first < HEIGHT ? matrix.rows - first : HEIGHT);
    std::memset(packed + tile * matrix.tile_bytes(), 0, static_cast<size_t>(matrix.tile_bytes()));
    for (int r = 0; r < count; ++r) {
        const int q = (r & 1) | (r >> 2) << 1, high = (r >> 1 & 1) * 4;
        const uint8_t* row_codes = codes + (first + r) * blocks * 4;
        const uint8_t* row_selectors = selectors + (first + r) * blocks / 2;
        for (int64_t b = 0; b < blocks; ++b) {
            uint8_t* array = packed + tile * matrix.tile_bytes() + b / BLOCKS * ARRAY_BYTES;
            uint8_t* place = array + b % BLOCKS * 32 + q * 8;
            uint32_t eight;
            uint64_t bytes;
            std::memcpy(&eight, row_codes + b * 4, 4);
            std::memcpy(&bytes, place, 8);
            bytes |= spread(eight) << high;
            std::memcpy(place, &bytes, 8);
            array[SELECTORS + b % BLOCKS * 4 + (r & 3)] |= (row_selectors[b / 2] >> (b & 1) * 4 & 15) << (r >> 2) * 4;
            array[SCALES + r] = scales[(first + r) * arrays + b / BLOCKS];
        }
    }
    double* row_scales = reinterpret_cast<double*>(packed + matrix.tiles() * matrix.tile_bytes()) + first;
    for (int r = 0; r < HEIGHT; ++r) row_scales[r] = r < count ? 1.0 / global_scales[first + r] : 0.0;
}

inline void unpack_tile(const Matrix& matrix, int64_t tile, uint8_t* codes, uint8_t* selectors, uint8_t* scales,
                        float* global_scales) {
    const int64_t arrays = matrix.arrays(), blocks = arrays * BLOCKS, first = tile * HEIGHT;
    for (int r = 0; r < HEIGHT && first + r < matrix.rows; ++r) {
        const int q = (r & 1) | (r >> 2) << 1, high = (r >> 1 & 1) * 4;
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* array = matrix.codes(tile, b / BLOCKS);
            uint64_t bytes;
            std::memcpy(&bytes, array + b % BLOCKS * 32 + q * 8, 8);
            const uint32_t eight = gather(bytes >> high & 0x0F0F0F0F0F0F0F0F);
            std::memcpy(codes + ((first + r) * blocks + b) * 4, &eight, 4);
            const int book = array[SELECTORS + b % BLOCKS * 4 + (r & 3)] >> (r >> 2) * 4 & 15;
            uint8_t& both = selectors[((first + r) * blocks + b) / 2];
            both = static_cast<uint8_t>(b & 1 ? both | book << 4 : book);
            scales[(first + r) * arrays + b / BLOCKS] = array[SCALES + r];
        }
        global_scales[first + r] = static_cast<float>(1.0 / matrix.row_scales()[first + r]);
    }
}
