// How INT8 weights, and Ax-BxP's kept blocks of them, lie in memory: tiles of 8 rows, with arrays of 32 columns.
//
// A tile holds one array after the other, and is read from the first byte to the last. An array of INT8 codes is 16 times 16 bytes,
// for two columns each: byte 2 r + j has column j of row r. An array of kept blocks holds for 16 columns at a time, a group, one
// shift per row, and for every weight a number from 0 on that is the sign and the L blocks,
//
//     number = (code >> shift) + 2^(K L) - 1
//
//   nibbles    4 times 32 bytes. Byte 4 r + j of part b has the lower 4 bits of the numbers of columns 8 b + j and 8 b + 4 + j of
//              row r, in its low and its high half
//   plane      32 bytes, where K L = 4: bit 2 b + h of byte 4 r + j is the fifth bit of the number whose lower 4 are in half h of
//              byte 4 r + j of part b
//   lowest     for either group as many bytes as the number of a row's lowest block has bits: that of row r begins at bit r times
//              these bits. The shift is K times the number
//
// which is as many bytes as on the wire. Rows and columns beyond the last are zeros.
#pragma once

#include <cstdint>
#include <cstring>

#include "nibbles.h"

namespace int8 {

constexpr int HEIGHT = 8;   // rows of a tile
constexpr int GROUP = 16;   // columns that share a shift
constexpr int WIDTH = 32;   // columns of an array
constexpr int PARTS = 4;    // of nibbles
constexpr int PART = 32;    // bytes
constexpr int PLANE = PARTS * PART;

// What is kept of a code. The fields are read from Python.
struct Layout {
    int magnitude_bits;  // K L, 3 or 4; 8: codes are whole
    int lowest_bits;     // of the number of the lowest block
    int block_bits;      // K

    bool is_whole() const { return magnitude_bits == 8; }
    bool has_plane() const { return magnitude_bits == 4; }
    int lowest() const { return PLANE + (has_plane() ? PART : 0); }
    int array_bytes() const { return is_whole() ? HEIGHT * WIDTH : lowest() + 2 * lowest_bits; }
    int offset() const { return (1 << magnitude_bits) - 1; }  // of the numbers
};

struct Matrix {
    const Layout& layout;
    const uint8_t* packed;
    int64_t rows, columns;

