// Reading packed keys and values (millpond.cache.kv_quantizer, which has the same in torch, to the same bits). C++17.
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"

namespace {

inline float of_half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, rest = bits & 1023u;
    if (!exponent) {  // zero and what is smaller than 2^-14
        const float small = static_cast<float>(rest) * 0x1p-24f;
        return sign ? -small : small;
    }
    const uint32_t wide = sign | (exponent == 31u ? 255u << 23 : (exponent + 112u) << 23) | rest << 13;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

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
void unpack(const uint8_t* packed, const uint16_t* scales, bool by_channel, int64_t groups, int64_t size, int64_t bytes,
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
void unpack_any(const uint8_t* packed, const uint16_t* scales, int64_t bits, int64_t by_channel, int64_t groups,
                int64_t size, int64_t bytes, int64_t width, T* out) {
    const auto run = bits == 2 ? unpack<2, T> : bits == 3 ? unpack<3, T> : bits == 4 ? unpack<4, T> : unpack<8, T>;
    run(packed, scales, by_channel != 0, groups, size, bytes, width, out);
}

}  // namespace

extern "C" {

// Keys (by_channel) or values in few bits (millpond.cache.kv_quantizer): packed codes [groups, size, bytes] and float16 scales
// [groups, 2, width], or [groups * size, 2, parts of `size` channels], to out [groups * size, width].
void millpond_unpack_f32(const uint8_t* packed, const uint16_t* scales, int64_t bits, int64_t by_channel, int64_t groups,
                         int64_t size, int64_t bytes, int64_t width, float* out) {
    unpack_any(packed, scales, bits, by_channel, groups, size, bytes, width, out);
}
void millpond_unpack_bf16(const uint8_t* packed, const uint16_t* scales, int64_t bits, int64_t by_channel, int64_t groups,
                          int64_t size, int64_t bytes, int64_t width, uint16_t* out) {
    unpack_any(packed, scales, bits, by_channel, groups, size, bytes, width, out);
}
}
