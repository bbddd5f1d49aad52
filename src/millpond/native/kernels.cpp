// The inner loops of selection and compaction on a CPU that several policies share. C++17; every function has a torch equivalent that is
// used where this file could not be compiled. Pointers are to contiguous rows; strides are in elements unless said otherwise.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ranking.h"
#include "rows.h"

namespace {

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

}  // namespace

extern "C" {

// Minus the cosine of one head's keys [tokens, width] with their mean unit key: out float32 [tokens].
void millpond_distinctiveness_f32(const float* keys, int64_t tokens, int64_t width, float* out) {
    distinctiveness(keys, tokens, width, out);
}
void millpond_distinctiveness_bf16(const uint16_t* keys, int64_t tokens, int64_t width, float* out) {
    distinctiveness(keys, tokens, width, out);
}

// The `slots` best of `tokens` scores in each head, ascending by index; equal scores go to the older token.
// `work` is uint32 [2 tokens].
void millpond_best(const float* scores, int64_t heads, int64_t tokens, int64_t slots, uint32_t* work, int64_t* keep) {
    for (int64_t h = 0; h < heads; ++h) best(scores + h * tokens, tokens, slots, work, keep + h * slots);
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

// Move the kept rows of each head down in place, in each of `tensors` tensors; `keep` ascends, so nothing is overwritten before it has moved.
// Of each tensor: where it begins, the distance between heads in bytes, and the size of a row. `done` counts the heads that have moved;
// those are left out.
void millpond_move_rows(const int64_t* layout, int64_t tensors, const int64_t* keep, int64_t heads, int64_t slots,
                        int64_t* done) {
    for (int64_t h = *done; h < heads; *done = ++h) {
        const int64_t* from = keep + h * slots;
        for (int64_t first = 0; first < slots;) {
            int64_t last = first + 1;
            while (last < slots && from[last] == from[last - 1] + 1) ++last;
            if (from[first] != first)
                for (int64_t t = 0; t < tensors; ++t) {
                    const int64_t row = layout[3 * t + 2];
                    char* head = reinterpret_cast<char*>(layout[3 * t]) + h * layout[3 * t + 1];
                    std::memmove(head + first * row, head + from[first] * row, static_cast<size_t>((last - first) * row));
                }
            first = last;
        }
    }
}
}
