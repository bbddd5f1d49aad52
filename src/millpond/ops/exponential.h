// e^x of eight floats at a time, with the vector types of GCC and Clang.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

// e^x for x <= 0, to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline Floats exponential(Floats x) {
    const Floats least = Floats{} - 87.0f;
    const Ints none = x < least;
    x = none ? least : x;
    const Floats turns = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const Floats whole = turns - 12582912.0f;
    const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints n;
    std::memcpy(&n, &turns, sizeof n);
    n = (n - 0x4b400000 + 127) << 23;
    Floats power;
    std::memcpy(&power, &n, sizeof power);
    return none ? Floats{} : p * power;
}

}  // namespace
