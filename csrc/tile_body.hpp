// The one body of all tile kernels. tiles.cpp includes it once for each instruction set: inside that set's namespace,
// where `Isa` says what a vector is and how it multiplies, and with the set's code generation switched on, which a
// template parameter cannot do. Hence no #pragma once.

template <int NV, int NL>
uint32_t tile(const Tile& t) {
    constexpr int W = Isa::kLanes;
    Isa::Vector sum[NL][NV] = {};
    const uint32_t *x = t.x, *w = t.w;
    for (int64_t done = 0; done < t.depth; done += kBlock) {
        Isa::Vector part[NL][NV] = {};
        for (int64_t d = std::min(kBlock, t.depth - done); d > 0; --d, x += W * NV, w += NL) {
            Isa::Vector xs[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) std::memcpy(&xs[v], x + W * v, sizeof xs[v]);
#pragma GCC unroll 16
            for (int i = 0; i < NL; ++i) {
                const Isa::Vector weight = Isa::all(from_bits(w[i]));
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) part[i][v] = Isa::multiply_add(weight, xs[v], part[i][v]);
            }
        }
        for (int i = 0; i < NL; ++i)
            for (int v = 0; v < NV; ++v) sum[i][v] += part[i][v];
    }
    uint32_t hits = 0;
    for (int i = 0; i < NL; ++i)
        for (int v = 0; v < NV; ++v) {
            sum[i][v] += Isa::all(t.bias[i]);
            Isa::Vector bound = {};
            if (t.latent_bound != nullptr)
                bound = Isa::all(t.latent_bound[i]);
            else
                std::memcpy(&bound, t.row_bound + W * v, sizeof bound);
            hits |= Isa::beats(sum[i][v] * Isa::all(t.scale[i]), bound) << (W * v);
        }
    if (hits != 0) std::memcpy(t.pre, sum, sizeof sum);
    return hits;
}
