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

// Code of an instruction set, whatever the compiler was told to build for.
#define SAEFAST_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define SAEFAST_BEGIN(features) \
    SAEFAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SAEFAST_END SAEFAST_PRAGMA(clang attribute pop)
#else
#define SAEFAST_BEGIN(features) SAEFAST_PRAGMA(GCC push_options) SAEFAST_PRAGMA(GCC target(features))
#define SAEFAST_END SAEFAST_PRAGMA(GCC pop_options)
#endif

#if SAEFAST_X86

#if !defined(__clang__)
// GCC's own AVX-512 headers set off these warnings.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

SAEFAST_BEGIN("avx512f,avx512bf16")
namespace avx512_bf16 {
struct Isa {
    using Vector = __m512;
    static constexpr int kLanes = 16;
    static Vector all(float value) { return _mm512_set1_ps(value); }
    static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static uint32_t beats(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
};
#include "tile_body.hpp"
}  // namespace avx512_bf16
SAEFAST_END

SAEFAST_BEGIN("avx512f")
namespace avx512 {
struct Isa {
    using Vector = __m512;
    static constexpr int kLanes = 16;
    static Vector all(float value) { return _mm512_set1_ps(value); }
    static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
    static uint32_t beats(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
};
#include "tile_body.hpp"
}  // namespace avx512
SAEFAST_END

SAEFAST_BEGIN("avx2,fma")
namespace avx2 {
struct Isa {
    using Vector = __m256;
    static constexpr int kLanes = 8;
    static Vector all(float value) { return _mm256_set1_ps(value); }
    static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
    static uint32_t beats(Vector a, Vector b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
    }
};
#include "tile_body.hpp"
}  // namespace avx2
SAEFAST_END

#endif

// Any other machine: four lanes through the compiler's own vectors (NEON, SSE2).
namespace portable {
struct Isa {
    using Vector = float __attribute__((vector_size(16)));
    static constexpr int kLanes = 4;
    static Vector all(float value) { return Vector{value, value, value, value}; }
    static Vector multiply_add(Vector a, Vector b, Vector sum) { return sum + a * b; }
    static uint32_t beats(Vector a, Vector b) {
        uint32_t found = 0;
        for (int lane = 0; lane < kLanes; ++lane) found |= static_cast<uint32_t>(!(a[lane] <= b[lane])) << lane;
        return found;
    }
};
#include "tile_body.hpp"
}  // namespace portable

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
    {"avx512_bf16", has_avx512_bf16, {32, 12, true, avx512_bf16::tile<2, 12>}, {16, 12, true, avx512_bf16::tile<1, 12>}},
    {"avx512", has_avx512, {32, 12, false, avx512::tile<2, 12>}, {16, 12, false, avx512::tile<1, 12>}},
    {"avx2", has_avx2, {24, 4, false, avx2::tile<3, 4>}, {8, 12, false, avx2::tile<1, 12>}},
#endif
    {"portable", always, {8, 8, false, portable::tile<2, 8>}, {4, 8, false, portable::tile<1, 8>}},
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
