// The whole selection of infinipot-v in one layer: redundancy, value norms, pooling and both rankings in one call, because at a small
// model's shapes a call costs more than its loops; infinipot_v.py beside this has the same in torch. C++17; pointers are to contiguous
// rows, strides are in elements.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "ranking.h"
#include "rows.h"

namespace {

constexpr int64_t BATCH = 64;  // tokens whose roots and divisions are done together

// Temporal redundancy of one head.
template <typename T>
void redundancy(const T* keys, const int16_t* grid_position, const uint8_t* recent, int64_t tokens, int64_t width, float floor,
                float* table, int64_t span, float* out) {
    int64_t rows = 0, cols = 0;  // the grid that holds every grid position of the recent frames
    for (int64_t n = 0; n < tokens; ++n) {
        out[n] = recent[n] || grid_position[2 * n] < 0 ? -std::numeric_limits<float>::infinity() : 0.0f;
        if (recent[n] && grid_position[2 * n] >= 0) {
            rows = std::max<int64_t>(rows, grid_position[2 * n] + 1);
            cols = std::max<int64_t>(cols, grid_position[2 * n + 1] + 1);
        }
    }
    // The table has one mean unit key for each of `span` grid positions; frames of several sizes may take more than one round.
    float* seen = table + span * width;
    for (int64_t base = 0; base < rows * cols; base += span) {
        std::fill(table, table + span * (width + 1), 0.0f);
        for (int64_t n = 0; n < tokens; ++n) {
            const int64_t at = grid_position[2 * n] * cols + grid_position[2 * n + 1] - base;
            if (!recent[n] || grid_position[2 * n] < 0 || at < 0 || at >= span) continue;
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
            const int64_t row = grid_position[2 * n], col = grid_position[2 * n + 1], at = row * cols + col - base;
            if (recent[n] || row < 0 || row >= rows || col >= cols || at < 0 || at >= span || seen[at] == 0) continue;
            fetch(keys + (n + AHEAD) * width, width);
            dot_and_square(keys + n * width, table + at * width, width, dots[filled], squares[filled]);
            which[filled++] = n;
        }
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

// One head: replace the value of each token on the grid by the mean over the existing tokens of its frame in a kernel x kernel window.
void pool(float* values, const int64_t* time_us, const int16_t* grid_position, int64_t tokens, int64_t kernel) {
    const int64_t reach = kernel / 2;
    std::vector<float> grid, half, sums, counts;
    int64_t counted_rows = 0, counted_cols = 0;  // the complete grid that `counts` stands for
    for (int64_t first = 0; first < tokens;) {
        int64_t last = first, rows = 0, cols = 0, placed = 0;
        for (; last < tokens && time_us[last] == time_us[first]; ++last) {
            rows = std::max<int64_t>(rows, grid_position[2 * last] + 1);
            cols = std::max<int64_t>(cols, grid_position[2 * last + 1] + 1);
            placed += grid_position[2 * last] >= 0;
        }
        const int64_t wide = cols + 2 * reach, high = rows + 2 * reach;
        if (placed * placed < rows * cols) {  // few are left of this frame: look at each pair
            sums.assign(static_cast<size_t>(last - first), 0.0f);
            for (int64_t n = first; n < last; ++n) {
                int64_t near = 0;
                for (int64_t m = first; m < last; ++m)
                    if (grid_position[2 * m] >= 0 && std::abs(grid_position[2 * m] - grid_position[2 * n]) <= reach &&
                        std::abs(grid_position[2 * m + 1] - grid_position[2 * n + 1]) <= reach) {
                        sums[n - first] += values[m];
                        ++near;
                    }
                if (near) sums[n - first] /= static_cast<float>(near);
            }
            for (int64_t n = first; n < last; ++n)
                if (grid_position[2 * n] >= 0) values[n] = sums[n - first];
        } else if (placed) {
            const bool complete = placed == rows * cols;
            half.resize(static_cast<size_t>(high * wide));
            for (int pass = 0; pass < 2; ++pass) {  // the values, then the count of tokens that exist
                if (pass && complete && rows == counted_rows && cols == counted_cols) break;
                grid.assign(static_cast<size_t>(high * wide), 0.0f);
                for (int64_t n = first; n < last; ++n)
                    if (grid_position[2 * n] >= 0)
                        grid[(grid_position[2 * n] + reach) * wide + grid_position[2 * n + 1] + reach] = pass ? 1.0f : values[n];
                std::vector<float>& into = pass ? counts : sums;
                into.resize(static_cast<size_t>(rows * wide));
                window_sums(grid.data(), half.data(), into.data(), rows, cols, kernel);
                if (pass) {
                    counted_rows = complete ? rows : 0;
                    counted_cols = complete ? cols : 0;
                }
            }
            for (int64_t n = first; n < last; ++n)
                if (grid_position[2 * n] >= 0) {
                    const int64_t at = grid_position[2 * n] * wide + grid_position[2 * n + 1];
                    values[n] = sums[at] / counts[at];
                }
        }
        first = last;
    }
}

// Scores as a ranking takes them: what is not a number is the least, an infinite score the largest number, a marked token above that.
void rank(float* scores, const uint8_t* marked, int64_t tokens) {
    constexpr float infinite = std::numeric_limits<float>::infinity();
    for (int64_t n = 0; n < tokens; ++n) {
        const float score = scores[n];
        scores[n] = marked[n] ? infinite : std::isnan(score) ? -infinite : std::min(score, std::numeric_limits<float>::max());
    }
}

// The pooling kernel of a layer by the coefficient of variation of its value norms.
int64_t kernel_of(const float* norms, int64_t count, const float* thresholds) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; ++i) {
        sum += norms[i];
        squares += static_cast<double>(norms[i]) * norms[i];
    }
    const double mean = sum / static_cast<double>(count), variance = squares / static_cast<double>(count) - mean * mean;
    const double cv = std::sqrt(variance > 0 ? variance : 0.0) / (mean < 1e-12 ? 1e-12 : mean);
    for (int64_t i = 0; i < 3; ++i)
        if (cv < thresholds[i]) return 7 - 2 * i;
    return 1;
}

// A layer as `View` has it: the distance between heads of each tensor, in elements.
struct Sizes {
    int64_t heads, tokens, width, key_stride, value_stride, time_stride, grid_stride;
};

// The selection of infinipot-v in one layer.
template <typename T>
void infinipot_v(const T* keys, const T* values, const int64_t* time_us, const int16_t* grid_position, const uint8_t* recent,
                 const Sizes& size, int64_t by_redundancy, int64_t slots, int64_t kernel, const float* thresholds, float floor,
                 int64_t span, float* scores, float* table, uint32_t* work, uint8_t* marked, int64_t* keep) {
    const int64_t tokens = size.tokens;
    int64_t protected_ = 0;
    for (int64_t n = 0; n < tokens; ++n) protected_ += recent[n];
    std::memcpy(marked, recent, static_cast<size_t>(size.heads * tokens));
    for (int64_t h = 0; by_redundancy > protected_ && h < size.heads; ++h) {
        uint8_t* mark = marked + h * tokens;
        redundancy(keys + h * size.key_stride, grid_position + h * size.grid_stride, mark, tokens, size.width, floor, table, span, scores);
        rank(scores, mark, tokens);
        int64_t* chosen = keep + h * slots;
        best(scores, tokens, by_redundancy, work, chosen);
        // A head with too few tokens on the grid was filled up with text, which does not compete here.
        for (int64_t j = 0; j < by_redundancy; ++j)
            if (scores[chosen[j]] > -std::numeric_limits<float>::infinity()) mark[chosen[j]] = 1;
    }
    norms(values, size.value_stride, size.heads, tokens, size.width, scores);
    if (kernel == 0) kernel = kernel_of(scores, size.heads * tokens, thresholds);
    for (int64_t h = 0; h < size.heads; ++h) {
        float* row = scores + h * tokens;
        if (kernel > 1) pool(row, time_us + h * size.time_stride, grid_position + h * size.grid_stride, tokens, kernel);
        rank(row, marked + h * tokens, tokens);
        best(row, tokens, slots, work, keep + h * slots);
    }
}

}  // namespace

