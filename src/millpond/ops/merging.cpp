// Weighted means of runs of tokens, and how far keys lie from those of their owners; merging.py beside this has the same in torch. C++17;
// rows are contiguous.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"

namespace {

template <typename T>
bool finite(const T* row, int64_t width) {
    // A number that is not finite makes the sum of zeros something else than zero.
    float sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += widen(row[i + lane]) * 0.0f;
    float sum = 0;
    for (; i < width; ++i) sum += widen(row[i]) * 0.0f;
    for (float part : sums) sum += part;
    return sum == 0.0f;
}

template <typename T>
void fold(T* keys, T* values, int64_t tokens, int64_t width, const int64_t* owner, const float* weight, int64_t* done) {
    if (*done) return;
    std::vector<float> key(static_cast<size_t>(width)), value(static_cast<size_t>(width));
    for (int64_t n = 0; n < tokens;) {
        if (owner[n] < 0) {
            ++n;
            continue;
        }
        const int64_t to = owner[n];
        std::fill(key.begin(), key.end(), 0.0f);
        std::fill(value.begin(), value.end(), 0.0f);
        float total = 0;
        for (; n < tokens && (owner[n] < 0 || owner[n] == to); ++n) {
            const float w = weight[n];
            if (owner[n] < 0 || !(w > 0) || !std::isfinite(w)) continue;
            const T *k = keys + n * width, *v = values + n * width;
            if (!finite(k, width) || !finite(v, width)) continue;
            for (int64_t i = 0; i < width; ++i) key[i] += w * widen(k[i]);
            for (int64_t i = 0; i < width; ++i) value[i] += w * widen(v[i]);
            total += w;
        }
        if (total > 0)
            for (int64_t i = 0; i < width; ++i) {
                narrow(key[i] / total, keys[to * width + i]);
                narrow(value[i] / total, values[to * width + i]);
            }
    }
    *done = 1;
}

template <typename T>
void distances(const T* keys, int64_t tokens, int64_t width, const int64_t* owner, float* apart, float* alike) {
    for (int64_t n = 0; n < tokens; ++n) {
        apart[n] = alike[n] = 0;
        if (owner[n] < 0) continue;
        const T *a = keys + n * width, *b = keys + owner[n] * width;
        float aa[8] = {}, bb[8] = {}, ab[8] = {}, dd[8] = {};
        int64_t i = 0;
        for (; i + 8 <= width; i += 8)
            for (int lane = 0; lane < 8; ++lane) {
                const float x = widen(a[i + lane]), y = widen(b[i + lane]);
                aa[lane] += x * x;
                bb[lane] += y * y;
                ab[lane] += x * y;
                dd[lane] += (x - y) * (x - y);
            }
        for (; i < width; ++i) {
            const float x = widen(a[i]), y = widen(b[i]);
            aa[0] += x * x;
            bb[0] += y * y;
            ab[0] += x * y;
            dd[0] += (x - y) * (x - y);
        }
        for (int lane = 1; lane < 8; ++lane) {
            aa[0] += aa[lane];
            bb[0] += bb[lane];
            ab[0] += ab[lane];
            dd[0] += dd[lane];
        }
        const float lengths = std::sqrt(aa[0]) * std::sqrt(bb[0]);
        alike[n] = ab[0] / (lengths > 1e-12f ? lengths : 1e-12f);
        apart[n] = std::sqrt(dd[0]);
    }
}

}  // namespace

extern "C" {

// Each token of keys and values [tokens, width] that others go into becomes their mean by weight, in place. owner: [tokens], -1 or the
// token that each goes into, ascending where it is not -1. What is not finite counts for nothing. done: 1 once it is, and then nothing
// changes any more.
void millpond_fold_f32(float* keys, float* values, int64_t tokens, int64_t width, const int64_t* owner, const float* weight,
                       int64_t* done) {
    fold(keys, values, tokens, width, owner, weight, done);
}
void millpond_fold_bf16(uint16_t* keys, uint16_t* values, int64_t tokens, int64_t width, const int64_t* owner,
                        const float* weight, int64_t* done) {
    fold(keys, values, tokens, width, owner, weight, done);
}

// Distance of each key from its owner's and the cosine of the two, [tokens] each; 0 where the owner is -1.
void millpond_distances_f32(const float* keys, int64_t tokens, int64_t width, const int64_t* owner, float* apart, float* alike) {
    distances(keys, tokens, width, owner, apart, alike);
}
void millpond_distances_bf16(const uint16_t* keys, int64_t tokens, int64_t width, const int64_t* owner, float* apart,
                             float* alike) {
    distances(keys, tokens, width, owner, apart, alike);
}
}
