// The inner loops of selection, compaction and reading low bits on a CPU. C++17 with the vector types of GCC and Clang; every
// function has a torch equivalent that is used where this file could not be compiled. Pointers are to contiguous rows; strides
// are in elements unless said otherwise.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "bfloat16.h"

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

constexpr int64_t BATCH = 64;  // tokens whose roots and divisions are done together

// Temporal redundancy of one head; see millpond.policies.infinipot_v.
template <typename T>
void redundancy(const T* keys, const int16_t* place, const uint8_t* recent, int64_t tokens, int64_t width, float floor,
                float* table, int64_t span, float* out) {
    int64_t rows = 0, cols = 0;  // the grid that holds every place of the recent frames
    for (int64_t n = 0; n < tokens; ++n) {
        out[n] = recent[n] || place[2 * n] < 0 ? -std::numeric_limits<float>::infinity() : 0.0f;
        if (recent[n] && place[2 * n] >= 0) {
            rows = std::max<int64_t>(rows, place[2 * n] + 1);
            cols = std::max<int64_t>(cols, place[2 * n + 1] + 1);
        }
    }
    // The table has one mean unit key for each of `span` places; frames of several sizes may take more than one round.
    float* seen = table + span * width;
    for (int64_t base = 0; base < rows * cols; base += span) {
        std::fill(table, table + span * (width + 1), 0.0f);
        for (int64_t n = 0; n < tokens; ++n) {
            const int64_t at = place[2 * n] * cols + place[2 * n + 1] - base;
            if (!recent[n] || place[2 * n] < 0 || at < 0 || at >= span) continue;
            const T* key = keys + n * width;
            add_scaled(key, 1.0f / (std::sqrt(square_of(key, width)) + floor), width, table + at * width);
            seen[at] += 1.0f;
        }
        for (int64_t at = 0; at < span; ++at)
            if (seen[at] > 1.0f)
                for (int64_t i = 0; i < width; ++i) table[at * width + i] /= seen[at];
        float dots[BATCH], squares[BATCH];
        int64_t which[BATCH], filled = 0;
        for (int64_t n = 0; n <= tokens; ++n) {
            if (filled == BATCH || (n == tokens && filled)) {
                for (int64_t i = 0; i < filled; ++i) dots[i] /= -(std::sqrt(squares[i]) + floor);
                for (int64_t i = 0; i < filled; ++i) out[which[i]] = dots[i];
                filled = 0;
            }
            if (n == tokens) break;
            const int64_t row = place[2 * n], col = place[2 * n + 1], at = row * cols + col - base;
            if (recent[n] || row < 0 || row >= rows || col >= cols || at < 0 || at >= span || seen[at] == 0) continue;
            fetch(keys + (n + AHEAD) * width, width);
            dot_and_square(keys + n * width, table + at * width, width, dots[filled], squares[filled]);
            which[filled++] = n;
        }
    }
}

// Minus the cosine of each key with the mean unit key; see millpond.policies.keydiff.
template <typename T>
void distinctiveness(const T* keys, int64_t tokens, int64_t width, float* out) {
    std::vector<float> common(static_cast<size_t>(width), 0.0f);  // in the order of `load`
    norms(keys, 0, 1, tokens, width, out);
    for (int64_t n = 0; n < tokens; ++n) {
        fetch(keys + (n + AHEAD) * width, width);
        add_scaled(keys + n * width, 1.0f / std::max(out[n], 1e-12f), width, common.data());
    }
    const float length = std::max(std::sqrt(square_of(common.data(), width)), 1e-12f);
    for (int64_t n = 0; n < tokens; ++n) {
        float dot, square;
        fetch(keys + (n + AHEAD) * width, width);
        dot_and_square(keys + n * width, common.data(), width, dot, square);
        out[n] = -dot / (std::max(out[n], 1e-12f) * length);
    }
}

