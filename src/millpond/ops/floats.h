// Numbers as the compiled loops compute with them (float) and as they are stored: float, or bfloat16 or float16 as their sixteen bits.
#pragma once
#include <cstdint>
#include <cstring>

inline float widen(float x) { return x; }
inline float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, uint16_t& to) {  // to the nearest, of two equally near ones the even one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to = static_cast<uint16_t>(x == x ? nearest : 0x7fc0u);  // carrying would make a number of what is none
}
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
