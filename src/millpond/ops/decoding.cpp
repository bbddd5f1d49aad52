// One token each of several streams attends to its own stream's memory; decoding.py beside this has the same in torch. C++17 with the
// vector types of GCC and Clang.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "exponential.h"
#include "rows.h"

namespace {

constexpr int64_t PIECE = 128;  // tokens

// Scores of `count` keys with one query that is scaled already; returns the greatest.
float scores_of(const float* query, const float* keys, int64_t count, int64_t width, float* scores) {
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < count; ++k) {
        const float* row = keys + k * width;
        fetch(row + AHEAD * width, width);
        Floats a = {}, b = {}, x, y, u, v;
        int64_t i = 0;
        for (; i + 2 * LANES <= width; i += 2 * LANES) {
            load(row + i, x, y);
            load(query + i, u, v);
            a += x * u;
            b += y * v;
        }
        float dot = total(a + b);
        for (; i < width; ++i) dot += row[i] * query[i];
        scores[k] = dot;
        most = std::max(most, dot);
    }
    return most;
}

// Scores become weights that are not yet divided by their sum, which is returned.
float weights_of(float* scores, int64_t count, float most) {
    Floats sums = {};
    for (int64_t k = 0; k < count; k += LANES) {  // there is space for whole vectors; behind the last key nothing weighs
        Floats x;
        std::memcpy(&x, scores + k, sizeof x);
        x = exponential(x - most);
        std::memcpy(scores + k, &x, sizeof x);
        sums += x;
    }
    return total(sums);
}

}  // namespace

extern "C" {

// queries: [streams, heads * group, width]. keys, values: the new token's, [streams, heads, width]. layout: of each stream five numbers: where
// its keys and its values [heads, .., width] begin, how far the next head is in elements in each, and how many tokens it holds.
// out: as queries.
void millpond_attend_step(const float* queries, const float* keys, const float* values, int64_t streams, int64_t heads, int64_t group,
                          int64_t width, float scale, const int64_t* layout, float* out) {
    std::vector<float> scores, query(static_cast<size_t>(group * width)), most(static_cast<size_t>(group)), sum(most.size());
    for (int64_t s = 0; s < streams; ++s, layout += 5) {
        const int64_t count = layout[4] + 1, whole = (count + LANES - 1) / LANES * LANES;
        scores.assign(static_cast<size_t>(group * whole), -std::numeric_limits<float>::infinity());
        for (int64_t h = 0; h < heads; ++h) {
            float* const mine = reinterpret_cast<float*>(layout[0]) + h * layout[2];
            float* const theirs = reinterpret_cast<float*>(layout[1]) + h * layout[3];
            const size_t row = static_cast<size_t>(width) * sizeof(float);
            std::memcpy(mine + layout[4] * width, keys + (s * heads + h) * width, row);
            std::memcpy(theirs + layout[4] * width, values + (s * heads + h) * width, row);
            const int64_t at = (s * heads + h) * group * width;
            for (int64_t i = 0; i < group * width; ++i) query[static_cast<size_t>(i)] = queries[at + i] * scale;
            std::fill(most.begin(), most.end(), -std::numeric_limits<float>::infinity());
            // The group's heads take turns at a piece of the memory that is in the cache by then.
            for (int64_t k = 0; k < count; k += PIECE)
                for (int64_t g = 0; g < group; ++g) {
                    float* const own = scores.data() + g * whole + k;
                    float& greatest = most[static_cast<size_t>(g)];
                    greatest = std::max(greatest, scores_of(query.data() + g * width, mine + k * width, std::min(PIECE, count - k), width, own));
                }
            for (int64_t g = 0; g < group; ++g) {
                float* const own = scores.data() + g * whole;
                std::fill(own + count, own + whole, -std::numeric_limits<float>::infinity());
                sum[static_cast<size_t>(g)] = weights_of(own, count, most[static_cast<size_t>(g)]);
            }
            std::fill(out + at, out + at + group * width, 0.0f);
            for (int64_t k = 0; k < count; k += PIECE)
                for (int64_t g = 0; g < group; ++g)
                    for (int64_t n = k; n < std::min(k + PIECE, count); ++n)
                        add_scaled(theirs + n * width, scores[static_cast<size_t>(g * whole + n)], width, out + at + g * width);
            for (int64_t i = 0; i < group * width; ++i) out[at + i] /= sum[static_cast<size_t>(i / width)];
        }
    }
}
}
