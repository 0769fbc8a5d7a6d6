// INT8 codes looked up in tables of 256, which Ax-BxP switches its precision with. Plain C functions, called through ctypes.
//
// Codes of a row that stand in one group share a table, the highest that any of them asks for. AVX2's byte shuffle looks up 16
// entries, so a table of magnitudes is 8 shuffles and 7 blends for 32 codes, each blend by a bit of the index. Where the tables
// are odd functions of the code that is all and the sign comes back at the end (psignb), and the largest magnitude of a group asks
// for its table; other tables are two of these, and every code is asked.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))
#endif

namespace {

constexpr int CODES = 256;
constexpr int64_t LARGEST_GROUP = 128;
constexpr int64_t PIECE = 1 << 15;  // codes that a thread takes at once; a multiple of every group

struct Tables {
    const int8_t* values;  // [rows, 256], by the byte of the code
    const int8_t* lowest;  // [256]: the row that a code asks for; 0 for code 0
    int64_t group;  // codes that share a row, a power of 2 up to 128; 1: row 0 serves all
    int rows;
    bool is_symmetric;  // values are odd functions of the code, lowest an even one that grows; -128 counts as -127
};

Tables tables_of(const int8_t* values, const int8_t* lowest, int64_t group) {
    Tables tables{values, lowest, group, 1, true};
    if (group > 1) tables.rows += *std::max_element(lowest, lowest + CODES);
    bool differs = lowest[128] != lowest[129];
    for (int i = 1; i < 128; ++i) differs |= lowest[i] != lowest[CODES - i] || lowest[i] < lowest[i - 1];
    for (const int8_t* row = values; row < values + CODES * tables.rows; row += CODES) {
        differs |= row[0] != 0 || row[128] != row[129];
        for (int i = 1; i < 128; ++i) differs |= row[i] != -row[CODES - i];
    }
    tables.is_symmetric = !differs;
    return tables;
}

namespace portable {

// `count` codes of a row, from the start of a group on.
void look_up(const Tables& tables, const int8_t* codes, int64_t count, int8_t* out) {
    const int64_t group = tables.group > 1 ? tables.group : count;
    for (int64_t start = 0; start < count; start += group) {
        const int64_t end = std::min(start + group, count);
        int8_t shared = 0;
        if (tables.group > 1)
            for (int64_t i = start; i < end; ++i) shared = std::max(shared, tables.lowest[static_cast<uint8_t>(codes[i])]);
        const int8_t* row = tables.values + CODES * shared;
        for (int64_t i = start; i < end; ++i) out[i] = row[static_cast<uint8_t>(codes[i])];
    }
}

}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {

constexpr int64_t WIDTH = 32;  // codes of a register

// A table of 256 in registers, or the half of it that says everything; either lane has its own.
template <bool symmetric>
struct Table {
    __m256i parts[symmetric ? 8 : 16];
};

template <bool symmetric>
AVX2_INLINE Table<symmetric> load(const int8_t* low, const int8_t* high) {
    Table<symmetric> table;
    for (int i = 0; i < (symmetric ? 8 : 16); ++i) {
        const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + 16 * i));
        const __m128i other = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high + 16 * i));
        table.parts[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(part), other, 1);
    }
    return table;
}

// index: below 128
AVX2_INLINE __m256i pick(const __m256i* parts, __m256i index) {
    const __m256i bit4 = _mm256_slli_epi16(index, 3), bit5 = _mm256_slli_epi16(index, 2), bit6 = _mm256_slli_epi16(index, 1);
    __m256i fours[4];
    for (int i = 0; i < 4; ++i)
        fours[i] = _mm256_blendv_epi8(_mm256_shuffle_epi8(parts[2 * i], index), _mm256_shuffle_epi8(parts[2 * i + 1], index), bit4);
    return _mm256_blendv_epi8(_mm256_blendv_epi8(fours[0], fours[1], bit5), _mm256_blendv_epi8(fours[2], fours[3], bit5), bit6);
}

template <bool symmetric>
AVX2_INLINE __m256i index_of(__m256i codes) {
    const __m256i largest = _mm256_set1_epi8(127);
    return symmetric ? _mm256_min_epu8(_mm256_abs_epi8(codes), largest) : _mm256_and_si256(codes, largest);
}

// Entries of a table that is even where it is symmetric.
template <bool symmetric>
AVX2_INLINE __m256i entries(const Table<symmetric>& table, __m256i codes) {
    const __m256i index = index_of<symmetric>(codes), positive = pick(table.parts, index);
    if constexpr (symmetric) return positive;
    else return _mm256_blendv_epi8(positive, pick(table.parts + 8, index), codes);
}

// Entries of a table that is odd where it is symmetric.
template <bool symmetric>
AVX2_INLINE __m256i signed_entries(const Table<symmetric>& table, __m256i codes) {
    const __m256i found = entries<symmetric>(table, codes);
    return symmetric ? _mm256_sign_epi8(found, codes) : found;
}

AVX2_INLINE __m256i read(const int8_t* codes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)); }

AVX2_INLINE void write(int8_t* out, __m256i codes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes); }

// The largest of 2, 4 or 8 neighbors in the place of each.
AVX2_INLINE __m256i group_max(__m256i lowest, int64_t group) {
    lowest = _mm256_max_epu8(lowest, _mm256_or_si256(_mm256_slli_epi16(lowest, 8), _mm256_srli_epi16(lowest, 8)));
    if (group >= 4) lowest = _mm256_max_epu8(lowest, _mm256_or_si256(_mm256_slli_epi32(lowest, 16), _mm256_srli_epi32(lowest, 16)));
    return group >= 8 ? _mm256_max_epu8(lowest, _mm256_shuffle_epi32(lowest, 0xB1)) : lowest;
}

