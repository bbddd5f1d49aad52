// Decides between two widths for all linears that read the same input: an optional RMS norm, then a line or a projection for each
// linear, against its threshold. `millpond.precision.choosing` holds the same in torch.
#include <cmath>
#include <cstdint>
#include <vector>

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

// Squared length of the projection; g is [columns, k], so that neighbouring directions fill a vector register.
float projected(const float* x, const float* g, int64_t columns, int64_t k) {
    float sum = 0;
    int64_t first = 0;
    for (; first + 8 <= k; first += 8) {
        float even[8] = {}, odd[8] = {};
        int64_t i = 0;
        for (; i + 2 <= columns; i += 2) {
            const float *a = g + i * k + first, *b = a + k;
            for (int lane = 0; lane < 8; ++lane) even[lane] += x[i] * a[lane];
            for (int lane = 0; lane < 8; ++lane) odd[lane] += x[i + 1] * b[lane];
        }
        if (i < columns)
            for (int lane = 0; lane < 8; ++lane) even[lane] += x[i] * g[i * k + first + lane];
        for (int lane = 0; lane < 8; ++lane) sum += (even[lane] + odd[lane]) * (even[lane] + odd[lane]);
    }
    for (; first < k; ++first) {
        float dot = 0;
        for (int64_t i = 0; i < columns; ++i) dot += x[i] * g[i * k + first];
        sum += dot * dot;
    }
    return sum;
}

}  // namespace

extern "C" {

// What does not change from token to token. scale: the norm's weight [columns], or null for none. For each of `count` linears a
// projection g[j] of k[j] directions, or null and a line.
struct Group {
    int64_t columns, count;
    const float* scale;
    float epsilon;
    const float* const* g;
    const int64_t* k;
    const float *slope, *intercept, *threshold;
};

// x: [rows, columns]. out: [count, rows], 1 for the high width.
void millpond_choose(const Group* group, const float* x, int64_t rows, uint8_t* out) {
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
