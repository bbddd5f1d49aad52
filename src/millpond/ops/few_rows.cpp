// A matrix times a few vectors, which reads the matrix once, about as fast as it comes; few_rows.py beside this has the same in torch.
// C++17 with the vector types of GCC and Clang.
//
// Eight vectors at a time meet a block of rows piece by piece: a piece of all of them stays in the nearest cache, while partial sums wait.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float Wide __attribute__((vector_size(64)));
constexpr int64_t LANES = 16, PAIR = 2, MOST = 8, PIECE = 512, BLOCK = 64;

inline float total(Wide sums) {
    float parts[LANES];
    std::memcpy(parts, &sums, sizeof parts);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
}

// Adds to the partial sums [PAIR, COUNT] of two rows of the matrix and COUNT vectors [COUNT, PIECE] what `width` numbers of each give.
template <int64_t COUNT>
void pair(const float* matrix, int64_t columns, const float* x, int64_t width, Wide* partial) {
    Wide sums[PAIR * COUNT];
    std::memcpy(sums, partial, sizeof sums);
    for (int64_t i = 0; i < width; i += LANES) {
        Wide one, other, v;
        std::memcpy(&one, matrix + i, sizeof one);
        std::memcpy(&other, matrix + columns + i, sizeof other);
        __builtin_prefetch(matrix + PAIR * columns + i);
        __builtin_prefetch(matrix + (PAIR + 1) * columns + i);
        for (int64_t m = 0; m < COUNT; ++m) {
            std::memcpy(&v, x + m * PIECE + i, sizeof v);
            sums[m] += one * v;
            sums[COUNT + m] += other * v;
        }
    }
    std::memcpy(partial, sums, sizeof sums);
}

template <int64_t COUNT>
void product(const float* x, const float* matrix, int64_t rows, int64_t columns, int64_t first, int64_t last, float* out) {
    const int64_t whole = columns / LANES * LANES, pieces = (columns + PIECE - 1) / PIECE;
    std::vector<float> packed(static_cast<size_t>(pieces * COUNT * PIECE));  // [pieces, COUNT, PIECE]
    for (int64_t m = 0; m < COUNT; ++m)
        for (int64_t k = 0; k < columns; k += PIECE)
            std::memcpy(packed.data() + (k * COUNT + m * PIECE), x + m * columns + k,
                        static_cast<size_t>(std::min(PIECE, columns - k)) * sizeof *x);
    for (int64_t block = first; block < last; block += BLOCK) {
        const int64_t end = std::min(block + BLOCK, last);
        Wide partial[BLOCK * COUNT] = {};
        for (int64_t k = 0; k < whole; k += PIECE)
            for (int64_t n = block; n < end; n += PAIR)
                pair<COUNT>(matrix + n * columns + k, columns, packed.data() + k * COUNT, std::min(PIECE, whole - k),
                            partial + (n - block) * COUNT);
        for (int64_t n = block; n < end; ++n)
            for (int64_t m = 0; m < COUNT; ++m) {
                const int64_t p = (n - block) % PAIR, at = (n - block - p) * COUNT + p * COUNT + m;
                float sum = total(partial[at]);
                for (int64_t k = whole; k < columns; ++k) sum += matrix[n * columns + k] * x[m * columns + k];
                out[m * rows + n] = sum;
            }
    }
}

typedef void (*Product)(const float*, const float*, int64_t, int64_t, int64_t, int64_t, float*);
constexpr Product PRODUCTS[MOST] = {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>, product<7>, product<8>};

}  // namespace

extern "C" {

// x: [count, columns]. matrix: [rows, columns], of which rows `first` to `last` are taken; both are even. out: [count, rows], written there.
void millpond_few_rows(const float* x, int64_t count, const float* matrix, int64_t rows, int64_t columns, int64_t first, int64_t last,
                       float* out) {
    for (int64_t m = 0; m < count; m += MOST)
        PRODUCTS[std::min(MOST, count - m) - 1](x + m * columns, matrix, rows, columns, first, last, out + m * rows);
}
}
