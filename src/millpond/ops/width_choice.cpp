// Decides between two widths for all linears that read the same input: an optional RMS norm, then a line or a projection for each
// linear, against its threshold. width_choice.py beside this has the same in torch.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"

namespace {

float squares(const float* x, int64_t count) {
    float parts[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int lane = 0; lane < 8; ++lane) parts[lane] += x[i + lane] * x[i + lane];
    float sum = 0;
    for (; i < count; ++i) sum += x[i] * x[i];
    for (float part : parts) sum += part;
    return sum;
}

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(16)));

inline Floats eight(const uint16_t* from) {
    Shorts bits;
    std::memcpy(&bits, from, sizeof bits);
    const Words wide = __builtin_convertvector(bits, Words) << 16;
    Floats x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

// Dot products of x with COUNT rows of g, squared and summed up.
template <int64_t COUNT>
inline float directions(const float* x, const uint16_t* g, int64_t columns) {
    Floats sums[COUNT] = {}, part;
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
        std::memcpy(&part, x + i, sizeof part);
        for (int64_t j = 0; j < COUNT; ++j) sums[j] += eight(g + j * columns + i) * part;
    }
    float sum = 0;
    for (int64_t j = 0; j < COUNT; ++j) {
        float dot = ((sums[j][0] + sums[j][4]) + (sums[j][1] + sums[j][5])) +
                    ((sums[j][2] + sums[j][6]) + (sums[j][3] + sums[j][7]));
        for (int64_t rest = i; rest < columns; ++rest) dot += widen(g[j * columns + rest]) * x[rest];
        sum += dot * dot;
    }
    return sum;
}

// Squared length of the projection; g is [k, columns].
float projected(const float* x, const uint16_t* g, int64_t columns, int64_t k) {
    float sum = 0;
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) sum += directions<4>(x, g + j * columns, columns);
    for (; j < k; ++j) sum += directions<1>(x, g + j * columns, columns);
    return sum;
}

}  // namespace

extern "C" {

// What does not change from token to token. scale: the norm's weight [columns], or null for none. For each of `count` linears a
// projection g[j] [k[j], columns] in bfloat16, or null and a line.
struct Group {
    int64_t columns, count;
    const float* scale;
    float epsilon;
    const uint16_t* const* g;
    const int64_t* k;
    const float *slope, *intercept, *threshold;
};

// x: [rows, columns]. out: [count, rows], 1 for the high width.
void millpond_exceed(const Group* group, const float* x, int64_t rows, uint8_t* out) {
    const int64_t columns = group->columns;
    std::vector<float> normed(group->scale ? columns : 0);
    for (int64_t row = 0; row < rows; ++row) {
        const float* read = x + row * columns;
        if (group->scale) {
            const float mean = squares(read, columns) / static_cast<float>(columns);
            const float inverse = 1.0f / std::sqrt(mean + group->epsilon);
            for (int64_t i = 0; i < columns; ++i) normed[i] = read[i] * inverse * group->scale[i];
            read = normed.data();
        }
        float length = -1;
        for (int64_t j = 0; j < group->count; ++j) {
            float estimate;
            if (group->g[j]) {
                estimate = std::sqrt(projected(read, group->g[j], columns, group->k[j]));
            } else {
                if (length < 0) length = std::sqrt(squares(read, columns));
                estimate = length * group->slope[j] + group->intercept[j];
            }
            out[j * rows + row] = estimate > group->threshold[j];
        }
    }
}

}  // extern "C"
