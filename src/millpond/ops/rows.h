// Sums over rows of floats or bfloat16, eight numbers at a time, with the vector types of GCC and Clang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));
constexpr int64_t LANES = 8;

// Sixteen numbers at a time, as two vectors: the lower and the upper eight of floats, the even and the odd of bfloat16, where
// a word holds two. Sums do not mind, and the table of mean keys is kept in the same order.
inline void load(const float* from, Floats& one, Floats& other) {
    std::memcpy(&one, from, sizeof one);
    std::memcpy(&other, from + LANES, sizeof other);
}
inline void load(const uint16_t* from, Floats& one, Floats& other) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    const Words even = pairs << 16, odd = pairs & 0xffff0000u;
    std::memcpy(&one, &even, sizeof one);
    std::memcpy(&other, &odd, sizeof other);
}

inline Quad folded(Floats sums) {
    Quad low, high;
    std::memcpy(&low, &sums, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&sums) + sizeof low, sizeof high);
    return low + high;
}
// Rows are read once, faster than the processor would fetch them by itself; past the end a fetch does nothing.
constexpr int64_t AHEAD = 8;
template <typename T>
inline void fetch(const T* row, int64_t width) {
    for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

inline float total(Floats sums) {
    const Quad quad = folded(sums);
    return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

template <typename T>
inline float square_of(const T* row, int64_t width) {
    Floats a = {}, b = {}, c = {}, d = {}, x, y;  // four sums, so that one addition need not wait for the one before
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) {
        load(row + i, x, y);
        a += x * x;
        b += y * y;
        load(row + i + 2 * LANES, x, y);
        c += x * x;
        d += y * y;
    }
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        load(row + i, x, y);
        a += x * x;
        b += y * y;
    }
    float rest = 0;
    for (; i < width; ++i) rest += widen(row[i]) * widen(row[i]);
    return total((a + b) + (c + d)) + rest;
}

// The dot product with `unit`, which is in the order of `load` (see `add_scaled`), and the row's own square.
template <typename T>
inline void dot_and_square(const T* row, const float* unit, int64_t width, float& dot, float& square) {
    Floats a = {}, b = {}, c = {}, d = {}, x, y, u, v;
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        load(row + i, x, y);
        load(unit + i, u, v);
        a += x * u;
        b += y * v;
        c += x * x;
        d += y * y;
    }
    dot = total(a + b);
    square = total(c + d);
    for (; i < width; ++i) {
        dot += widen(row[i]) * unit[i];
        square += widen(row[i]) * widen(row[i]);
    }
}

template <typename T>
inline void add_scaled(const T* row, float scale, int64_t width, float* sum) {
    Floats x, y, u, v;
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        load(row + i, x, y);
        load(sum + i, u, v);
        u += x * scale;
        v += y * scale;
        std::memcpy(sum + i, &u, sizeof u);
        std::memcpy(sum + i + LANES, &v, sizeof v);
    }
    for (; i < width; ++i) sum[i] += widen(row[i]) * scale;
}

template <typename T>
void norms(const T* rows, int64_t head_stride, int64_t heads, int64_t tokens, int64_t width, float* out) {
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t n = 0; n < tokens; ++n) {
            const T* row = rows + h * head_stride + n * width;
            fetch(row + AHEAD * width, width);
            out[h * tokens + n] = square_of(row, width);
        }
    // Roots in a pass of their own: many at a time instead of one waiting at the end of each row.
    for (int64_t i = 0; i < heads * tokens; ++i) out[i] = std::sqrt(out[i]);
}

}  // namespace
