// The inner loops of selection and compaction on a CPU. Plain C++17; every function has a torch equivalent that is used
// where this file could not be compiled. Pointers are to contiguous rows; strides are in elements unless said otherwise.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace {

inline float widen(float x) { return x; }
inline float widen(uint16_t bits) {  // bfloat16
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

// Plain sums: -ffast-math lets the compiler spread them over vector registers.
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

template <typename T>
void cosines(const T* rows, int64_t tokens, int64_t width, const float* table, const int32_t* index, float floor,
             float* out) {
    for (int64_t n = 0; n < tokens; ++n)
        out[n] = index[n] < 0 ? 0.0f : cosine_to(rows + n * width, table + index[n] * width, width, floor);
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

// One head: dot product of each row, divided by its norm, with the row of `table` that `index` names; 0 where index < 0.
void millpond_cosines_f32(const float* rows, int64_t tokens, int64_t width, const float* table, const int32_t* index,
                          float floor, float* out) {
    cosines(rows, tokens, width, table, index, floor, out);
}
void millpond_cosines_bf16(const uint16_t* rows, int64_t tokens, int64_t width, const float* table, const int32_t* index,
                           float floor, float* out) {
    cosines(rows, tokens, width, table, index, floor, out);
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
