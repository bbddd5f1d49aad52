// Reading keys and values that are stored in few bits; dequantization.py beside this has the same in torch, to the same bits. C++17.
#include <cstdint>
#include <vector>

#include "floats.h"

namespace {

// One row of packed codes, the first in the lowest bits of its word: a byte, or three bytes for codes of 3 bits.
template <int BITS>
inline void codes_of(const uint8_t* packed, int64_t bytes, uint8_t* codes) {
    constexpr int PER = BITS == 3 ? 8 : 8 / BITS, SIZE = BITS == 3 ? 3 : 1;
    for (int64_t word = 0; word < bytes / SIZE; ++word) {
        uint32_t bits = packed[word * SIZE];
        for (int byte = 1; byte < SIZE; ++byte) bits |= static_cast<uint32_t>(packed[word * SIZE + byte]) << (8 * byte);
        for (int place = 0; place < PER; ++place)
            codes[word * PER + place] = static_cast<uint8_t>(bits >> (BITS * place) & ((1u << BITS) - 1));
    }
}

// Code x step + low; the product is exact in float32 (8 and 11 significant bits), so that a fused addition changes nothing.
template <int BITS, typename T>
void dequantize(const uint8_t* packed, const uint16_t* scales, bool by_channel, int64_t groups, int64_t size, int64_t bytes,
            int64_t width, T* out) {
    std::vector<float> step(static_cast<size_t>(width)), low(static_cast<size_t>(width));
    std::vector<uint8_t> codes(static_cast<size_t>(bytes * 8));
    const int64_t parts = (width + size - 1) / size;
    for (int64_t row = 0; row < groups * size; ++row, packed += bytes, out += width) {
        if (by_channel && row % size == 0) {
            for (int64_t d = 0; d < width; ++d) {
                step[d] = of_half(scales[d]);
                low[d] = of_half(scales[width + d]);
            }
            scales += 2 * width;
        } else if (!by_channel) {
            for (int64_t d = 0; d < width; ++d) {
                if (d % size) {
                    step[d] = step[d - 1];
                    low[d] = low[d - 1];
                } else {
                    step[d] = of_half(scales[d / size]);
                    low[d] = of_half(scales[parts + d / size]);
                }
            }
            scales += 2 * parts;
        }
        codes_of<BITS>(packed, bytes, codes.data());
        for (int64_t d = 0; d < width; ++d) narrow(static_cast<float>(codes[d]) * step[d] + low[d], out[d]);
    }
}

template <typename T>
void dequantize_any(const uint8_t* packed, const uint16_t* scales, int64_t bits, int64_t by_channel, int64_t groups,
                int64_t size, int64_t bytes, int64_t width, T* out) {
    const auto run = bits == 2 ? dequantize<2, T> : bits == 3 ? dequantize<3, T> : bits == 4 ? dequantize<4, T> : dequantize<8, T>;
    run(packed, scales, by_channel != 0, groups, size, bytes, width, out);
}

}  // namespace

extern "C" {

// Keys (by_channel) or values in few bits: packed codes [groups, size, bytes] and float16 scales
// [groups, 2, width], or [groups * size, 2, parts of `size` channels], to out [groups * size, width].
void millpond_dequantize_f32(const uint8_t* packed, const uint16_t* scales, int64_t bits, int64_t by_channel, int64_t groups,
                         int64_t size, int64_t bytes, int64_t width, float* out) {
    dequantize_any(packed, scales, bits, by_channel, groups, size, bytes, width, out);
}
void millpond_dequantize_bf16(const uint8_t* packed, const uint16_t* scales, int64_t bits, int64_t by_channel, int64_t groups,
                          int64_t size, int64_t bytes, int64_t width, uint16_t* out) {
    dequantize_any(packed, scales, bits, by_channel, groups, size, bytes, width, out);
}
}
