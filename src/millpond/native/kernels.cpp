// The inner loops of selection and compaction on a CPU. Plain C++17; every function has a torch equivalent that is used
// where this file could not be compiled. Pointers are to contiguous rows; strides are in elements unless said otherwise.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace {

inline float widen(float x) { return x; }
inline float widen(uint16_t bits) {  // bfloat16
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

// Plain sums: the compiler may reorder them, and so spreads them over vector registers.
template <typename T>
inline float norm_of(const T* row, int64_t width) {
    float squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += widen(row[i]) * widen(row[i]);
    return std::sqrt(squares);
}

template <typename T>
inline float cosine_to(const T* row, const float* unit, int64_t width, float floor) {
    float sum = 0, squares = 0;
    for (int64_t i = 0; i < width; ++i) {
        const float x = widen(row[i]);
        sum += x * unit[i];
        squares += x * x;
    }
    return sum / (std::sqrt(squares) + floor);
}

template <typename T>
void norms(const T* rows, int64_t head_stride, int64_t heads, int64_t tokens, int64_t width, float* out) {
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t n = 0; n < tokens; ++n) out[h * tokens + n] = norm_of(rows + h * head_stride + n * width, width);
}

// Temporal redundancy of one head; see millpond.policies.infinipot_v.
template <typename T>
void redundancy(const T* keys, const int16_t* place, const uint8_t* recent, int64_t tokens, int64_t width, float floor,
                float* out) {
    // The grid of the recent frames: the table has one mean unit key for each of its places.
    int64_t rows = 0, cols = 0;
    for (int64_t n = 0; n < tokens; ++n)
        if (recent[n] && place[2 * n] >= 0) {
            rows = std::max<int64_t>(rows, place[2 * n] + 1);
            cols = std::max<int64_t>(cols, place[2 * n + 1] + 1);
        }
    std::vector<float> table(static_cast<size_t>(rows * cols * width), 0.0f), seen(static_cast<size_t>(rows * cols), 0.0f);
    for (int64_t n = 0; n < tokens; ++n)
        if (recent[n] && place[2 * n] >= 0) {
            const int64_t at = place[2 * n] * cols + place[2 * n + 1];
            const T* key = keys + n * width;
            const float scale = 1.0f / (norm_of(key, width) + floor);
            float* mean = table.data() + at * width;
            for (int64_t i = 0; i < width; ++i) mean[i] += widen(key[i]) * scale;
            seen[at] += 1.0f;
        }
    for (int64_t at = 0; at < rows * cols; ++at)
        for (int64_t i = 0; i < width; ++i) table[at * width + i] /= std::max(seen[at], 1.0f);
    for (int64_t n = 0; n < tokens; ++n) {
        const int64_t row = place[2 * n], col = place[2 * n + 1];
        if (recent[n] || row < 0) {
            out[n] = -std::numeric_limits<float>::infinity();
        } else if (row >= rows || col >= cols || seen[row * cols + col] == 0) {
            out[n] = 0.0f;
        } else {
            out[n] = -cosine_to(keys + n * width, table.data() + (row * cols + col) * width, width, floor);
        }
    }
}

// Sums over windows of `kernel` cells along one axis of a [lines, length] grid with the given strides.
void window_sums(const float* in, float* out, int64_t lines, int64_t line_step, int64_t length, int64_t step, int64_t kernel) {
    const int64_t reach = kernel / 2;
    for (int64_t line = 0; line < lines; ++line)
        for (int64_t at = 0; at < length; ++at) {
            float sum = 0;
            const int64_t last = std::min(length - 1, at + reach);
            for (int64_t i = std::max<int64_t>(0, at - reach); i <= last; ++i) sum += in[line * line_step + i * step];
            out[line * line_step + at * step] = sum;
        }
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

// Temporal redundancy of one head's tokens, float32 [tokens]: `place` is int16 [tokens, 2], `recent` marks the latest frames.
void millpond_redundancy_f32(const float* keys, const int16_t* place, const uint8_t* recent, int64_t tokens, int64_t width,
                             float floor, float* out) {
    redundancy(keys, place, recent, tokens, width, floor, out);
}
void millpond_redundancy_bf16(const uint16_t* keys, const int16_t* place, const uint8_t* recent, int64_t tokens,
                              int64_t width, float floor, float* out) {
    redundancy(keys, place, recent, tokens, width, floor, out);
}

// One head: replace each placed token's value by the mean over the existing tokens of its frame in a kernel x kernel window.
void millpond_pool(float* values, const int64_t* time_us, const int16_t* place, int64_t tokens, int64_t kernel) {
    std::vector<float> grid, half, sums, counts;
    int64_t counted_rows = 0, counted_cols = 0;  // the complete grid that `counts` stands for
    for (int64_t first = 0; first < tokens;) {
        int64_t last = first, rows = 0, cols = 0, placed = 0;
        for (; last < tokens && time_us[last] == time_us[first]; ++last) {
            rows = std::max<int64_t>(rows, place[2 * last] + 1);
            cols = std::max<int64_t>(cols, place[2 * last + 1] + 1);
            placed += place[2 * last] >= 0;
        }
        const int64_t cells = placed ? rows * cols : 0;
        const bool complete = placed == cells;
        for (int pass = 0; pass < 2 && cells; ++pass) {  // the values, then the count of tokens that exist
            if (pass && complete && rows == counted_rows && cols == counted_cols) break;
            grid.assign(static_cast<size_t>(cells), 0.0f);
            half.resize(static_cast<size_t>(cells));
            std::vector<float>& total = pass ? counts : sums;
            total.resize(static_cast<size_t>(cells));
            for (int64_t n = first; n < last; ++n)
                if (place[2 * n] >= 0) grid[place[2 * n] * cols + place[2 * n + 1]] = pass ? 1.0f : values[n];
            window_sums(grid.data(), half.data(), rows, cols, cols, 1, kernel);
            window_sums(half.data(), total.data(), cols, 1, rows, cols, kernel);
            if (pass) {
                counted_rows = complete ? rows : 0;
                counted_cols = complete ? cols : 0;
            }
        }
        for (int64_t n = first; n < last; ++n)
            if (place[2 * n] >= 0) {
                const int64_t at = place[2 * n] * cols + place[2 * n + 1];
                values[n] = sums[at] / counts[at];
            }
        first = last;
    }
}

// The `slots` best of `tokens` scores in each head, ascending by index; equal scores go to the older token.
// `work` is float32 [tokens].
void millpond_best(const float* scores, int64_t heads, int64_t tokens, int64_t slots, float* work, int64_t* keep) {
    for (int64_t h = 0; h < heads; ++h) {
        const float* score = scores + h * tokens;
        std::copy(score, score + tokens, work);
        std::nth_element(work, work + slots - 1, work + tokens, std::greater<float>());
        const float least = work[slots - 1];
        int64_t above = 0;
        for (int64_t n = 0; n < tokens; ++n) above += score[n] > least;
        int64_t ties = slots - above, kept = 0;
        int64_t* row = keep + h * slots;
        for (int64_t n = 0; n < tokens && kept < slots; ++n)
            if (score[n] > least || (score[n] == least && ties-- > 0)) row[kept++] = n;
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
// `head_bytes` is the distance between heads, `row_bytes` the size of a row.
void millpond_move_rows(char* base, int64_t head_bytes, int64_t row_bytes, const int64_t* keep, int64_t heads,
                        int64_t slots) {
    for (int64_t h = 0; h < heads; ++h) {
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
