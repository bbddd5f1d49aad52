// Metadata of a block's tokens, written into every layer; metadata.py beside this has the same in torch. C++17.
#include <cstdint>
#include <cstring>

extern "C" {

// time: [count]. grid: [count, 2]. positions: [count, axes], its strides in elements. layout: of each of `layers` layers nine numbers: how
// many heads it has, and for times [capacity], grid positions [capacity, 2], positions [capacity, axes] and accumulated attention [capacity] where the block begins
// in the first head, and how far the next head is in elements; accumulated attention may begin at 0, for none.
void millpond_write_metadata(const int64_t* time, const int16_t* grid, const int64_t* positions, int64_t token_step,
                             int64_t axis_step, int64_t axes, int64_t count, const int64_t* layout, int64_t layers) {
    for (int64_t layer = 0; layer < layers; ++layer, layout += 9) {
        const auto times = reinterpret_cast<int64_t*>(layout[1]);
        const auto grids = reinterpret_cast<int16_t*>(layout[3]);
        const auto rotary = reinterpret_cast<int32_t*>(layout[5]);
        const auto sums = reinterpret_cast<float*>(layout[7]);
        for (int64_t h = 0; h < layout[0]; ++h) {
            std::memcpy(times + h * layout[2], time, static_cast<size_t>(count) * sizeof *time);
            std::memcpy(grids + h * layout[4], grid, static_cast<size_t>(2 * count) * sizeof *grid);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t a = 0; a < axes; ++a)
                    rotary[h * layout[6] + n * axes + a] = static_cast<int32_t>(positions[n * token_step + a * axis_step]);
            if (sums) std::memset(sums + h * layout[8], 0, static_cast<size_t>(count) * sizeof *sums);
        }
    }
}
}
