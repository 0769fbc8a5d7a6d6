// Codes of four bits.
#pragma once

#include <cstdint>

// Eight codes of four bits, the first in the lowest, to eight bytes, and back.
inline uint64_t spread(uint32_t codes) {
    uint64_t x = codes;
    x = (x | x << 16) & 0x0000FFFF0000FFFF;
    x = (x | x << 8) & 0x00FF00FF00FF00FF;
    return (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
}

inline uint32_t gather(uint64_t x) {
    x = (x | x >> 4) & 0x00FF00FF00FF00FF;
    x = (x | x >> 8) & 0x0000FFFF0000FFFF;
    return static_cast<uint32_t>(x | x >> 16);
}