    int64_t arrays() const { return (columns + WIDTH - 1) / WIDTH; }
    int64_t groups() const { return arrays() * (WIDTH / GROUP); }
    int64_t tiles() const { return (rows + HEIGHT - 1) / HEIGHT; }
    int64_t tile_bytes() const { return arrays() * layout.array_bytes(); }
    int64_t bytes() const { return tiles() * tile_bytes(); }
    const uint8_t* array(int64_t tile, int64_t a) const { return packed + tile * tile_bytes() + a * layout.array_bytes(); }
};

// Bits of a group's lowest blocks in an array, from which that of row r follows at bit r * lowest_bits.
inline uint32_t lowest_of(const Layout& layout, const uint8_t* array, int half) {
    uint32_t bits = 0;
    for (int i = 0; i < layout.lowest_bits; ++i) bits |= uint32_t{array[layout.lowest() + half * layout.lowest_bits + i]} << 8 * i;
    return bits;
}

inline int shift_of(const Layout& layout, uint32_t lowest, int row) {
    return static_cast<int>(lowest >> row * layout.lowest_bits & ((1u << layout.lowest_bits) - 1)) * layout.block_bits;
}

// Weights as they are on the wire, row by row.
struct Wire {
    const uint8_t* codes;   // int8 [rows, columns], or [rows, columns / 2] with two nibbles in a byte, the first in its low half
    const uint8_t* signs;   // [rows, columns / 8] where there is a plane: a bit each, the first in the lowest
    const uint8_t* lowest;  // [rows, ...] where codes are not whole: lowest_bits for each group, likewise
};

// Numbers of eight columns, a byte each.
inline uint64_t numbers_of(const Layout& layout, const Wire& wire, int64_t first) {
    uint32_t nibbles;
    std::memcpy(&nibbles, wire.codes + first / 2, 4);
    const uint64_t ones = 0x0101010101010101;
    uint64_t magnitudes = spread(nibbles), negative = magnitudes >> 3 & ones;
    if (layout.has_plane()) negative = ((wire.signs[first / 8] * ones & 0x8040201008040201) + 0x7F * ones) >> 7 & ones;
    else magnitudes &= 7 * ones;
    negative *= 255;
    return layout.offset() * ones + (magnitudes & ~negative) - (magnitudes & negative);
}

inline void pack_groups(const Matrix& matrix, int64_t row, uint8_t* arrays, const Wire& wire) {
    const Layout& layout = matrix.layout;
    const int64_t groups = matrix.columns / GROUP;
    const uint8_t* lowest = wire.lowest + row * ((groups * layout.lowest_bits + 7) / 8);
    const int r = static_cast<int>(row % HEIGHT);
    const auto copy_bit = [](const uint8_t* from, int64_t bit, uint8_t* to, int64_t place) {
        to[place / 8] |= static_cast<uint8_t>((from[bit / 8] >> bit % 8 & 1) << place % 8);
    };
    for (int64_t g = 0; g < groups; ++g) {
        uint8_t* array = arrays + g / 2 * layout.array_bytes();
        uint32_t plane = 0;
        for (int part = static_cast<int>(g % 2) * 2, end = part + 2; part < end; ++part) {
            const uint64_t numbers = numbers_of(layout, wire, row * matrix.columns + (g / 2 * PARTS + part) * 8);
            const uint32_t halves[2] = {static_cast<uint32_t>(numbers), static_cast<uint32_t>(numbers >> 32)};
            const uint32_t both = (halves[0] & 0x0F0F0F0F) | (halves[1] & 0x0F0F0F0F) << 4;
            std::memcpy(array + part * PART + 4 * r, &both, 4);
            for (int h = 0; h < 2; ++h) plane |= (halves[h] >> 4 & 0x01010101) << (2 * part + h);
        }
        if (layout.has_plane())
            for (int j = 0; j < 4; ++j) array[PLANE + 4 * r + j] |= static_cast<uint8_t>(plane >> 8 * j);
        uint8_t* place = array + layout.lowest() + g % 2 * layout.lowest_bits;
        for (int bit = 0; bit < layout.lowest_bits; ++bit)
            copy_bit(lowest, g * layout.lowest_bits + bit, place, r * layout.lowest_bits + bit);
    }
}

inline void pack_tile(const Matrix& matrix, int64_t tile, uint8_t* packed, const Wire& wire) {
    uint8_t* arrays = packed + tile * matrix.tile_bytes();
    std::memset(arrays, 0, static_cast<size_t>(matrix.tile_bytes()));
    for (int r = 0; r < HEIGHT && tile * HEIGHT + r < matrix.rows; ++r) {
        const int64_t row = tile * HEIGHT + r, columns = matrix.columns;
        if (!matrix.layout.is_whole()) {
            pack_groups(matrix, row, arrays, wire);
            continue;
        }
        const uint8_t* codes = wire.codes + row * columns;
        for (int64_t c = 0; c < columns / 2; ++c) std::memcpy(arrays + c * 2 * HEIGHT + 2 * r, codes + 2 * c, 2);
        if (columns % 2) arrays[columns / 2 * 2 * HEIGHT + 2 * r] = codes[columns - 1];
    }
}

// The codes of an array, whole and in order.
inline void unpack_array(const Layout& layout, const uint8_t* array, int8_t codes[HEIGHT][WIDTH]) {
    if (layout.is_whole()) {
        for (int r = 0; r < HEIGHT; ++r)
            for (int c = 0; c < WIDTH; ++c) codes[r][c] = static_cast<int8_t>(array[c / 2 * 16 + 2 * r + (c & 1)]);
        return;
    }
    const uint32_t lowest[2] = {lowest_of(layout, array, 0), lowest_of(layout, array, 1)};
    for (int r = 0; r < HEIGHT; ++r)
        for (int c = 0; c < WIDTH; ++c) {
            const int place = 4 * r + (c & 3), half = c / 4;
            int number = array[half / 2 * PART + place] >> (half & 1) * 4 & 15;
            if (layout.has_plane()) number |= (array[PLANE + place] >> half & 1) << 4;
            codes[r][c] = static_cast<int8_t>((number - layout.offset()) * (1 << shift_of(layout, lowest[c / GROUP], r)));
        }
}

inline void unpack_tile(const Matrix& matrix, int64_t tile, int8_t* codes) {
    int8_t some[HEIGHT][WIDTH];
    for (int64_t a = 0; a < matrix.arrays(); ++a) {
        unpack_array(matrix.layout, matrix.array(tile, a), some);
        const int64_t count = matrix.columns - a * WIDTH < WIDTH ? matrix.columns - a * WIDTH : WIDTH;
        for (int r = 0; r < HEIGHT && tile * HEIGHT + r < matrix.rows; ++r)
            std::memcpy(codes + (tile * HEIGHT + r) * matrix.columns + a * WIDTH, some[r], static_cast<size_t>(count));
    }
}

}  // namespace int8
