// LO-BCQ linear layers with weights that stay packed. Plain C functions, called through ctypes.
//
// A thread takes the next piece of work when it is done with one, so that a slow core holds nobody up.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "avx2.h"
#include "avx512.h"
#include "portable.h"
#include "threads.h"

namespace {

struct Path {
    decltype(&portable::load) load;
    decltype(&portable::encode) encode, encode_digits;
    decltype(&portable::multiply) multiply;
};

const Path PATHS[] = {
    {portable::load, portable::encode, portable::encode_digits, portable::multiply},
#if defined(__x86_64__)
    {avx2::load, avx2::encode, avx2::encode_digits, avx2::multiply},
    {avx2::load, avx512::encode, avx2::encode_digits, avx512::multiply},
#endif
};

struct Job {
    const Books &books, &activation_books;
    const Path& path;
    const OpenMp& openmp;
    const Source& source;
    Tokens& tokens;
    const Matrix* matrix;  // null: only encode
    const Target& target;
    int threads;
    std::atomic<int64_t> encoded{0}, multiplied{0};

    // A token's activations, or a part of them where there are fewer tokens than threads.
    void encode() {
        const int64_t arrays = tokens.arrays(), parts = std::max<int64_t>(1, std::min<int64_t>(threads / tokens.count, arrays));
        const auto encode = tokens.planes == 1 ? path.encode : path.encode_digits;
        std::unique_ptr<float[]> values(new float[tokens.columns]);
        for (int64_t i; (i = encoded++) < tokens.count * parts;) {
            const int64_t token = i / parts, part = i % parts;
            const float amax = path.load(source, token, tokens.columns, values.get());
            const float scale = tokens.planes == 1 ? global_scale_of(amax, activation_books) : power_above(amax);
            if (std::isfinite(scale)) {
                encode(activation_books, values.get(), scale, arrays * part / parts, arrays * (part + 1) / parts, token, tokens);
            } else {
                std::fill_n(tokens.codes + token * tokens.planes * tokens.columns, tokens.planes * tokens.columns, 0);
                std::fill_n(tokens.scales + token * tokens.planes * arrays, tokens.planes * arrays, 0.0f);
                std::fill_n(tokens.offsets + token * tokens.planes * arrays, tokens.planes * arrays, 0);
            }
            if (part == 0) tokens.factors[token] = tokens.planes == 1 ? 1.0 / scale : scale * 0x1p-13;
        }
    }

    void multiply() {
        const int64_t tiles = matrix->tiles(), chunk = std::max<int64_t>(1, tiles / (threads * 8));
        const int64_t chunks = (tiles + chunk - 1) / chunk;
        const int64_t planes = tokens.count * tokens.planes, groups = (planes + PLANES - 1) / PLANES;
        for (int64_t i; (i = multiplied++) < groups * chunks;) {
            const int64_t first = i / chunks * PLANES, last = std::min<int64_t>(first + PLANES, planes);
            const int64_t tile = i % chunks * chunk, end = std::min(tile + chunk, tiles);
            for (int64_t t = tile; t < end; ++t) path.multiply(books, *matrix, tokens, t, first, last, target);
        }
    }

    static void work(void* argument) {
        Job& job = *static_cast<Job*>(argument);
        job.encode();
        if (job.threads > 1) job.openmp.barrier();
        if (job.matrix) job.multiply();
    }
};

// Parts of one allocation.
template <typename T>
T* take(char*& place, int64_t count) {
    T* part = reinterpret_cast<T*>(place);
    place += (count * sizeof(T) + 63) / 64 * 64;
    return part;
}

// Threads that read a part each, as fast as they can.
struct Read {
    const uint64_t* data;
    int64_t words;
    int threads;
    std::atomic<int> started{0};
    std::atomic<uint64_t> sum{0};

    static void work(void* argument) {
        Read& read = *static_cast<Read*>(argument);
        const int64_t part = read.started++;
        const uint64_t* end = read.data + read.words * (part + 1) / read.threads / 32 * 32;
        uint64_t sums[32] = {};
        for (const uint64_t* word = read.data + read.words * part / read.threads / 32 * 32; word < end; word += 32)
            for (int i = 0; i < 32; ++i) sums[i] ^= word[i];
        for (uint64_t one : sums) read.sum ^= one;
    }
};

void run(const Books& books, const Books& activation_books, int path, const OpenMp& openmp, const Source& source, Tokens& tokens,
         const Matrix* matrix, const Target& target) {
    Job job{books, activation_books, PATHS[path], openmp, source, tokens, matrix, target, num_threads(openmp)};
    fork(openmp, job.threads, Job::work, &job);
}

}  // namespace

