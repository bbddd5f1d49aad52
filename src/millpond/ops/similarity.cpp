// How unlike its head's common direction each key is; similarity.py beside this has the same in torch. C++17; rows are contiguous.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace {

// Minus the cosine of each key with the mean unit key.
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
}
