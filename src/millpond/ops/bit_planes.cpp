// Products with Any-Precision weights that read only the bit planes they need; bit_planes.py beside this has the same in torch. C++17.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "floats.h"

namespace {

// Tables are kept in float16: a row's becomes float32 while the row is read.
inline void widen(const uint16_t* from, int64_t count, float* to) {
#if defined(__F16C__)
    for (int64_t i = 0; i < count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
    for (int64_t i = 0; i < count; ++i) to[i] = of_half(from[i]);
#endif
}

// The eight bits of a byte, one to a byte.
struct Spread {
    uint64_t of[256];
    Spread() {
        for (int byte = 0; byte < 256; ++byte) {
            of[byte] = 0;
            for (int bit = 0; bit < 8; ++bit)
                if (byte >> bit & 1) of[byte] |= uint64_t{1} << (8 * bit);
        }
    }
};
const Spread spread;

// Labels of eight columns, a byte each, from the first `bits` planes of a row; `stride` bytes lie between planes.
template <int BITS>
inline uint64_t labels_of(const uint8_t* row, int64_t stride) {
    uint64_t found = 0;
    for (int b = 0; b < BITS; ++b) found = found << 1 | spread.of[row[b * stride]];
    return found;
}

#if defined(__AVX2__)
inline float total(__m256 sums) {
    const __m128 quad = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    const __m128 pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

// Tables of up to 64 numbers stay in registers or close by, as four planes of bytes in parts of 16 entries, so that one byte
// shuffle looks up 32 columns at once; the four bytes of each number are put together afterwards. That leaves the columns in the
// order of `shuffled`.
template <int BITS>
struct Bytes {
    static constexpr int PARTS = BITS > 4 ? 1 << (BITS - 4) : 1;
    __m256i byte[4][PARTS];
    explicit Bytes(const float* table) {
        const __m128i gather = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int part = 0; part < PARTS; ++part) {
            __m128i four[4];
            for (int i = 0; i < 4; ++i) {
                // Three bits have eight entries: the second half of the part is never looked at.
                const float* from = table + 16 * part + (BITS == 3 ? 4 * (i & 1) : 4 * i);
                four[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), gather);
            }
            const __m128i low01 = _mm_unpacklo_epi32(four[0], four[1]), low23 = _mm_unpacklo_epi32(four[2], four[3]);
            const __m128i high01 = _mm_unpackhi_epi32(four[0], four[1]), high23 = _mm_unpackhi_epi32(four[2], four[3]);
            byte[0][part] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low01, low23));
            byte[1][part] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low01, low23));
            byte[2][part] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high01, high23));
            byte[3][part] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high01, high23));
        }
    }
    // All ones in the bytes of the columns whose bit of this plane is set.
    static __m256i mask(const uint8_t* plane) {
        const __m256i each = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3,
                                              3, 3, 3, 3);
        const __m256i bits = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
        int32_t word;
        std::memcpy(&word, plane, sizeof word);
        const __m256i spread_out = _mm256_shuffle_epi8(_mm256_set1_epi32(word), each);
        return _mm256_cmpeq_epi8(_mm256_and_si256(spread_out, bits), bits);
    }
    void look(const uint8_t* row, int64_t stride, __m256 out[4]) const {
        constexpr int ABOVE = BITS > 4 ? BITS - 4 : 0;
        __m256i above[ABOVE + 1], index = _mm256_setzero_si256();
        for (int b = 0; b < ABOVE; ++b) above[b] = mask(row + b * stride);
        for (int b = ABOVE; b < BITS; ++b)
            index = _mm256_sub_epi8(_mm256_add_epi8(index, index), mask(row + b * stride));
        __m256i found[4];
        for (int i = 0; i < 4; ++i) {
            __m256i parts[PARTS];
            for (int part = 0; part < PARTS; ++part) parts[part] = _mm256_shuffle_epi8(byte[i][part], index);
            for (int b = ABOVE - 1, left = PARTS / 2; left > 0; --b, left /= 2)
                for (int part = 0; part < left; ++part)
                    parts[part] = _mm256_blendv_epi8(parts[2 * part], parts[2 * part + 1], above[b]);
            found[i] = parts[0];
        }
        const __m256i low01 = _mm256_unpacklo_epi8(found[0], found[1]), high01 = _mm256_unpackhi_epi8(found[0], found[1]);
        const __m256i low23 = _mm256_unpacklo_epi8(found[2], found[3]), high23 = _mm256_unpackhi_epi8(found[2], found[3]);
        out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
        out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
        out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
        out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
    }
};

