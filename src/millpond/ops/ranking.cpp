// The best of many scores; ranking.py beside this has the same in torch. C++17.
#include <cstdint>

#include "ranking.h"

extern "C" {

// The `slots` best of `tokens` scores in each head, ascending by index; equal scores go to the older token.
// `work` is uint32 [2 tokens].
void millpond_best(const float* scores, int64_t heads, int64_t tokens, int64_t slots, uint32_t* work, int64_t* keep) {
    for (int64_t h = 0; h < heads; ++h) best(scores + h * tokens, tokens, slots, work, keep + h * slots);
}
}