// Sums over windows of kernel x kernel cells. `grid` and `half` are [rows + 2 reach, cols + 2 reach] with a border of
// zeros, so that both steps are plain sums of shifted rows; `sums` is [rows, cols + 2 reach].
void window_sums(const float* grid, float* half, float* sums, int64_t rows, int64_t cols, int64_t kernel) {
    const int64_t reach = kernel / 2, wide = cols + 2 * reach, cells = rows * wide;
    std::fill(half, half + cells + 2 * reach * wide, 0.0f);
    std::fill(sums, sums + cells, 0.0f);
    float* __restrict__ across = half + reach * wide;
    for (int64_t shift = 0; shift < kernel; ++shift) {
        const float* __restrict__ from = grid + reach * wide + shift;
        // The last cells of a row run into the next one; nobody reads them.
        for (int64_t i = 0; i + 2 * reach < cells; ++i) across[i] += from[i];
    }
    for (int64_t shift = 0; shift < kernel; ++shift) {
        const float* __restrict__ from = half + shift * wide;
        float* __restrict__ to = sums;
        for (int64_t i = 0; i < cells; ++i) to[i] += from[i];
    }
}

// Whole numbers in the order of the floats.
inline uint32_t ordered(float score) {
    score += 0.0f;  // -0 and 0 are equal
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `slots`-th largest of `tokens` numbers, eleven bits at a time; `above` becomes how many are larger. After each step
// only the numbers of one bin are left, in `rest` [tokens].
uint32_t nth_largest(const uint32_t* numbers, int64_t tokens, int64_t slots, uint32_t* rest, int64_t& above) {
    uint32_t found = 0;
    above = 0;
    for (const int shift : {21, 10, 0}) {
        const uint32_t bins = shift ? 2048 : 1024;
        int32_t counts[2048] = {};
        for (int64_t n = 0; n < tokens; ++n) ++counts[numbers[n] >> shift & (bins - 1)];
        uint32_t bin = bins - 1;
        while (above + counts[bin] < slots) above += counts[bin--];
        found |= bin << shift;
        int64_t left = 0;
        for (int64_t n = 0; n < tokens; ++n) {
            rest[left] = numbers[n];
            left += (numbers[n] >> shift & (bins - 1)) == bin;
        }
        numbers = rest;
        tokens = left;
    }
    return found;
}

}  // namespace