// x in the order in which `Bytes::look` leaves the columns; whole blocks of 32 only.
void shuffled(const float* x, int64_t cols, std::vector<float>& out) {
    out.resize(static_cast<size_t>(cols / 32 * 32));
    for (int64_t k = 0; k + 32 <= cols; k += 32)
        for (int i = 0; i < 4; ++i) {
            std::memcpy(&out[k + 8 * i], x + k + 4 * i, 16);
            std::memcpy(&out[k + 8 * i + 4], x + k + 16 + 4 * i, 16);
        }
}
#endif

template <int BITS>
void product(const uint8_t* planes, int64_t row_stride, int64_t stride, const uint16_t* table, const float* x, int64_t first,
             int64_t last, int64_t cols, float* y) {
#if defined(__AVX2__)
    const int64_t whole = cols / 8 * 8;  // used for wide tables only
    static_cast<void>(whole);
    std::vector<float> turned;
    if constexpr (BITS <= 6) shuffled(x, cols, turned);
#endif
    for (int64_t n = first; n < last; ++n) {
        const uint8_t* row = planes + n * row_stride;
        float own[1 << BITS];
        widen(table + (n << BITS), 1 << BITS, own);
        float sum = 0;
        int64_t k = 0;
#if defined(__AVX2__)
        __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
        if constexpr (BITS <= 6) {
            const Bytes<BITS> bytes(own);
            const float* in = turned.data();
            __m256 w[4];
            for (; k + 32 <= cols; k += 32) {
                bytes.look(row + k / 8, stride, w);
                a = _mm256_fmadd_ps(w[0], _mm256_loadu_ps(in + k), a);
                b = _mm256_fmadd_ps(w[1], _mm256_loadu_ps(in + k + 8), b);
                a = _mm256_fmadd_ps(w[2], _mm256_loadu_ps(in + k + 16), a);
                b = _mm256_fmadd_ps(w[3], _mm256_loadu_ps(in + k + 24), b);
            }
        } else {
            for (; k < whole; k += 8) {
                const int64_t labels = static_cast<int64_t>(labels_of<BITS>(row + k / 8, stride));
                const __m256 w = _mm256_i32gather_ps(own, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(labels)), 4);
                a = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + k), a);
            }
        }
        sum = total(_mm256_add_ps(a, b));
#endif
        for (; k < cols; k += 8) {
            const uint64_t labels = labels_of<BITS>(row + k / 8, stride);
            for (int64_t i = 0; i < std::min<int64_t>(8, cols - k); ++i) sum += own[labels >> (8 * i) & 255] * x[k + i];
        }
        y[n] = sum;
    }
}

template <int BITS>
void unpack(const uint8_t* planes, int64_t row_stride, int64_t stride, const uint16_t* table, int64_t first, int64_t last,
            int64_t cols, float* out) {
    for (int64_t n = first; n < last; ++n) {
        float own[1 << BITS];
        widen(table + (n << BITS), 1 << BITS, own);
        for (int64_t k = 0; k < cols; k += 8) {
            const uint64_t labels = labels_of<BITS>(planes + n * row_stride + k / 8, stride);
            for (int64_t i = 0; i < std::min<int64_t>(8, cols - k); ++i)
                out[(n - first) * cols + k + i] = own[labels >> (8 * i) & 255];
        }
    }
}

}  // namespace

extern "C" {

// y[first..last) = W x, reading the first `bits` planes. planes: uint8 [rows, kept planes, bytes]; table: float16 [rows, 2^bits].
void millpond_nested_product(const uint8_t* planes, int64_t kept, int64_t bytes, const uint16_t* table, int64_t bits,
                             const float* x, int64_t first, int64_t last, int64_t cols, float* y) {
    switch (bits) {
#define WITH(BITS) \
    case BITS:     \
        return product<BITS>(planes, kept * bytes, bytes, table, x, first, last, cols, y);
        WITH(3) WITH(4) WITH(5) WITH(6) WITH(7) WITH(8)
#undef WITH
    }
}

// Rows first..last of W as float32 [last - first, cols].
void millpond_nested_rows(const uint8_t* planes, int64_t kept, int64_t bytes, const uint16_t* table, int64_t bits, int64_t first,
                          int64_t last, int64_t cols, float* out) {
    switch (bits) {
#define WITH(BITS) \
    case BITS:     \
        return unpack<BITS>(planes, kept * bytes, bytes, table, first, last, cols, out);
        WITH(3) WITH(4) WITH(5) WITH(6) WITH(7) WITH(8)
#undef WITH
    }
}
}