extern "C" {

// How many of the paths this CPU runs: portable, AVX2, AVX-512.
int qurl_num_paths() {
#if defined(__x86_64__)
    return !avx2::is_supported() ? 1 : !avx512::is_supported() ? 2 : 3;
#else
    return 1;
#endif
}

// Reads `bytes` bytes, a multiple of 256: what memory can deliver. Returns something that depends on all of them.
uint64_t qurl_read(const OpenMp* openmp, const void* data, int64_t bytes) {
    Read read{static_cast<const uint64_t*>(data), bytes / 8, num_threads(*openmp)};
    fork(*openmp, read.threads, Read::work, &read);
    return read.sum;
}

// entries: int8 [16, 16], where there are fewer books with copies of the last. Lives until the process ends.
const Books* qurl_lobcq_books(const int8_t* entries, int largest) { return new Books(entries, largest); }

int64_t qurl_lobcq_bytes(const Layout* layout, int64_t rows, int64_t columns) {
    return Matrix{*layout, nullptr, rows, columns}.bytes();
}

// selectors: uint8 [rows, columns / L_b / 2], two in a byte.
void qurl_lobcq_pack(const Layout* layout, int64_t rows, int64_t columns, uint8_t* packed, const uint8_t* codes,
                     const uint8_t* selectors, const uint8_t* scales, const float* global_scales) {
    const Matrix matrix{*layout, packed, rows, columns};
    for (int64_t tile = 0; tile < matrix.tiles(); ++tile) pack_tile(matrix, tile, packed, codes, selectors, scales, global_scales);
}

void qurl_lobcq_unpack(const Layout* layout, int64_t rows, int64_t columns, const uint8_t* packed, uint8_t* codes,
                       uint8_t* selectors, uint8_t* scales, float* global_scales) {
    const Matrix matrix{*layout, packed, rows, columns};
    for (int64_t tile = 0; tile < matrix.tiles(); ++tile) unpack_tile(matrix, tile, codes, selectors, scales, global_scales);
}

// books: of activations. codes: int8 [tokens, columns]. scales: float32 [tokens, arrays], 2^8 E4M3 numbers. factors: double
// [tokens].
void qurl_lobcq_encode(const Layout* layout, const Books* books, int path, const OpenMp* openmp, int rotation, const void* x,
                       int is_bfloat16, int64_t count, int64_t columns, int8_t* codes, float* scales, double* factors) {
    std::unique_ptr<int32_t[]> offsets(new int32_t[count * columns / layout->array]);
    Tokens tokens{*layout, count, columns, 1, books->largest, codes, scales, offsets.get(), factors};
    run(*books, *books, path, *openmp, {x, is_bfloat16 != 0, rotation}, tokens, nullptr, {});
}

// x: float32 or bfloat16 [count, columns]. bias: null or [rows]. out: [count, rows] in x's dtype.
void qurl_lobcq_linear(const Layout* layout, const Books* books, const Books* activation_books, int path, const OpenMp* openmp,
                       int rotation, int keeps_activations, const void* x, int is_bfloat16, int64_t count, const uint8_t* packed,
                       int64_t rows, int64_t columns, const void* bias, int is_bias_bfloat16, void* out) {
    const Matrix matrix{*layout, packed, rows, columns};
    const int planes = keeps_activations ? DIGITS : 1, largest = keeps_activations ? 128 : activation_books->largest;
    const int64_t numbers = count * planes * columns, arrays = numbers / layout->array;
    const int64_t bytes = numbers + arrays * 8 + count * 8 + 4 * 64;
    std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    if (!memory) throw std::bad_alloc();
    char* place = static_cast<char*>(memory.get());
    Tokens tokens{*layout, count, columns, planes, largest, take<int8_t>(place, numbers), take<float>(place, arrays),
                  take<int32_t>(place, arrays), take<double>(place, count)};
    run(*books, *activation_books, path, *openmp, {x, is_bfloat16 != 0, rotation}, tokens, &matrix,
        {out, is_bfloat16 != 0, bias, is_bias_bfloat16 != 0});
}

}
