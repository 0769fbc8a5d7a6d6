// How weights lie in memory: tiles of 8 rows in strips of 8 columns, with blocks of columns that share a codebook and arrays that
// share a scale.
//
// A tile holds, for one array after the other,
//   codes      32 bytes per strip. Byte 8 q + j has column j of row LOW[q], where LOW = 0, 1, 4, 5, in its low half and that of row
//              LOW[q] + 2 in its high half.
//   selectors  32 / L_b bytes per strip. Byte 8 / L_b * q + k has the book of row q's block k in its low half and that of row q + 4
//              in its high half.
//              Of blocks of 2 or 4 with at most 4 books, bit by bit: byte k of the 8 / L_b bytes for a bit of a strip's selectors,
//              the lowest first, has that of row r's block k as bit r.
//   scales     8 bytes, E4M3 of rows 0 to 7
// With 16 books, or selectors bit by bit, that is what is on the wire: 37 bytes per 64 weights with 16 for blocks of 8 in arrays of
// 64. It is read from the first byte to the last. After all tiles comes a double for each row: the reciprocal of the float32 scale
// of its matrix. Rows beyond the last are zeros.
//
// The order of rows is such that a table lookup in each half of a 32-byte register serves two books, and that adding neighbors
// of two sums of products leaves rows 0 to 7 in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "nibbles.h"

constexpr int WIDTH = 8;     // columns of a strip
constexpr int HEIGHT = 8;    // rows of a tile
constexpr int ENTRIES = 16;  // of a book, and books
constexpr int LARGEST_ARRAY = 128, MOST_STRIPS = LARGEST_ARRAY / WIDTH;

// The fields are read from Python.
struct Layout {
    int array;          // columns: 16, 32, 64 or 128
    int block;          // columns: 2, 4 or 8
    int selector_bits;  // that number the books: 0 to 4

    constexpr int strips() const { return array / WIDTH; }  // of an array
    constexpr int blocks() const { return WIDTH / block; }  // of a row in a strip
    constexpr bool has_bits() const { return block < WIDTH && selector_bits <= 2; }  // rather than selectors of half a byte

    // Of a strip.
    constexpr int selector_bytes() const { return (has_bits() ? selector_bits : HEIGHT / 2) * blocks(); }

    // Where an array's selectors and scales are, and its end.
    constexpr int selectors_at() const { return strips() * 32; }
    constexpr int scales_at() const { return selectors_at() + strips() * selector_bytes(); }
    constexpr int array_bytes() const { return scales_at() + HEIGHT; }

    // The book of block k of row r, given the selectors of its strip.
    int book(const uint8_t* selectors, int r, int k) const {
        if (!has_bits()) return selectors[(r & 3) * blocks() + k] >> (r >> 2) * 4 & 15;
        int book = 0;
        for (int bit = 0; bit < selector_bits; ++bit) book |= (selectors[bit * blocks() + k] >> r & 1) << bit;
        return book;
    }

    // The selectors were zeros.
    void set_book(uint8_t* selectors, int r, int k, int book) const {
        if (!has_bits()) selectors[(r & 3) * blocks() + k] |= static_cast<uint8_t>(book << (r >> 2) * 4);
        for (int bit = 0; has_bits() && bit < selector_bits; ++bit)
            selectors[bit * blocks() + k] |= static_cast<uint8_t>((book >> bit & 1) << r);
    }
};

struct Matrix {
    const Layout& layout;
    const uint8_t* packed;
    int64_t rows, columns;

    int64_t arrays() const { return columns / layout.array; }
    int64_t tiles() const { return (rows + HEIGHT - 1) / HEIGHT; }
    int64_t tile_bytes() const { return arrays() * layout.array_bytes(); }
    const uint8_t* array(int64_t tile, int64_t g) const { return packed + tile * tile_bytes() + g * layout.array_bytes(); }
    const uint8_t* scales(int64_t tile, int64_t g) const { return array(tile, g) + layout.scales_at(); }
    const double* row_scales() const { return reinterpret_cast<const double*>(packed + tiles() * tile_bytes()); }
    int64_t bytes() const { return tiles() * (tile_bytes() + HEIGHT * 8); }
};

