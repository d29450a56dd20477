#include "tiles.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "floats.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#define SAEFAST_X86 1
#include <immintrin.h>
#else
#define SAEFAST_X86 0
#endif

namespace saefast {
namespace {

// Sums run along `depth` in blocks of this many units, added up in order: fixed, so that a value does not depend on
// the batch it came in, and short, so that rounding errors grow with the square root of D / 256, not of D.
constexpr int64_t kBlock = 256;

#if SAEFAST_X86

#if !defined(__clang__)
// GCC's own AVX-512 headers set off these warnings.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

template <int NV, int NL>
__attribute__((target("avx512f"))) uint32_t finish_avx512(const Tile& t, __m512 (&sum)[NL][NV]) {
    uint32_t hits = 0;
    for (int i = 0; i < NL; ++i) {
        const __m512 bias = _mm512_set1_ps(t.bias[i]), scale = _mm512_set1_ps(t.scale[i]);
        for (int v = 0; v < NV; ++v) {
            sum[i][v] = _mm512_add_ps(sum[i][v], bias);
            const __m512 bound =
                t.latent_bound ? _mm512_set1_ps(t.latent_bound[i]) : _mm512_loadu_ps(t.row_bound + 16 * v);
            const __m512 rank = _mm512_mul_ps(sum[i][v], scale);
            hits |= static_cast<uint32_t>(_mm512_cmp_ps_mask(rank, bound, _CMP_NLE_UQ)) << (16 * v);
        }
    }
    if (hits != 0)
        for (int i = 0; i < NL; ++i)
            for (int v = 0; v < NV; ++v) _mm512_storeu_ps(t.pre + i * 16 * NV + 16 * v, sum[i][v]);
    return hits;
}

template <int NV, int NL>
__attribute__((target("avx512f"))) uint32_t tile_avx512(const Tile& t) {
    __m512 sum[NL][NV] = {};
    const uint32_t *x = t.x, *w = t.w;
    for (int64_t done = 0; done < t.depth; done += kBlock) {
        __m512 part[NL][NV] = {};
        for (int64_t d = std::min(kBlock, t.depth - done); d > 0; --d, x += 16 * NV, w += NL) {
            __m512 xs[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) xs[v] = _mm512_castsi512_ps(_mm512_loadu_si512(x + 16 * v));
#pragma GCC unroll 16
            for (int i = 0; i < NL; ++i) {
                const __m512 weight = _mm512_set1_ps(from_bits(w[i]));
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) part[i][v] = _mm512_fmadd_ps(weight, xs[v], part[i][v]);
            }
        }
        for (int i = 0; i < NL; ++i)
            for (int v = 0; v < NV; ++v) sum[i][v] = _mm512_add_ps(sum[i][v], part[i][v]);
    }
    return finish_avx512<NV, NL>(t, sum);
}

template <int NV, int NL>
__attribute__((target("avx512f,avx512bf16"))) uint32_t tile_avx512_bf16(const Tile& t) {
    __m512 sum[NL][NV] = {};
    const uint32_t *x = t.x, *w = t.w;
    for (int64_t done = 0; done < t.depth; done += kBlock) {
        __m512 part[NL][NV] = {};
        for (int64_t d = std::min(kBlock, t.depth - done); d > 0; --d, x += 16 * NV, w += NL) {
            __m512bh xs[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) xs[v] = (__m512bh)_mm512_loadu_si512(x + 16 * v);
#pragma GCC unroll 16
            for (int i = 0; i < NL; ++i) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(w[i]));
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) part[i][v] = _mm512_dpbf16_ps(part[i][v], weight, xs[v]);
            }
        }
        for (int i = 0; i < NL; ++i)
            for (int v = 0; v < NV; ++v) sum[i][v] = _mm512_add_ps(sum[i][v], part[i][v]);
    }
    return finish_avx512<NV, NL>(t, sum);
}

