// Attention probabilities of some queries over a memory, summed up per key without ever holding the matrix. C++17 with the
// vector types of GCC and Clang; attention.py beside this has the same in torch.
//
// Keys are taken sixteen at a time, widened and turned to [D, 16], so that four queries make their scores of all sixteen by
// plain products of vectors. A first pass over the keys gathers each query's log-sum-exp, a second one the probabilities.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "exponential.h"
#include "floats.h"

namespace {

constexpr int64_t LANES = 8, KEYS = 2 * LANES, QUERIES = 4;
struct Scores {
    Floats half[2];
};
constexpr float NONE = -std::numeric_limits<float>::infinity();

// Sixteen keys from `first` on as [D, 16]; what lies behind the last key is zero.
template <typename T>
void turn(const T* keys, int64_t count, int64_t first, int64_t width, float* tile) {
    const int64_t filled = std::min(KEYS, count - first);
    for (int64_t k = 0; k < filled; ++k)
        for (int64_t d = 0; d < width; ++d) tile[d * KEYS + k] = widen(keys[(first + k) * width + d]);
    for (int64_t k = filled; k < KEYS; ++k)
        for (int64_t d = 0; d < width; ++d) tile[d * KEYS + k] = 0;
}

// Scores of some queries [.., D], which are scaled already.
template <int64_t COUNT>
inline void score_some(const float* queries, int64_t width, const float* tile, Scores* scores) {
    Floats low[COUNT] = {}, high[COUNT] = {}, keys, more;
    for (int64_t d = 0; d < width; ++d) {
        std::memcpy(&keys, tile + d * KEYS, sizeof keys);
        std::memcpy(&more, tile + d * KEYS + LANES, sizeof more);
        for (int64_t r = 0; r < COUNT; ++r) {
            low[r] += keys * queries[r * width + d];
            high[r] += more * queries[r * width + d];
        }
    }
    for (int64_t r = 0; r < COUNT; ++r) scores[r] = {{low[r], high[r]}};
}

// Scores of `rows` queries on sixteen keys from `first` on; minus infinity for the keys behind the last one that a query sees.
void score(const float* queries, int64_t rows, int64_t width, const float* tile, int64_t first, const int64_t* last,
           int64_t end, Scores* scores) {
    int64_t r = 0;
    for (; r + QUERIES <= rows; r += QUERIES) score_some<QUERIES>(queries + r * width, width, tile, scores + r);
    for (; r < rows; ++r) score_some<1>(queries + r * width, width, tile, scores + r);
    for (r = 0; r < rows; ++r) {
        const int64_t sees = (last ? last[r] : end) - first;
        if (sees >= KEYS - 1) continue;
        const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
        const int32_t bound = static_cast<int32_t>(std::max<int64_t>(sees, -1));
        for (int32_t h = 0; h < 2; ++h)
            scores[r].half[h] = lanes + h * static_cast<int32_t>(LANES) > Ints{} + bound ? Floats{} + NONE : scores[r].half[h];
    }
}

inline float sum_of(Floats x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// A query's log-sum-exp so far: e^top times the sums, which are kept by lane.
struct Level {
    Floats sums = {};
    float top = NONE;
    void add(const Scores& scores) {
        const Floats larger = scores.half[0] > scores.half[1] ? scores.half[0] : scores.half[1];
        const Ints above = larger > Floats{} + top;
        int64_t any[4];
        std::memcpy(any, &above, sizeof any);
        if (any[0] | any[1] | any[2] | any[3]) {
            float most = larger[0];
            for (int64_t k = 1; k < LANES; ++k) most = std::max(most, larger[k]);
            sums = top == NONE ? Floats{} : sums * std::exp(top - most);
            top = most;
        }
        if (top != NONE) sums += exponential(scores.half[0] - top) + exponential(scores.half[1] - top);
    }
    float value() const { return top + std::log(sum_of(sums)); }
};

template <typename T>
void columns(const float* queries, int64_t rows, int64_t width, const T* prompt, int64_t prompt_count, const T* keys,
             int64_t count, const int64_t* last, int64_t counted, float* sums, float* variances, double* totals) {
    std::vector<float> tile(static_cast<size_t>(width * KEYS)), levels(static_cast<size_t>(rows));
    std::vector<Scores> scores(static_cast<size_t>(rows));
    {
        std::vector<Level> gathered(static_cast<size_t>(rows));
        for (int64_t first = 0; first < prompt_count; first += KEYS) {
            turn(prompt, prompt_count, first, width, tile.data());
            score(queries, rows, width, tile.data(), first, nullptr, prompt_count - 1, scores.data());
            for (int64_t r = 0; r < rows; ++r) gathered[r].add(scores[r]);
        }
        for (int64_t first = 0; first < count; first += KEYS) {
            turn(keys, count, first, width, tile.data());
            score(queries, rows, width, tile.data(), first, last, count - 1, scores.data());
            for (int64_t r = 0; r < rows; ++r) gathered[r].add(scores[r]);
        }
        for (int64_t r = 0; r < rows; ++r) levels[r] = gathered[r].value();
    }
    double entropy = 0, changing = 0;
    for (int64_t first = 0; first < counted; first += KEYS) {
        turn(keys, count, first, width, tile.data());
        score(queries, rows, width, tile.data(), first, last, count - 1, scores.data());
        for (int64_t h = 0; h < 2; ++h) {
            const int64_t from = first + h * LANES, filled = std::min(LANES, counted - from);
            Floats sum = {};
            for (int64_t r = 0; r < rows; ++r) {
                const Floats logs = scores[r].half[h] - levels[r], share = exponential(logs);
                sum += share;
                scores[r].half[h] = share;
                if (totals)
                    for (int64_t k = 0; k < filled; ++k)
                        if (share[k] > 0) entropy -= static_cast<double>(share[k]) * logs[k];
            }
            if (sums)
                for (int64_t k = 0; k < filled; ++k) sums[from + k] += sum[k];
            if (rows > 1 && (variances || totals)) {
                const Floats mean = sum / static_cast<float>(rows);
                Floats squares = {};
                for (int64_t r = 0; r < rows; ++r) squares += (scores[r].half[h] - mean) * (scores[r].half[h] - mean);
                squares /= static_cast<float>(rows - 1);
                for (int64_t k = 0; k < filled; ++k) {
                    if (variances) variances[from + k] += squares[k];
                    changing += squares[k];
                }
            }
        }
    }
    if (totals) {
        totals[0] += entropy;
        totals[1] += changing;
    }
}

}  // namespace

extern "C" {

// queries: float32 [rows, width], scaled. prompt, keys: [.., width]. last: [rows], the last key that each query sees, or null for
// all. Of the first `counted` keys: sums += the sum of the probabilities over the queries, variances += their unbiased variance over
// the queries (each [counted], or null), totals[0] += -sum p log p, totals[1] += the sum of the variances (or null).
void millpond_attention_columns_f32(const float* queries, int64_t rows, int64_t width, const float* prompt, int64_t prompt_count,
                          const float* keys, int64_t count, const int64_t* last, int64_t counted, float* sums,
                          float* variances, double* totals) {
    columns(queries, rows, width, prompt, prompt_count, keys, count, last, counted, sums, variances, totals);
}
void millpond_attention_columns_bf16(const float* queries, int64_t rows, int64_t width, const uint16_t* prompt, int64_t prompt_count,
                           const uint16_t* keys, int64_t count, const int64_t* last, int64_t counted, float* sums,
                           float* variances, double* totals) {
    columns(queries, rows, width, prompt, prompt_count, keys, count, last, counted, sums, variances, totals);
}
}
