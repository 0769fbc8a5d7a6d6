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
#include <cstdlib>
#include <cstring>

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

inline void pack_numbers(const Layout& layout, uint8_t* array, int row, int column, const int8_t* codes, int shift) {
    for (int c = 0; c < GROUP; ++c) {
        const int number = (codes[c] >> shift) + layout.offset(), place = 4 * row + (c & 3), half = (column + c) / 4;
        array[half / 2 * PART + place] |= static_cast<uint8_t>((number & 15) << (half & 1) * 4);
        if (layout.has_plane()) array[PLANE + place] |= static_cast<uint8_t>((number >> 4 & 1) << half);
    }
}

// codes: int8 [rows, columns]. lowest: uint8 [rows, columns / 16], the lowest block of each group, which its codes are multiples
// of; unused where codes are whole.
inline void pack_tile(const Matrix& matrix, int64_t tile, uint8_t* packed, const int8_t* codes, const uint8_t* lowest) {
    const Layout& layout = matrix.layout;
    uint8_t* arrays = packed + tile * matrix.tile_bytes();
    std::memset(arrays, 0, static_cast<size_t>(matrix.tile_bytes()));
    for (int r = 0; r < HEIGHT && tile * HEIGHT + r < matrix.rows; ++r) {
        const int64_t row = tile * HEIGHT + r;
        const int8_t* own = codes + row * matrix.columns;
        if (layout.is_whole()) {
            for (int64_t c = 0; c < matrix.columns / 2; ++c) std::memcpy(arrays + c * 2 * HEIGHT + 2 * r, own + 2 * c, 2);
            if (matrix.columns % 2) arrays[matrix.columns / 2 * 2 * HEIGHT + 2 * r] = static_cast<uint8_t>(own[matrix.columns - 1]);
            continue;
        }
        for (int64_t g = 0; g < matrix.columns / GROUP; ++g) {
            const uint32_t number = lowest[row * (matrix.columns / GROUP) + g];
            const int half = static_cast<int>(g % 2), first_bit = r * layout.lowest_bits;
            uint8_t* array = arrays + g / 2 * layout.array_bytes();
            uint8_t* bytes = array + layout.lowest() + half * layout.lowest_bits;
            for (int bit = 0; bit < layout.lowest_bits; ++bit)
                bytes[(first_bit + bit) / 8] |= static_cast<uint8_t>((number >> bit & 1) << (first_bit + bit) % 8);
            pack_numbers(layout, array, r, half * GROUP, own + g * GROUP, static_cast<int>(number) * layout.block_bits);
        }
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