template <int NV, int NL>
__attribute__((target("avx2,fma"))) uint32_t tile_avx2(const Tile& t) {
    __m256 sum[NL][NV] = {};
    const uint32_t *x = t.x, *w = t.w;
    for (int64_t done = 0; done < t.depth; done += kBlock) {
        __m256 part[NL][NV] = {};
        for (int64_t d = std::min(kBlock, t.depth - done); d > 0; --d, x += 8 * NV, w += NL) {
            __m256 xs[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                xs[v] = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * v)));
#pragma GCC unroll 16
            for (int i = 0; i < NL; ++i) {
                const __m256 weight = _mm256_set1_ps(from_bits(w[i]));
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) part[i][v] = _mm256_fmadd_ps(weight, xs[v], part[i][v]);
            }
        }
        for (int i = 0; i < NL; ++i)
            for (int v = 0; v < NV; ++v) sum[i][v] = _mm256_add_ps(sum[i][v], part[i][v]);
    }
    uint32_t hits = 0;
    for (int i = 0; i < NL; ++i) {
        const __m256 bias = _mm256_broadcast_ss(t.bias + i), scale = _mm256_broadcast_ss(t.scale + i);
        for (int v = 0; v < NV; ++v) {
            sum[i][v] = _mm256_add_ps(sum[i][v], bias);
            const __m256 bound =
                t.latent_bound ? _mm256_broadcast_ss(t.latent_bound + i) : _mm256_loadu_ps(t.row_bound + 8 * v);
            const __m256 beats = _mm256_cmp_ps(_mm256_mul_ps(sum[i][v], scale), bound, _CMP_NLE_UQ);
            hits |= static_cast<uint32_t>(_mm256_movemask_ps(beats)) << (8 * v);
            _mm256_storeu_ps(t.pre + i * 8 * NV + 8 * v, sum[i][v]);
        }
    }
    return hits;
}

#endif

// Any other machine: four lanes through the compiler's own vectors (NEON, SSE2).
using Lanes = float __attribute__((vector_size(16)));

template <int NV, int NL>
uint32_t tile_portable(const Tile& t) {
    Lanes sum[NL][NV] = {};
    const uint32_t *x = t.x, *w = t.w;
    for (int64_t done = 0; done < t.depth; done += kBlock) {
        Lanes part[NL][NV] = {};
        for (int64_t d = std::min(kBlock, t.depth - done); d > 0; --d, x += 4 * NV, w += NL) {
            Lanes xs[NV];
            float ws[NL];
            std::memcpy(xs, x, sizeof xs);
            std::memcpy(ws, w, sizeof ws);
            for (int i = 0; i < NL; ++i)
                for (int v = 0; v < NV; ++v) part[i][v] += ws[i] * xs[v];
        }
        for (int i = 0; i < NL; ++i)
            for (int v = 0; v < NV; ++v) sum[i][v] += part[i][v];
    }
    uint32_t hits = 0;
    for (int i = 0; i < NL; ++i)
        for (int r = 0; r < 4 * NV; ++r) {
            const float pre = sum[i][r / 4][r % 4] + t.bias[i];
            const float bound = t.latent_bound ? t.latent_bound[i] : t.row_bound[r];
            t.pre[i * 4 * NV + r] = pre;
            hits |= static_cast<uint32_t>(!(pre * t.scale[i] <= bound)) << r;
        }
    return hits;
}

bool always() { return true; }
#if SAEFAST_X86
bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// One instruction set. The narrow tile is for batches that would leave most lanes of the wide one empty.
struct InstructionSet {
    const char* name;
    bool (*runs_here)();
    TileKernel wide, narrow;
};

const InstructionSet kSets[] = {  // the best first
#if SAEFAST_X86
    {"avx512_bf16", has_avx512_bf16, {32, 12, true, tile_avx512_bf16<2, 12>}, {16, 12, true, tile_avx512_bf16<1, 12>}},
    {"avx512", has_avx512, {32, 12, false, tile_avx512<2, 12>}, {16, 12, false, tile_avx512<1, 12>}},
    {"avx2", has_avx2, {24, 4, false, tile_avx2<3, 4>}, {8, 12, false, tile_avx2<1, 12>}},
#endif
    {"portable", always, {8, 8, false, tile_portable<2, 8>}, {4, 8, false, tile_portable<1, 8>}},
};

}  // namespace

std::vector<std::string> tile_kernel_names(bool bf16) {
    std::vector<std::string> names;
    for (const InstructionSet& set : kSets)
        if (set.runs_here() && (bf16 || !set.wide.pairs)) names.emplace_back(set.name);
    return names;
}

const TileKernel& pick_tile_kernel(bool bf16, int64_t n_rows, const char* name) {
    for (const InstructionSet& set : kSets) {
        const bool asked_for = name == nullptr || std::strcmp(name, set.name) == 0;
        if (asked_for && set.runs_here() && (bf16 || !set.wide.pairs))
            return n_rows <= set.narrow.rows ? set.narrow : set.wide;
    }
    throw std::invalid_argument(std::string("no tile kernel '") + name + "' for this machine and dtype");
}

}  // namespace saefast
