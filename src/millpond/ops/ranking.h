// The best of many scores, in time that does not depend on how many stay.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

namespace {

// Whole numbers in the order of the floats.
inline uint32_t ordered(float score) {
    score += 0.0f;  // -0 and 0 are equal
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Up to here sorting what is needed beats clearing and walking bins.
constexpr int64_t FEW = 512;

// The `slots`-th largest of `tokens` numbers; `above` becomes how many are larger. Many are taken eleven bits at a time: after each step
// only the numbers of one bin are left, in `rest` [tokens].
uint32_t nth_largest(const uint32_t* numbers, int64_t tokens, int64_t slots, uint32_t* rest, int64_t& above) {
    uint32_t found = 0;
    above = 0;
    if (tokens <= FEW) {
        std::memcpy(rest, numbers, static_cast<size_t>(tokens) * sizeof *rest);
        std::nth_element(rest, rest + slots - 1, rest + tokens, std::greater<uint32_t>());
        found = rest[slots - 1];
        for (int64_t n = 0; n < tokens; ++n) above += numbers[n] > found;
        return found;
    }
    for (const int shift : {21, 10, 0}) {
        const uint32_t bins = shift ? 2048 : 1024;
        int32_t counts[2048] = {};
        for (int64_t n = 0; n < tokens; ++n) ++counts[numbers[n] >> shift & (bins - 1)];
        uint32_t bin = bins - 1;
        while (above + counts[bin] < slots) above += counts[bin--];
        found |= bin << shift;
        int64_t left = 0;
        for (int64_t n = 0; n < tokens; ++n) {
            rest[left] = numbers[n];
            left += (numbers[n] >> shift & (bins - 1)) == bin;
        }
        numbers = rest;
        tokens = left;
    }
    return found;
}

// The `slots` best of `tokens` scores, ascending by index; equal scores go to the older token. `work` is uint32 [2 tokens].
void best(const float* scores, int64_t tokens, int64_t slots, uint32_t* work, int64_t* keep) {
    for (int64_t n = 0; n < tokens; ++n) work[n] = ordered(scores[n]);
    int64_t above;
    const uint32_t least = nth_largest(work, tokens, slots, work + tokens, above);
    int64_t ties = slots - above, kept = 0;
    for (int64_t n = 0; n < tokens && kept < slots; ++n) {
        const bool tie = work[n] == least;
        keep[kept] = n;
        kept += work[n] > least || (tie && ties > 0);
        ties -= tie;
    }
}

}  // namespace
