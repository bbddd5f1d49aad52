// What a compaction does with a selection: checks it, and moves what stays; compaction.py beside this has the same in torch. C++17.
#include <cstdint>
#include <cstring>

extern "C" {

// Whether `keep` is a selection that a pond can carry out: 0 yes, 1 not ascending or out of range, 2 a protected token dropped.
int64_t millpond_check_selection(const int64_t* keep, const uint8_t* protected_, int64_t heads, int64_t tokens, int64_t slots) {
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t* row = keep + h * slots;
        const uint8_t* must = protected_ + h * tokens;
        int64_t kept = 0, wanted = 0;
        for (int64_t j = 0; j < slots; ++j) {
            if (row[j] < 0 || row[j] >= tokens || (j && row[j] <= row[j - 1])) return 1;
            kept += must[row[j]];
        }
        for (int64_t n = 0; n < tokens; ++n) wanted += must[n];
        if (kept != wanted) return 2;
    }
    return 0;
}

// Move the kept rows of each head down in place, in each of `tensors` tensors; `keep` ascends, so nothing is overwritten before it has moved.
// Of each tensor: where it begins, the distance between heads in bytes, and the size of a row. `done` counts the heads that have moved;
// those are left out.
void millpond_move_rows(const int64_t* layout, int64_t tensors, const int64_t* keep, int64_t heads, int64_t slots,
                        int64_t* done) {
    for (int64_t h = *done; h < heads; *done = ++h) {
        const int64_t* from = keep + h * slots;
        for (int64_t first = 0; first < slots;) {
            int64_t last = first + 1;
            while (last < slots && from[last] == from[last - 1] + 1) ++last;
            if (from[first] != first)
                for (int64_t t = 0; t < tensors; ++t) {
                    const int64_t row = layout[3 * t + 2];
                    char* head = reinterpret_cast<char*>(layout[3 * t]) + h * layout[3 * t + 1];
                    std::memmove(head + first * row, head + from[first] * row, static_cast<size_t>((last - first) * row));
                }
            first = last;
        }
    }
}
}