// Where a strip of row r of a tile lies: its codes are in the low or the high halves of eight bytes.
inline int codes_at(int r) { return ((r & 1) | (r >> 2) << 1) * 8; }
inline int shift_of(int r) { return (r >> 1 & 1) * 4; }

inline void pack_tile(const Matrix& matrix, int64_t tile, uint8_t* packed, const uint8_t* codes, const uint8_t* selectors,
                      const uint8_t* scales, const float* global_scales) {
    const Layout& layout = matrix.layout;
    const int64_t arrays = matrix.arrays(), strips = matrix.columns / WIDTH, blocks = matrix.columns / layout.block;
    const int64_t first = tile * HEIGHT;
    const int count = static_cast<int>(matrix.rows - first < HEIGHT ? matrix.rows - first : HEIGHT);
    std::memset(packed + tile * matrix.tile_bytes(), 0, static_cast<size_t>(matrix.tile_bytes()));
    for (int r = 0; r < count; ++r) {
        const uint8_t* row_codes = codes + (first + r) * strips * 4;
        const uint8_t* row_selectors = selectors + (first + r) * blocks / 2;
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t g = s / layout.strips(), place = s % layout.strips();  // the array, and where in it
            uint8_t* array = packed + tile * matrix.tile_bytes() + g * layout.array_bytes();
            uint8_t* eight_bytes = array + place * 32 + codes_at(r);
            uint32_t eight;
            uint64_t bytes;
            std::memcpy(&eight, row_codes + s * 4, 4);
            std::memcpy(&bytes, eight_bytes, 8);
            bytes |= spread(eight) << shift_of(r);
            std::memcpy(eight_bytes, &bytes, 8);
            for (int k = 0; k < layout.blocks(); ++k) {
                const int64_t b = s * layout.blocks() + k;
                const int book = row_selectors[b / 2] >> (b & 1) * 4 & 15;
                layout.set_book(array + layout.selectors_at() + place * layout.selector_bytes(), r, k, book);
            }
            array[layout.scales_at() + r] = scales[(first + r) * arrays + g];
        }
    }
    double* row_scales = reinterpret_cast<double*>(packed + matrix.tiles() * matrix.tile_bytes()) + first;
    for (int r = 0; r < HEIGHT; ++r) row_scales[r] = r < count ? 1.0 / global_scales[first + r] : 0.0;
}

inline void unpack_tile(const Matrix& matrix, int64_t tile, uint8_t* codes, uint8_t* selectors, uint8_t* scales,
                        float* global_scales) {
    const Layout& layout = matrix.layout;
    const int64_t arrays = matrix.arrays(), strips = matrix.columns / WIDTH, blocks = matrix.columns / layout.block;
    const int64_t first = tile * HEIGHT;
    for (int r = 0; r < HEIGHT && first + r < matrix.rows; ++r) {
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t g = s / layout.strips(), place = s % layout.strips();
            const uint8_t* array = matrix.array(tile, g);
            uint64_t bytes;
            std::memcpy(&bytes, array + place * 32 + codes_at(r), 8);
            const uint32_t eight = gather(bytes >> shift_of(r) & 0x0F0F0F0F0F0F0F0F);
            std::memcpy(codes + ((first + r) * strips + s) * 4, &eight, 4);
            for (int k = 0; k < layout.blocks(); ++k) {
                const int64_t b = s * layout.blocks() + k;
                const int book = layout.book(array + layout.selectors_at() + place * layout.selector_bytes(), r, k);
                uint8_t& both = selectors[((first + r) * blocks + b) / 2];
                both = static_cast<uint8_t>(b & 1 ? both | book << 4 : book);
            }
            scales[(first + r) * arrays + g] = matrix.scales(tile, g)[r];
        }
        global_scales[first + r] = static_cast<float>(1.0 / matrix.row_scales()[first + r]);
    }
}