extern "C" {

// The tokens that infinipot-v keeps of a layer, int64 [heads, slots]: `recent` marks the latest frames, `kernel` is 0 where the value norms
// choose it by `thresholds` [3]. To work in: `scores` float32 [heads, tokens], `table` float32 [span, width + 1], `work` uint32 [2 tokens],
// `marked` [heads, tokens].
void millpond_infinipot_v_f32(const float* keys, const float* values, const int64_t* time_us, const int16_t* grid_position,
                              const uint8_t* recent, int64_t heads, int64_t tokens, int64_t width, int64_t key_stride,
                              int64_t value_stride, int64_t time_stride, int64_t grid_stride, int64_t by_redundancy, int64_t slots,
                              int64_t kernel, const float* thresholds, float floor, int64_t span, float* scores, float* table,
                              uint32_t* work, uint8_t* marked, int64_t* keep) {
    const Sizes size{heads, tokens, width, key_stride, value_stride, time_stride, grid_stride};
    infinipot_v(keys, values, time_us, grid_position, recent, size, by_redundancy, slots, kernel, thresholds, floor, span, scores, table,
                work, marked, keep);
}
void millpond_infinipot_v_bf16(const uint16_t* keys, const uint16_t* values, const int64_t* time_us, const int16_t* grid_position,
                              const uint8_t* recent, int64_t heads, int64_t tokens, int64_t width, int64_t key_stride,
                              int64_t value_stride, int64_t time_stride, int64_t grid_stride, int64_t by_redundancy, int64_t slots,
                              int64_t kernel, const float* thresholds, float floor, int64_t span, float* scores, float* table,
                              uint32_t* work, uint8_t* marked, int64_t* keep) {
    const Sizes size{heads, tokens, width, key_stride, value_stride, time_stride, grid_stride};
    infinipot_v(keys, values, time_us, grid_position, recent, size, by_redundancy, slots, kernel, thresholds, floor, span, scores, table,
                work, marked, keep);
}
}