extern "C" {

// Euclidean norms of [heads, tokens] rows, out float32 [heads, tokens].
void millpond_norms_f32(const float* rows, int64_t head_stride, int64_t heads, int64_t tokens, int64_t width, float* out) {
    norms(rows, head_stride, heads, tokens, width, out);
}
void millpond_norms_bf16(const uint16_t* rows, int64_t head_stride, int64_t heads, int64_t tokens, int64_t width,
                         float* out) {
    norms(rows, head_stride, heads, tokens, width, out);
}

// Temporal redundancy of one head's tokens, float32 [tokens]: `place` is int16 [tokens, 2], `recent` marks the latest frames,
// `table` is float32 [span, width + 1] to work in.
void millpond_redundancy_f32(const float* keys, const int16_t* place, const uint8_t* recent, int64_t tokens, int64_t width,
                             float floor, float* table, int64_t span, float* out) {
    redundancy(keys, place, recent, tokens, width, floor, table, span, out);
}
void millpond_redundancy_bf16(const uint16_t* keys, const int16_t* place, const uint8_t* recent, int64_t tokens,
                              int64_t width, float floor, float* table, int64_t span, float* out) {
    redundancy(keys, place, recent, tokens, width, floor, table, span, out);
}

// Minus the cosine of one head's keys [tokens, width] with their mean unit key: out float32 [tokens].
void millpond_distinctiveness_f32(const float* keys, int64_t tokens, int64_t width, float* out) {
    distinctiveness(keys, tokens, width, out);
}
void millpond_distinctiveness_bf16(const uint16_t* keys, int64_t tokens, int64_t width, float* out) {
    distinctiveness(keys, tokens, width, out);
}

// One head: replace each placed token's value by the mean over the existing tokens of its frame in a kernel x kernel window.
void millpond_pool(float* values, const int64_t* time_us, const int16_t* place, int64_t tokens, int64_t kernel) {
    const int64_t reach = kernel / 2;
    std::vector<float> grid, half, sums, counts;
    int64_t counted_rows = 0, counted_cols = 0;  // the complete grid that `counts` stands for
    for (int64_t first = 0; first < tokens;) {
        int64_t last = first, rows = 0, cols = 0, placed = 0;
        for (; last < tokens && time_us[last] == time_us[first]; ++last) {
            rows = std::max<int64_t>(rows, place[2 * last] + 1);
            cols = std::max<int64_t>(cols, place[2 * last + 1] + 1);
            placed += place[2 * last] >= 0;
        }
        const int64_t wide = cols + 2 * reach, high = rows + 2 * reach;
        if (placed * placed < rows * cols) {  // few are left of this frame: look at each pair
            sums.assign(static_cast<size_t>(last - first), 0.0f);
            for (int64_t n = first; n < last; ++n) {
                int64_t near = 0;
                for (int64_t m = first; m < last; ++m)
                    if (place[2 * m] >= 0 && std::abs(place[2 * m] - place[2 * n]) <= reach &&
                        std::abs(place[2 * m + 1] - place[2 * n + 1]) <= reach) {
                        sums[n - first] += values[m];
                        ++near;
                    }
                if (near) sums[n - first] /= static_cast<float>(near);
            }
            for (int64_t n = first; n < last; ++n)
                if (place[2 * n] >= 0) values[n] = sums[n - first];
        } else if (placed) {
            const bool complete = placed == rows * cols;
            half.resize(static_cast<size_t>(high * wide));
            for (int pass = 0; pass < 2; ++pass) {  // the values, then the count of tokens that exist
                if (pass && complete && rows == counted_rows && cols == counted_cols) break;
                grid.assign(static_cast<size_t>(high * wide), 0.0f);
                for (int64_t n = first; n < last; ++n)
                    if (place[2 * n] >= 0)
                        grid[(place[2 * n] + reach) * wide + place[2 * n + 1] + reach] = pass ? 1.0f : values[n];
                std::vector<float>& into = pass ? counts : sums;
                into.resize(static_cast<size_t>(rows * wide));
                window_sums(grid.data(), half.data(), into.data(), rows, cols, kernel);
                if (pass) {
                    counted_rows = complete ? rows : 0;
                    counted_cols = complete ? cols : 0;
                }
            }
            for (int64_t n = first; n < last; ++n)
                if (place[2 * n] >= 0) {
                    const int64_t at = place[2 * n] * wide + place[2 * n + 1];
                    values[n] = sums[at] / counts[at];
                }
        }
        first = last;
    }
}

// The `slots` best of `tokens` scores in each head, ascending by index; equal scores go to the older token.
// `work` is uint32 [2 tokens].
void millpond_best(const float* scores, int64_t heads, int64_t tokens, int64_t slots, uint32_t* work, int64_t* keep) {
    for (int64_t h = 0; h < heads; ++h) {
        for (int64_t n = 0; n < tokens; ++n) work[n] = ordered(scores[h * tokens + n]);
        int64_t above;
        const uint32_t least = nth_largest(work, tokens, slots, work + tokens, above);
        int64_t ties = slots - above, kept = 0;
        int64_t* row = keep + h * slots;
        for (int64_t n = 0; n < tokens && kept < slots; ++n) {
            const bool tie = work[n] == least;
            row[kept] = n;
            kept += work[n] > least || (tie && ties > 0);
            ties -= tie;
        }
    }
}

// Whether `keep` is a selection that a pond can carry out: 0 yes, 1 not ascending or out of range, 2 a protected token dropped.
int64_t millpond_check(const int64_t* keep, const uint8_t* protected_, int64_t heads, int64_t tokens, int64_t slots) {
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t* row = keep + h * slots;
        const uint8_t* must = protected_ + h * tokens;
        int64_t kept = 0, wanted = 0;
        for (int64_t j = 0; j < slots; ++j) {
            if (row[j] < 0 || row[j] >= tokens || (j && row[j] <= row[j - 1])) return 1;
            kept += must[row[j]];
        }
        for (int64_t n = 0; n < tokens; ++n) wanted += must[n];
        if (kept != wanted) return 2;
    }
    return 0;
}

// Move the kept rows of each head down in place; `keep` ascends, so nothing is overwritten before it has moved.
// `head_bytes` is the distance between heads, `row_bytes` the size of a row. `done` counts the heads that have moved; those are left out.
void millpond_move_rows(char* base, int64_t head_bytes, int64_t row_bytes, const int64_t* keep, int64_t heads,
                        int64_t slots, int64_t* done) {
    for (int64_t h = *done; h < heads; *done = ++h) {
        char* head = base + h * head_bytes;
        const int64_t* from = keep + h * slots;
        for (int64_t first = 0; first < slots;) {
            int64_t last = first + 1;
            while (last < slots && from[last] == from[last - 1] + 1) ++last;
            if (from[first] != first) std::memmove(head + first * row_bytes, head + from[first] * row_bytes,
                                                    static_cast<size_t>((last - first) * row_bytes));
            first = last;
        }
    }
}
}
