// Exact clustering of the rows of a matrix, each cluster then split in two, again and again; clustering.py beside this has the same in
// numpy. C++17.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace {

// Sums of weights, of weighted values and of weighted squares up to each sorted element, in double.
struct Sums {
    std::vector<double> g, gw, gww;
    void reset(int64_t count) {
        g.assign(count + 1, 0.0);
        gw.assign(count + 1, 0.0);
        gww.assign(count + 1, 0.0);
    }
    // Weighted squared error of the elements first..last-1 around their mean.
    double cost(int64_t first, int64_t last) const {
        const double weight = g[last] - g[first];
        if (weight <= 0) return 0.0;
        const double sum = gw[last] - gw[first];
        return std::max(0.0, gww[last] - gww[first] - sum * sum / weight);
    }
    double mean(int64_t first, int64_t last) const { return (gw[last] - gw[first]) / (g[last] - g[first]); }
};

// One step of the dynamic programme, best[j] = min over i of before[i] + cost(i, j), by divide and conquer: the best i does not
// fall as j grows.
void step(const Sums& sums, const std::vector<double>& before, std::vector<double>& best, int32_t* from, int64_t low,
          int64_t high, int64_t left, int64_t right) {
    if (low > high) return;
    const int64_t middle = (low + high) / 2;
    double least = std::numeric_limits<double>::infinity();
    int64_t chosen = left;
    for (int64_t i = left; i <= std::min(middle, right); ++i) {
        const double cost = before[i] + sums.cost(i, middle);
        if (cost < least) {
            least = cost;
            chosen = i;
        }
    }
    best[middle] = least;
    from[middle] = static_cast<int32_t>(chosen);
    step(sums, before, best, from, low, middle - 1, left, chosen);
    step(sums, before, best, from, middle + 1, high, chosen, right);
}

// Bounds of the optimal `clusters` runs of `count` sorted elements: [clusters + 1].
void optimal_runs(const Sums& sums, int64_t count, int64_t clusters, std::vector<int64_t>& bounds) {
    std::vector<double> before(count + 1), best(count + 1);
    std::vector<int32_t> from(static_cast<size_t>(clusters * (count + 1)));
    for (int64_t j = 0; j <= count; ++j) before[j] = sums.cost(0, j);
    for (int64_t c = 1; c < clusters; ++c) {
        step(sums, before, best, from.data() + c * (count + 1), 0, count, 0, count);
        before.swap(best);
    }
    bounds.assign(clusters + 1, 0);
    bounds[clusters] = count;
    for (int64_t c = clusters - 1; c > 0; --c) bounds[c] = from[c * (count + 1) + bounds[c + 1]];
}

}  // namespace

extern "C" {

// Rows of nested tables. weight, sensitivity: float32 [rows, cols]; labels: uint8 [rows, cols], of `high` bits; tables: float32,
// for each width low..high one [rows, 2^width] behind the other.
void millpond_cluster_rows(const float* weight, const float* sensitivity, int64_t rows, int64_t cols, int64_t low, int64_t high,
                        uint8_t* labels, float* tables) {
    std::vector<int64_t> order(cols), bounds, finer;
    Sums sums;
    for (int64_t n = 0; n < rows; ++n) {
        const float* w = weight + n * cols;
        const float* g = sensitivity + n * cols;
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [w](int64_t a, int64_t b) { return w[a] < w[b] || (w[a] == w[b] && a < b); });
        // A floor, far below the row's mean, so that weights without sensitivity still find the nearest centroid's side.
        double total = 0;
        for (int64_t k = 0; k < cols; ++k) total += g[k];
        const double floor = total > 0 ? 1e-6 * total / cols : 1.0;
        sums.reset(cols);
        for (int64_t i = 0; i < cols; ++i) {
            const double value = w[order[i]], by = g[order[i]] + floor;
            sums.g[i + 1] = sums.g[i] + by;
            sums.gw[i + 1] = sums.gw[i] + by * value;
            sums.gww[i + 1] = sums.gww[i] + by * value * value;
        }
        optimal_runs(sums, cols, int64_t{1} << low, bounds);
        float* at = tables;
        for (int64_t bits = low; bits <= high; ++bits) {
            const int64_t count = int64_t{1} << bits;
            if (bits > low) {  // each run in two, at the best place
                finer.assign(count + 1, 0);
                for (int64_t c = 0; c < count / 2; ++c) {
                    const int64_t first = bounds[c], last = bounds[c + 1];
                    double least = std::numeric_limits<double>::infinity();
                    int64_t cut = last;
                    for (int64_t i = first + 1; i < last; ++i) {
                        const double cost = sums.cost(first, i) + sums.cost(i, last);
                        if (cost < least) {
                            least = cost;
                            cut = i;
                        }
                    }
                    finer[2 * c] = first;
                    finer[2 * c + 1] = cut;
                }
                finer[count] = cols;
                bounds.swap(finer);
            }
            float* table = at + n * count;
            float latest = 0;
            bool known = false;
            for (int64_t c = 0; c < count; ++c) {
                if (bounds[c + 1] > bounds[c]) {
                    latest = static_cast<float>(sums.mean(bounds[c], bounds[c + 1]));
                    known = true;
                }
                table[c] = latest;  // an empty cluster repeats its neighbour's centroid
                if (!known) table[c] = w[order[0]];
            }
            at += rows * count;
        }
        for (int64_t c = 0; c < int64_t{1} << high; ++c)
            for (int64_t i = bounds[c]; i < bounds[c + 1]; ++i) labels[n * cols + order[i]] = static_cast<uint8_t>(c);
    }
}
}
