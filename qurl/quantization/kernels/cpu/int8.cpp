// Linear layers of INT8 codes, and of Ax-BxP's kept blocks of them, which stay packed. Plain C functions, called through ctypes.
//
// A thread takes the next piece of work when it is done with one, so that a slow core holds nobody up.
#include <algorithm>
#include <atomic>
#include <memory>

#include "int8_avx2.h"
#include "int8_avx512.h"
#include "int8_portable.h"
#include "threads.h"

namespace int8 {
namespace {

struct Path {
    decltype(&portable::encode) encode;
    decltype(&portable::complete) complete;
    decltype(&portable::multiply) multiply;
    int tiles;  // that are multiplied together
};

const Path PATHS[] = {
    {portable::encode, portable::complete, portable::multiply, 1},
#if defined(__x86_64__)
    {avx2::encode, avx2::complete, avx2::multiply, 1},
    {avx2::encode, avx512::complete, avx512::multiply, avx512::TILES},
#endif
};

template <typename T>
std::unique_ptr<T[]> zeros(int64_t count) {
    return std::unique_ptr<T[]>(new T[count]());
}

// Work of threads, of which one takes the next number below `count` when it is done with another.
template <typename Work>
struct Loop {
    int64_t count;
    const Work& work;
    std::atomic<int64_t> taken{0};

    static void run(void* argument) {
        Loop& loop = *static_cast<Loop*>(argument);
        for (int64_t i; (i = loop.taken++) < loop.count;) loop.work(i);
    }
};

template <typename Work>
void for_each(const OpenMp& openmp, int64_t count, const Work& work) {
    Loop<Work> loop{count, work};
    fork(openmp, static_cast<int>(std::min<int64_t>(num_threads(openmp), count)), Loop<Work>::run, &loop);
}

struct Job {
    const Path& path;
    const OpenMp& openmp;
    const Source& source;
    const int8_t* codes;  // of the activations, with their scales in tokens; null: they come from source
    const Matrix& matrix;
    const float* row_scales;
    Tokens& tokens;
    const Target& target;
    int threads;
    std::atomic<int64_t> encoded{0}, multiplied{0};

    void encode() {
        std::unique_ptr<float[]> values(codes ? nullptr : new float[matrix.columns]);
        for (int64_t i; (i = encoded++) < tokens.count;) {
            int8_t* own = tokens.codes + i * tokens.columns;
            if (codes) std::memcpy(own, codes + i * matrix.columns, static_cast<size_t>(matrix.columns));
            else tokens.scales[i] = path.encode(source, i, matrix.columns, values.get(), own);
            path.complete(matrix.layout, i, tokens);
        }
    }

    void multiply() {
        const int64_t pieces = (matrix.tiles() + path.tiles - 1) / path.tiles, chunk = std::max<int64_t>(1, pieces / (threads * 8));
        const int64_t chunks = (pieces + chunk - 1) / chunk, groups = (tokens.count + TOKENS - 1) / TOKENS;
        for (int64_t i; (i = multiplied++) < groups * chunks;) {
            const int64_t first = i / chunks * TOKENS, last = std::min<int64_t>(first + TOKENS, tokens.count);
            const int64_t piece = i % chunks * chunk, end = std::min(piece + chunk, pieces);
            for (int64_t p = piece; p < end; ++p) path.multiply(matrix, row_scales, tokens, p * path.tiles, first, last, target);
        }
    }

    static void work(void* argument) {
        Job& job = *static_cast<Job*>(argument);
        job.encode();
        if (job.threads > 1) job.openmp.barrier();
        job.multiply();
    }
};

}  // namespace
}  // namespace int8

extern "C" {

int64_t qurl_int8_bytes(const int8::Layout* layout, int64_t rows, int64_t columns) {
    return int8::Matrix{*layout, nullptr, rows, columns}.bytes();
}

// codes, signs, lowest: see Wire.
void qurl_int8_pack(const int8::Layout* layout, const OpenMp* openmp, int64_t rows, int64_t columns, uint8_t* packed,
                    const uint8_t* codes, const uint8_t* signs, const uint8_t* lowest) {
    const int8::Matrix matrix{*layout, packed, rows, columns};
    const int8::Wire wire{codes, signs, lowest};
    int8::for_each(*openmp, matrix.tiles(), [&](int64_t tile) { int8::pack_tile(matrix, tile, packed, wire); });
}

void qurl_int8_unpack(const int8::Layout* layout, const OpenMp* openmp, int64_t rows, int64_t columns, const uint8_t* packed,
                      int8_t* codes) {
    const int8::Matrix matrix{*layout, packed, rows, columns};
    int8::for_each(*openmp, matrix.tiles(), [&](int64_t tile) { int8::unpack_tile(matrix, tile, codes); });
}

// x: float32 or bfloat16 [count, columns]. codes: int8 [count, columns]. scales: float32 [count].
void qurl_int8_encode(int path, const void* x, int is_bfloat16, int64_t count, int64_t columns, int8_t* codes, float* scales) {
    std::unique_ptr<float[]> values(new float[columns]);
    for (int64_t i = 0; i < count; ++i)
        scales[i] = int8::PATHS[path].encode({x, is_bfloat16 != 0}, i, columns, values.get(), codes + i * columns);
}

// x: float32 or bfloat16 [count, columns], or null, and codes: int8 [count, columns] with scales: float32 [count]. row_scales:
// float32 [rows]. bias: null or [rows]. out: [count, rows].
void qurl_int8_linear(const int8::Layout* layout, int path, const OpenMp* openmp, const void* x, int is_bfloat16, const int8_t* codes,
                      const float* scales, int64_t count, const uint8_t* packed, const float* row_scales, int64_t rows,
                      int64_t columns, const void* bias, int is_bias_bfloat16, void* out, int is_out_bfloat16) {
    const int8::Matrix matrix{*layout, packed, rows, columns};
    const int64_t padded = matrix.arrays() * int8::WIDTH;
    const auto own = int8::zeros<int8_t>(count * padded);
    const auto wide = int8::zeros<int16_t>(layout->is_whole() ? count * padded : 0);
    const auto offsets = int8::zeros<int16_t>(layout->is_whole() ? 0 : count * matrix.groups() * 2);
    const auto sums = int8::zeros<int32_t>(count);
    std::unique_ptr<float[]> own_scales(new float[count]);
    if (scales) std::copy_n(scales, count, own_scales.get());
    int8::Tokens tokens{count, padded, own.get(), wide.get(), offsets.get(), sums.get(), own_scales.get()};
    const Source source{x, is_bfloat16 != 0};
    const Target target{out, is_out_bfloat16 != 0, bias, is_bias_bfloat16 != 0};
    int8::Job job{int8::PATHS[path], *openmp, source, codes, matrix, row_scales, tokens, target, num_threads(*openmp)};
    fork(*openmp, job.threads, int8::Job::work, &job);
}

}