// The largest of either lane in its first byte.
AVX2_INLINE __m256i lane_max(__m256i lowest) {
    lowest = _mm256_max_epu8(lowest, _mm256_shuffle_epi32(lowest, 0x4E));
    lowest = _mm256_max_epu8(lowest, _mm256_shuffle_epi32(lowest, 0xB1));
    lowest = _mm256_max_epu8(lowest, _mm256_srli_epi32(lowest, 16));
    return _mm256_max_epu8(lowest, _mm256_srli_epi16(lowest, 8));
}

template <bool symmetric>
AVX2 void look_up_alone(const Tables& tables, const int8_t* codes, int64_t count, int8_t* out) {
    const auto table = load<symmetric>(tables.values, tables.values);
    for (int64_t i = 0; i < count; i += WIDTH) write(out + i, signed_entries<symmetric>(table, read(codes + i)));
}

// Groups of 2, 4 or 8: every row is looked up.
template <bool symmetric>
AVX2 void look_up_small(const Tables& tables, const int8_t* codes, int64_t count, int8_t* out) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        const __m256i some = read(codes + i);
        const __m256i shared = group_max(entries<symmetric>(load<symmetric>(tables.lowest, tables.lowest), some), tables.group);
        __m256i found = _mm256_setzero_si256();
        for (int row = 0; row < tables.rows; ++row) {
            const int8_t* values = tables.values + CODES * row;
            const __m256i is_shared = _mm256_cmpeq_epi8(shared, _mm256_set1_epi8(static_cast<char>(row)));
            found = _mm256_blendv_epi8(found, signed_entries<symmetric>(load<symmetric>(values, values), some), is_shared);
        }
        write(out + i, found);
    }
}

// Groups of 16 or more: a lane has one row.
template <bool symmetric>
AVX2 void look_up_large(const Tables& tables, const int8_t* codes, int64_t count, int8_t* out) {
    const int64_t width = std::max(tables.group, WIDTH);
    const auto lowest = load<symmetric>(tables.lowest, tables.lowest);
    for (int64_t start = 0; start < count; start += width) {
        __m256i most = _mm256_setzero_si256();  // magnitudes, or the rows that are asked for
        for (int64_t i = start; i < start + width; i += WIDTH) {
            const __m256i some = read(codes + i);
            most = _mm256_max_epu8(most, symmetric ? index_of<symmetric>(some) : entries<symmetric>(lowest, some));
        }
        most = lane_max(most);
        int low = _mm256_extract_epi8(most, 0), high = _mm256_extract_epi8(most, 16);
        if (symmetric) low = tables.lowest[low & 127], high = tables.lowest[high & 127];
        if (tables.group > 16) low = high = std::max(low, high);
        const auto table = load<symmetric>(tables.values + CODES * low, tables.values + CODES * high);
        for (int64_t i = start; i < start + width; i += WIDTH) write(out + i, signed_entries<symmetric>(table, read(codes + i)));
    }
}

// count: a multiple of the group and of WIDTH
template <bool symmetric>
AVX2 void look_up_whole(const Tables& tables, const int8_t* codes, int64_t count, int8_t* out) {
    if (tables.group == 1) look_up_alone<symmetric>(tables, codes, count, out);
    else if (tables.group < 16) look_up_small<symmetric>(tables, codes, count, out);
    else look_up_large<symmetric>(tables, codes, count, out);
}

AVX2 void look_up(const Tables& tables, const int8_t* codes, int64_t count, int8_t* out) {
    const auto whole = tables.is_symmetric ? look_up_whole<true> : look_up_whole<false>;
    const int64_t most = count / LARGEST_GROUP * LARGEST_GROUP;
    whole(tables, codes, most, out);
    if (most == count) return;
    int8_t rest[LARGEST_GROUP] = {}, found[LARGEST_GROUP];  // code 0 asks for row 0
    std::memcpy(rest, codes + most, static_cast<size_t>(count - most));
    whole(tables, rest, LARGEST_GROUP, found);
    std::memcpy(out + most, found, static_cast<size_t>(count - most));
}

}  // namespace avx2

#endif

constexpr decltype(&portable::look_up) PATHS[] = {
    portable::look_up,
#if defined(__x86_64__)
    avx2::look_up,
    avx2::look_up,  // with AVX-512 too
#endif
};

struct Job {
    const Tables& tables;
    decltype(&portable::look_up) look_up;
    const int8_t* codes;
    int64_t rows, columns;
    int8_t* out;
    std::atomic<int64_t> taken{0};

    static void work(void* argument) {
        Job& job = *static_cast<Job*>(argument);
        const int64_t pieces = (job.columns + PIECE - 1) / PIECE;  // of a row
        for (int64_t i; (i = job.taken++) < job.rows * pieces;) {
            const int64_t start = i % pieces * PIECE, place = i / pieces * job.columns + start;
            job.look_up(job.tables, job.codes + place, std::min(PIECE, job.columns - start), job.out + place);
        }
    }
};

}  // namespace

// codes, out: int8 [rows, columns]. values: int8 [R, 256]. lowest: int8 [256], below R. Groups count from the start of each row,
// whose last one may be short.
extern "C" void qurl_look_up(int path, const OpenMp* openmp, const int8_t* codes, int64_t rows, int64_t columns,
                             const int8_t* values, const int8_t* lowest, int64_t group, int8_t* out) {
    const Tables tables = tables_of(values, lowest, group);
    if (columns % group == 0) {
        columns *= rows;
        rows = 1;
    }
    Job job{tables, PATHS[path], codes, rows, columns, out};
    const int64_t most = rows * columns / (2 * PIECE);  // threads that are worth waking
    fork(*openmp, static_cast<int>(std::clamp<int64_t>(most, 1, num_threads(*openmp))), Job::work, &job);
}
