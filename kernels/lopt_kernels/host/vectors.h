// Vectors of the processor at hand, and products of small matrices: what the C++ files here have in common.
//
// A matrix is in C order. The compiler's own vectors are used, so that no file knows what processor it is for.

#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, MR = 8;  // floats of a vector; rows of a tile, so that its sums fill half of the registers
#elif defined(__AVX__)
constexpr int W = 8, MR = 6;
#else
constexpr int W = 4, MR = 6;
#endif
constexpr int NV = 2, NR = NV * W;  // vectors and columns of a tile
constexpr int KC = 256;             // of the inner dimension at once: a panel of NR columns stays in the first cache

typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));


inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline void store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }
// The first n of W floats, and 0 in the place of others, which are not touched.
inline Vec load_some(const float* x, int64_t n) {
    if (n >= W) return load(x);
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((1u << n) - 1, x);
#else
    Vec v = {};
    for (int64_t i = 0; i < n; i++) v[i] = x[i];
    return v;
#endif
}
inline void store_some(float* x, Vec v, int64_t n) {
    if (n >= W) return store(x, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(x, (1u << n) - 1, v);
#else
    for (int64_t i = 0; i < n; i++) x[i] = v[i];
#endif
}
// 1 / sqrt(x) for x > 0. Where the processor guesses 14 bits of it, a step of Newton's makes that nearly all.
inline Vec invert_root(Vec x) {
#if defined(__AVX512F__)
    const Vec guess = _mm512_rsqrt14_ps(x);
    return guess * (1.5f - 0.5f * x * guess * guess);
#else
    Vec r;
    for (int i = 0; i < W; i++) r[i] = 1 / sqrtf(x[i]);
    return r;
#endif
}
inline float add_up(Vec x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}
inline int64_t pad(int64_t n) { return (n + W - 1) / W * W; }

// -- products -------------------------------------------------------------------------------------------------------

struct View {  // of a matrix: element (i, k) is at[i * row + k * column]
    const float* at;
    int64_t row, column;
    View flip() const { return {at, column, row}; }
};

template <int M, int N>
void multiply_tile(int64_t K, View a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t columns, bool add) {
    Vec sum[M][N] = {};
    for (int64_t k = 0; k < K; k++) {
        Vec line[N];
        for (int j = 0; j < N; j++) line[j] = load(b + k * ldb + j * W);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sum[i][j] += a.at[i * a.row + k * a.column] * line[j];
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float* out = c + i * ldc + j * W;
            int64_t n = columns - j * W;
            store_some(out, add ? load_some(out, n) + sum[i][j] : sum[i][j], n);
        }
}

template <int M, int N>
void multiply_rows(int64_t rows, int64_t K, View a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t columns,
                   bool add) {
    if (rows == M) return multiply_tile<M, N>(K, a, b, ldb, c, ldc, columns, add);
    if constexpr (M > 1) multiply_rows<M - 1, N>(rows, K, a, b, ldb, c, ldc, columns, add);
}

// Columns of b, `columns` of them, as lines of `width` floats: to[i, l] = from[l * step + i] for i < depth, and 0.
void transpose(const float* from, int64_t step, int64_t depth, int64_t columns, float* to, int64_t width) {
    int64_t done = 0;
#if defined(__AVX512F__)
    for (; done + W <= depth; done += W)
        for (int64_t l = 0; l < columns; l += W) {
            __m512 a[W], b[W];
            for (int k = 0; k < W; k++)
                a[k] = l + k < columns ? _mm512_loadu_ps(from + (l + k) * step + done) : _mm512_setzero_ps();
            // Pairs of lines, then of pairs, within the four quarters of a vector; then the quarters themselves.
            for (int k = 0; k < W; k += 2) {
                b[k] = _mm512_unpacklo_ps(a[k], a[k + 1]);
                b[k + 1] = _mm512_unpackhi_ps(a[k], a[k + 1]);
            }
            for (int k = 0; k < W; k += 4)
                for (int j = 0; j < 2; j++) {
                    const __m512d x = _mm512_castps_pd(b[k + j]), y = _mm512_castps_pd(b[k + j + 2]);
                    a[k + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                    a[k + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
                }
            for (int j = 0; j < 4; j++) {
                const __m512 x = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
                const __m512 y = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
                const __m512 z = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
                const __m512 w = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
                float* line = to + (done + j) * width + l;
                _mm512_storeu_ps(line, _mm512_shuffle_f32x4(x, z, 0x88));
                _mm512_storeu_ps(line + 4 * width, _mm512_shuffle_f32x4(y, w, 0x88));
                _mm512_storeu_ps(line + 8 * width, _mm512_shuffle_f32x4(x, z, 0xdd));
                _mm512_storeu_ps(line + 12 * width, _mm512_shuffle_f32x4(y, w, 0xdd));
            }
        }
#endif
    for (int64_t l = 0; l < width; l++)
        for (int64_t i = done; i < depth; i++) to[i * width + l] = l < columns ? from[l * step + i] : 0;
}

// c [M, N] = a [M, K] b [K, N], or added to c; `panel` is room for KC * NR floats. Every element is summed in the order
// of K, wherever it lies in memory: so a matrix's product is the same to the bit in any batch.
void multiply(int64_t M, int64_t N, int64_t K, View a, View b, float* c, int64_t ldc, float* panel, bool add = false) {
    for (int64_t i = 0; i < M && K == 0 && !add; i++) memset(c + i * ldc, 0, 4 * N);
    for (int64_t j = 0; j < N; j += NR) {
        const int64_t columns = N - j < NR ? N - j : NR, width = columns <= W ? W : NR;
        for (int64_t k = 0; k < K; k += KC) {
            const int64_t depth = K - k < KC ? K - k : KC;
            const float* from = b.at + k * b.row + j * b.column;
            const float* lines = from;
            int64_t ldb = b.row;
            // Lines far apart would meet in few sets of the cache; short ones must not be read beyond their end.
            if (b.column != 1 || columns < width || b.row > 256) {
                if (b.column != 1)
                    transpose(from, b.column, depth, columns, panel, width);
                else
                    for (int64_t i = 0; i < depth; i++)
                        for (int64_t l = 0; l < width; l += W)
                            store(panel + i * width + l, load_some(from + i * b.row + l, columns - l));
                lines = panel, ldb = width;
            }
            for (int64_t i = 0; i < M; i += MR) {
                const int64_t rows = M - i < MR ? M - i : MR;
                const View part = {a.at + i * a.row + k * a.column, a.row, a.column};
                if (width == W)
                    multiply_rows<MR, 1>(rows, depth, part, lines, ldb, c + i * ldc + j, ldc, columns, add || k > 0);
                else
                    multiply_rows<MR, NV>(rows, depth, part, lines, ldb, c + i * ldc + j, ldc, columns, add || k > 0);
            }
        }
    }
}

// Numbers below 1e-38 count as 0 meanwhile: they mean nothing here, and take a processor ten times as long.
struct FlushToZero {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    FlushToZero() { _mm_setcsr(before | 0x8040); }
    ~FlushToZero() { _mm_setcsr(before); }
#endif
};

}  // namespace
