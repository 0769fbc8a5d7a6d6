// How weights lie in memory: tiles of 8 rows, with blocks of 8 columns that share a codebook and arrays of blocks that share a
// scale.
//
// A tile holds, for one array after the other,
//   codes      32 bytes per block. Byte 8 q + j has column j of row LOW[q], where LOW = 0, 1, 4, 5, in its low half and that of row
//              LOW[q] + 2 in its high half.
//   selectors  4 bytes per block. Byte q has the book of row q in its low half and of row q + 4 in its high half.
//   scales     8 bytes, E4M3 of rows 0 to 7
// That is what is on the wire where there are 16 books, 37 bytes per 64 weights in arrays of 64, and all of it is read from the
// first byte to the last. After all tiles comes a double for each row: the reciprocal of the float32 scale of its matrix. Rows
// beyond the last are zeros.
//
// The order of rows is such that a table lookup in each half of a 32-byte register serves two books, and that adding neighbors
// of two sums of products leaves rows 0 to 7 in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "nibbles.h"

constexpr int BLOCK = 8;     // columns that share a book
constexpr int HEIGHT = 8;    // rows of a tile
constexpr int ENTRIES = 16;  // of a book, and books
constexpr int LARGEST_ARRAY = 128, MOST_BLOCKS = LARGEST_ARRAY / BLOCK;

// An array of a tile: where its selectors and scales are, and its end.
constexpr int selectors_at(int blocks) { return blocks * 32; }
constexpr int scales_at(int blocks) { return blocks * 36; }
constexpr int array_bytes(int blocks) { return blocks * 36 + HEIGHT; }

struct Matrix {
    const uint8_t* packed;
    int64_t rows, columns;
    int blocks;  // of an array: 2, 4, 8 or 16

    int64_t arrays() const { return columns / (blocks * BLOCK); }
    int64_t tiles() const { return (rows + HEIGHT - 1) / HEIGHT; }
    int64_t tile_bytes() const { return arrays() * array_bytes(blocks); }
    const uint8_t* codes(int64_t tile, int64_t g) const { return packed + tile * tile_bytes() + g * array_bytes(blocks); }
    const uint8_t* selectors(int64_t tile, int64_t g) const { return codes(tile, g) + selectors_at(blocks); }
    const uint8_t* scales(int64_t tile, int64_t g) const { return codes(tile, g) + scales_at(blocks); }
    const double* row_scales() const { return reinterpret_cast<const double*>(packed + tiles() * tile_bytes()); }
    int64_t bytes() const { return tiles() * (tile_bytes() + HEIGHT * 8); }
};

inline void pack_tile(const Matrix& matrix, int64_t tile, uint8_t* packed, const uint8_t* codes, const uint8_t* selectors,
                      const uint8_t* scales, const float* global_scales) {
    const int64_t arrays = matrix.arrays(), blocks = arrays * matrix.blocks, first = tile * HEIGHT;
    const int count = static_cast<int>(matrix.rows - first < HEIGHT ? matrix.rows - first : HEIGHT);
    std::memset(packed + tile * matrix.tile_bytes(), 0, static_cast<size_t>(matrix.tile_bytes()));
    for (int r = 0; r < count; ++r) {
        const int q = (r & 1) | (r >> 2) << 1, high = (r >> 1 & 1) * 4;
        const uint8_t* row_codes = codes + (first + r) * blocks * 4;
        const uint8_t* row_selectors = selectors + (first + r) * blocks / 2;
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t g = b / matrix.blocks, place = b % matrix.blocks;  // the array, and where in it
            uint8_t* array = packed + tile * matrix.tile_bytes() + g * array_bytes(matrix.blocks);
            uint8_t* eight_bytes = array + place * 32 + q * 8;
            uint32_t eight;
            uint64_t bytes;
            std::memcpy(&eight, row_codes + b * 4, 4);
            std::memcpy(&bytes, eight_bytes, 8);
            bytes |= spread(eight) << high;
            std::memcpy(eight_bytes, &bytes, 8);
            const int book = row_selectors[b / 2] >> (b & 1) * 4 & 15;
            array[selectors_at(matrix.blocks) + place * 4 + (r & 3)] |= static_cast<uint8_t>(book << (r >> 2) * 4);
            array[scales_at(matrix.blocks) + r] = scales[(first + r) * arrays + g];
        }
    }
    double* row_scales = reinterpret_cast<double*>(packed + matrix.tiles() * matrix.tile_bytes()) + first;
    for (int r = 0; r < HEIGHT; ++r) row_scales[r] = r < count ? 1.0 / global_scales[first + r] : 0.0;
}

inline void unpack_tile(const Matrix& matrix, int64_t tile, uint8_t* codes, uint8_t* selectors, uint8_t* scales,
                        float* global_scales) {
    const int64_t arrays = matrix.arrays(), blocks = arrays * matrix.blocks, first = tile * HEIGHT;
    for (int r = 0; r < HEIGHT && first + r < matrix.rows; ++r) {
        const int q = (r & 1) | (r >> 2) << 1, high = (r >> 1 & 1) * 4;
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t g = b / matrix.blocks, place = b % matrix.blocks;
            uint64_t bytes;
            std::memcpy(&bytes, matrix.codes(tile, g) + place * 32 + q * 8, 8);
            const uint32_t eight = gather(bytes >> high & 0x0F0F0F0F0F0F0F0F);
            std::memcpy(codes + ((first + r) * blocks + b) * 4, &eight, 4);
            const int book = matrix.selectors(tile, g)[place * 4 + (r & 3)] >> (r >> 2) * 4 & 15;
            uint8_t& both = selectors[((first + r) * blocks + b) / 2];
            both = static_cast<uint8_t>(b & 1 ? both | book << 4 : book);
            scales[(first + r) * arrays + g] = matrix.scales(tile, g)[r];
        }
        global_scales[first + r] = static_cast<float>(1.0 / matrix.row_scales()[first + r]);
    }
}
