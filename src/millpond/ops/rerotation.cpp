// Rotating stored keys to other positions of their rotary embedding, in place; rerotation.py beside this has the same in torch. C++17.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "floats.h"

namespace {

template <typename T>
void rerotate(T* keys, int64_t head_stride, int64_t heads, int64_t tokens, int64_t width, const int64_t* delta, int64_t token_step,
          int64_t axis_step, int64_t axes, const int64_t* axis, const float* inverse, int64_t half, int64_t* done) {
    if (done && *done) return;
    std::vector<float> cosine(half), sine(half);
    std::vector<int64_t> by(axes);
    bool known = false;  // cosine and sine are those of `by`: neighbours mostly move alike
    for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t a = 0; a < axes; ++a) {
            const int64_t wanted = delta[n * token_step + a * axis_step];
            known = known && by[a] == wanted;
            by[a] = wanted;
        }
        if (std::all_of(by.begin(), by.end(), [](int64_t one) { return one == 0; })) continue;
        if (!known) {
            for (int64_t i = 0; i < half; ++i) {
                // In double: hundreds of radians as a float are off by 1e-5, which would add up over re-anchorings.
                const double angle = static_cast<double>(by[axis[i]]) * static_cast<double>(inverse[i]);
                cosine[i] = static_cast<float>(std::cos(angle));
                sine[i] = static_cast<float>(std::sin(angle));
            }
            known = true;
        }
        for (int64_t h = 0; h < heads; ++h) {
            T* low = keys + h * head_stride + n * width;
            T* high = low + half;
            for (int64_t i = 0; i < half; ++i) {
                const float x = widen(low[i]), y = widen(high[i]);
                narrow(x * cosine[i] - y * sine[i], low[i]);
                narrow(y * cosine[i] + x * sine[i], high[i]);
            }
        }
    }
    if (done) *done = 1;
}

}  // namespace

extern "C" {

// keys: [heads, tokens, width], rows contiguous, heads `head_stride` elements apart. delta: positions to move by, the same for every head,
// with its strides in elements. axis, inverse: [half], the axis that each frequency reads, and the frequency. done: may be null; 1 once the
// keys are rotated, which then never rotate again.
void millpond_rerotate_f32(float* keys, int64_t head_stride, int64_t heads, int64_t tokens, int64_t width, const int64_t* delta,
                       int64_t token_step, int64_t axis_step, int64_t axes, const int64_t* axis, const float* inverse, int64_t half,
                       int64_t* done) {
    rerotate(keys, head_stride, heads, tokens, width, delta, token_step, axis_step, axes, axis, inverse, half, done);
}
void millpond_rerotate_bf16(uint16_t* keys, int64_t head_stride, int64_t heads, int64_t tokens, int64_t width, const int64_t* delta,
                        int64_t token_step, int64_t axis_step, int64_t axes, const int64_t* axis, const float* inverse,
                        int64_t half, int64_t* done) {
    rerotate(keys, head_stride, heads, tokens, width, delta, token_step, axis_step, axes, axis, inverse, half, done);
}
}
