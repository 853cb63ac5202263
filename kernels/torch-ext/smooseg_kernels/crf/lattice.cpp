// Mean-field inference of a dense CRF on a permutohedral lattice, for the CPU, behind a C interface.
//
// The classes of a pixel are stored in blocks of 8, 16 or 32, half a cache line to two. Every sum has a fixed order and
// every row has one writer, so the result does not depend on the number of threads.

#include "lattice.hpp"
#include "plane.hpp"

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // floats in a vector register
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int TURNED = 16;     // pixels whose classes are turned from planes to rows together
constexpr int STRIP = 4;       // pixels of a line whose messages are summed before their softmax

// Gathers a row from each of the rows [begin,end) of a list.
template <typename R>
R weighted_sum(const float* base, const int32_t* rows, const float* weights, int64_t begin, int64_t end, int64_t last) {
    R sum = {};
    for (int64_t e = begin; e < end; ++e) {
        R::prefetch(base, rows[std::min(e + AHEAD, last)]);
        sum.add(weights[e], R::at(base, rows[e]));
    }
    return sum;
}

// Sums values [end-begin,row] of points into lattice points [M,row], in the order of the gather of several threads.
// Lattice points are numbered in the order in which they first come, so the next new number starts a sum. Returns it.
template <typename R>
int32_t scatter(const Lattice& lattice, int64_t begin, int64_t end, int32_t reached, const float* values, float* sums) {
    for (int64_t n = begin; n < end; ++n) {
        const R row = R::at(values, n - begin);
        const int32_t* vertices = &lattice.vertices[n * AXES];
        const float* weights = &lattice.weights[n * AXES];
        for (int i = 0; i < AXES; ++i) {
            R::prefetch(sums, vertices[i + PADDING]);
            R sum = R::at(sums, vertices[i]);
            const bool first = vertices[i] == reached;
            sum.clear_if(first);
            reached += first;
            sum.add(weights[i], row);
            R::at(sums, vertices[i]) = sum;
        }
    }
    return reached;
}

// Adds the sums under old numbers of a lattice point to the one under its last.
template <typename R>
void merge(const Lattice& lattice, float* sums) {
    for (const auto& [old, renewed] : lattice.renewed) R::at(sums, renewed).add(1.0f, R::at(sums, old));
}

// Copies the blurred sum to the old numbers, under which points read it.
template <typename R>
void spread(const Lattice& lattice, float* blurred) {
    for (auto pair = lattice.renewed.rbegin(); pair != lattice.renewed.rend(); ++pair)
        R::at(blurred, pair->first) = R::at(blurred, pair->second);
}

// Sums values [N,row] into lattice points [M,row].
template <typename R>
void gather(const Worker& worker, const Lattice& lattice, const float* values, float* sums) {
    worker.loop(lattice.M, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
            R::at(sums, m) = weighted_sum<R>(values, lattice.rows.get(), lattice.row_weights.get(), lattice.starts[m],
                                             lattice.starts[m + 1], lattice.N * AXES - 1);
    });
}

// Blurs lattice points [M,row] in place: a + 2 b + c along every axis, halved.
template <typename R>
void blur(const Worker& worker, const Lattice& lattice, float* blurred) {
    worker.alone([&] { merge<R>(lattice, blurred); });
    for (int axis = 0; axis <= D; ++axis) {
        const int32_t* const chain = &lattice.chains[axis * lattice.M];
        worker.loop(lattice.lengths[axis], [&](int64_t begin, int64_t end) {
            const int64_t last = lattice.lengths[axis] - 1;
            while (begin > 0 && begin < end && chain[begin - 1] >= 0) ++begin;  // a chain is its first worker's
            while (end <= last && begin < end && chain[end - 1] >= 0) ++end;
            if (begin == end) return;
            const auto number = [](int32_t m) { return m ^ (m >> 31); };
            // weights of 0 in place of jumps at the ends of chains, which are short and cannot be foreseen
            constexpr float halves[2] = {0.5f, 0.0f};
            R before = {}, here = R::at(blurred, number(chain[begin]));
            float before_weight = 0;
            for (int64_t i = begin; i < end; ++i) {
                R::prefetch(blurred, number(chain[std::min(i + AHEAD, last)]));
                const float next_weight = halves[uint32_t(chain[i]) >> 31];
                const R next = R::at(blurred, number(chain[std::min(i + 1, end - 1)]));
                R sum = here;
                sum.add(before_weight, before);
                sum.add(next_weight, next);
                R::at(blurred, number(chain[i])) = sum;
                before = here, here = next, before_weight = next_weight;
            }
        });
    }
    worker.alone([&] { spread<R>(lattice, blurred); });
}

template <typename R>
R slice(const Lattice& lattice, int64_t n, const float* blurred) {
    const int32_t* vertices = &lattice.vertices[n * AXES];
    const float* weights = &lattice.weights[n * AXES];
    R sum = {};
    for (int i = 0; i < AXES; ++i) {
        R::prefetch(blurred, vertices[i + PADDING]);
        sum.add(weights[i], R::at(blurred, vertices[i]));
    }
    return sum;
}

// exp for arguments to LARGE, as which larger ones count; below -50 it is 0, so that no product with it is subnormal.
constexpr float LARGE = 60, LARGE_SUM = 1e26f;  // its exponential is 1.14e26
template <typename T, int width = sizeof(T) / sizeof(float)>
inline T exponential(T x) {
    using Integers = typename Numbers<width>::Integers;
    const Integers kept = x > -50.0f;
    x = kept ? x : T{} - 50.0f;
    x = x < LARGE ? x : T{} + LARGE;
    const T n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
    const T r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    T p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return (T)((Integers)(p * (T)power) & kept);
}

// x with the numbers exchanged whose places differ in `step`.
template <int step, typename T, int... places>
T exchanged(T x, std::integer_sequence<int, places...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, x, (places ^ step)...);
#else
    return __builtin_shuffle(x, typename Numbers<sizeof...(places)>::Integers{(places ^ step)...});
#endif
}

// Takes every `group` numbers of x to their sum or whatever two(a, b) of two vectors is.
template <int group, typename T, typename Two>
T reduced(T x, const Two& two) {
    constexpr std::make_integer_sequence<int, sizeof(T) / sizeof(float)> places{};
    if constexpr (group > 8) x = two(x, exchanged<8>(x, places));
    if constexpr (group > 4) x = two(x, exchanged<4>(x, places));
    x = two(x, exchanged<2>(x, places));
    return two(x, exchanged<1>(x, places));
}

// Softmax over blocks of R vectors, in place; blocks are `stride` floats apart. A vector has numbers of one pixel, or
// of pixels with `group` numbers each.
template <typename T, int R, int group = sizeof(T) / sizeof(float)>
void softmax(float* x, int64_t blocks, int64_t stride) {
    using Block = Row<T, R>;
    T top = Block::at(x, 0).part[0], sum = {};
    for (int64_t b = 0; b < blocks; ++b)
        for (int r = 0; r < R; ++r) {
            const T other = Block::at(x + b * stride, 0).part[r];
            top = top > other ? top : other;
        }
    top = reduced<group>(top, [](T a, T b) { return a > b ? a : b; });
    for (int64_t b = 0; b < blocks; ++b)
        for (int r = 0; r < R; ++r) {
            T& part = Block::at(x + b * stride, 0).part[r];
            part = exponential(part - top);
            sum += part;
        }
    const T scale = 1.0f / reduced<group>(sum, [](T a, T b) { return a + b; });
    for (int64_t b = 0; b < blocks; ++b)
        for (int r = 0; r < R; ++r) Block::at(x + b * stride, 0).part[r] *= scale;
}

// The same for one block whose largest number is log 1e-5 or more. That number is found only where sums are large.
template <typename T, int R, int group = sizeof(T) / sizeof(float)>
void softmax_of_block(float* x) {
    Row<T, R> row = Row<T, R>::at(x, 0);
    T sum = {};
    for (T& part : row.part) sum += part = exponential(part);
    sum = reduced<group>(sum, [](T a, T b) { return a + b; });
    for (size_t i = 0; i < sizeof(T) / sizeof(float); i += group)
        if (!(sum[i] < LARGE_SUM)) return softmax<T, R, group>(x, 1, 0);
    const T scale = 1.0f / sum;
    for (T& part : row.part) part *= scale;
    Row<T, R>::at(x, 0) = row;
}

// Softmax of pixels [begin,end) of x [blocks,N,row], in place.
template <typename R>
void softmax_of(float* x, int64_t begin, int64_t end, int64_t blocks, int64_t N) {
    using T = std::remove_reference_t<decltype(R::at(x, 0).part[0])>;
    int64_t n = begin;
    const auto alone = [&] {
        float* const pixel = x + n++ * R::FLOATS;
        if (blocks == 1) softmax_of_block<T, R::PARTS>(pixel);
        else softmax<T, R::PARTS>(pixel, blocks, N * R::FLOATS);
    };
    if constexpr (R::FLOATS < WIDTH) {  // several pixels fill a vector, and there is one block
        constexpr int pixels = WIDTH / R::FLOATS;
        while (n < end && n % pixels) alone();
        for (; n + pixels <= end; n += pixels)
            softmax_of_block<typename Numbers<WIDTH>::Vector, 1, R::FLOATS>(x + n * R::FLOATS);
    }
    while (n < end) alone();
}

struct Problem {
    const float* scores;   // [K,N]
    float* probabilities;  // [K,N] out
    int64_t H, W, K, blocks, iterations;
    float spatial_weight, color_weight;
    bool alone;  // one thread was asked for
    Lattice lattice;
    Plane plane;
};

// One line of all messages and of the softmax, into q [blocks,N,row].
template <typename R>
void update_line(const Problem& p, int64_t y, const Walk<R>& walk, const float* blurred, const float* scores,
                 float* q) {
    const int64_t N = p.H * p.W, M = p.lattice.M;
    for (int64_t start = y * p.W, end = start + p.W; start < end; start += STRIP) {
        const int64_t stop = std::min(end, start + STRIP);
        for (int64_t b = 0; b < p.blocks; ++b) {
            typename Walk<R>::Lines lines;
            if (p.spatial_weight > 0) lines = walk.lines(y, b);
            for (int64_t n = start; n < stop; ++n) {
                R total = R::at(scores, b * N + n);
                if (p.spatial_weight > 0) total.add(p.spatial_weight, walk.at(lines, n));
                if (p.color_weight > 0) total.add(p.color_weight, slice<R>(p.lattice, n, blurred + b * M * R::FLOATS));
                R::at(q, b * N + n) = total;
            }
        }
        softmax_of<R>(q, start, stop, p.blocks, N);
    }
}

// Several threads write q to another array than they read. One writes in place, and sums its next lattice meanwhile.
template <typename R>
void iterate(const Worker& worker, const Problem& p, const float* scores, Array<float>* all_q, Array<float>* all_sums) {
    const int64_t N = p.H * p.W, size = N * R::FLOATS, points = p.lattice.M * R::FLOATS;
    const bool spatial = p.spatial_weight > 0, color = p.color_weight > 0;
    Walk<R> walk(p.plane, spatial ? p.blocks : 0, p.H, p.W);
    float *q = all_q[0].get(), *next_q = p.alone ? q : all_q[1].get();
    float *sums = all_sums[0].get(), *next_sums = all_sums[1].get();
    for (int64_t i = 0; i < p.iterations; ++i) {
        for (int64_t b = 0; color && b < p.blocks; ++b) {
            if (!p.alone) gather<R>(worker, p.lattice, q + b * size, sums + b * points);
            else if (i == 0) scatter<R>(p.lattice, 0, N, 0, q + b * size, sums + b * points);
            blur<R>(worker, p.lattice, sums + b * points);
        }
        worker.loop(p.H, [&](int64_t begin, int64_t end) {
            int32_t reached = 0;
            if (spatial && begin < end) walk.start(begin, q);
            for (int64_t y = begin; y < end; ++y) {
                if (spatial) walk.advance(y);
                update_line<R>(p, y, walk, sums, scores, next_q);
                if (!p.alone || !color || i + 1 == p.iterations) continue;
                const int64_t first = y * p.W;
                const int32_t before = reached;
                for (int64_t b = 0; b < p.blocks; ++b)
                    reached = scatter<R>(p.lattice, first, first + p.W, before, q + b * size + first * R::FLOATS,
                                         next_sums + b * points);
            }
        });
        std::swap(q, next_q);
        if (p.alone) std::swap(sums, next_sums);
    }
    worker.loop(N, [&](int64_t begin, int64_t end) {
        for (int64_t start = begin; start < end; start += TURNED)
            for (int64_t k = 0; k < p.K; ++k)
                for (int64_t n = start; n < std::min(end, start + TURNED); ++n)
                    p.probabilities[k * N + n] = q[(k / R::FLOATS * N + n) * R::FLOATS + k % R::FLOATS];
    });
}

template <typename R>
void infer(Problem& p, int threads) {
    constexpr int L = R::FLOATS;
    const int64_t N = p.H * p.W, size = (p.blocks = (p.K + L - 1) / L) * N * L, points = p.blocks * p.lattice.M * L;
    Array<float> scores(size), q[2] = {Array<float>(size), Array<float>(p.alone ? 0 : size)};
    Array<float> sums[2] = {Array<float>(points), Array<float>(p.alone ? points : 0)};
    with_team(threads, [&](const Worker& worker) {
        worker.loop(N, [&](int64_t begin, int64_t end) {
            for (int64_t start = begin; start < end; start += TURNED) {
                const int64_t stop = std::min(end, start + TURNED);
                for (int64_t k = 0; k < p.blocks * L; ++k)
                    for (int64_t n = start; n < stop; ++n) {
                        const int64_t place = (k / L * N + n) * L + k % L;
                        scores[place] = q[0][place] = k < p.K ? p.scores[k * N + n] : -1e30f;
                    }
                softmax_of<R>(q[0].get(), start, stop, p.blocks, N);
            }
        });
        iterate<R>(worker, p, scores.get(), q, sums);
    });
}

Lattice build_lattice(const uint8_t* image, int64_t H, int64_t W, double sigma, double color_sigma, bool gathers) {
    const int64_t N = H * W;
    int64_t known = 0, row = 0, column = 0;  // of the pixel `known`, as pixels come in order
    const auto points = [&](int64_t start, Lanes* place) {
        if (start < known) known = row = column = 0;
        for (; known < start; ++known)
            if (++column == W) column = 0, ++row;
        int64_t y = row, x = column;
        for (int l = 0; l < LANES; ++l) {
            const int64_t n = std::min(start + l, N - 1);
            place[0][l] = x / sigma;
            place[1][l] = y / sigma;
            for (int c = 0; c < 3; ++c) place[2 + c][l] = image[3 * n + c] / color_sigma;
            if (n < N - 1 && ++x == W) x = 0, ++y;
        }
    };
    return build(points, N, gathers);
}

// Folds n_i, computed in fp64, into the lattice.
void normalise(Lattice& lattice) {
    using One = Row<double, 1>;
    Array<double> norms(lattice.N), sums(lattice.M);
    std::fill(norms.get(), norms.get() + lattice.N, 1.0);
    std::fill(sums.get(), sums.get() + lattice.M, 0.0);
    Barrier barrier(1);
    float* const blurred = reinterpret_cast<float*>(sums.get());
    scatter<One>(lattice, 0, lattice.N, 0, reinterpret_cast<float*>(norms.get()), blurred);
    blur<One>(Worker{0, 1, &barrier}, lattice, blurred);
    for (int64_t n = 0; n < lattice.N; ++n) norms[n] = 1 / std::sqrt(slice<One>(lattice, n, blurred).part[0]);
    for (int64_t n = 0; n < lattice.N; ++n)
        for (int i = 0; i < AXES; ++i) lattice.weights[n * AXES + i] = float(lattice.weights[n * AXES + i] * norms[n]);
    if (lattice.gathers)
        for (int64_t e = 0; e < lattice.N * AXES; ++e)
            lattice.row_weights[e] = float(lattice.row_weights[e] * norms[lattice.rows[e]]);
}

}  // namespace

// Takes scores [K,H,W] and a picture [H,W,3] to probabilities [K,H,W], which may lie where the scores do. Returns 0; or
// 1 without enough memory; or 2 where the points reach too far, or are too many, for the keys.
extern "C" int smooseg_mean_field(const float* scores, const uint8_t* image, int64_t H, int64_t W, int64_t K,
                                  double sigma, double spatial_weight, double far_sigma, double color_sigma,
                                  double color_weight, int64_t iterations, int64_t threads, float* probabilities) {
    try {
        Problem p;
        p.scores = scores, p.probabilities = probabilities, p.H = H, p.W = W, p.K = K;
        p.iterations = iterations, p.alone = threads == 1;
        p.spatial_weight = float(spatial_weight), p.color_weight = float(color_weight);
        if (spatial_weight > 0) {
            p.plane = build_plane(H, W, sigma);
            normalise(p.plane, H, W);
        }
        if (color_weight > 0) {
            p.lattice = build_lattice(image, H, W, far_sigma, color_sigma, threads > 1);
            normalise(p.lattice);
        }
        using Vector = Numbers<WIDTH>::Vector;
        constexpr int HALF = WIDTH < 8 ? WIDTH : 8;  // a row of 8
        if (K <= 8) infer<Row<Numbers<HALF>::Vector, 8 / HALF>>(p, int(threads));
        else if (K % 32 == 0 || K % 32 > 16) infer<Row<Vector, 32 / WIDTH>>(p, int(threads));
        else infer<Row<Vector, 16 / WIDTH>>(p, int(threads));
        return 0;
    } catch (const std::range_error&) {
        return 2;
    } catch (...) {
        return 1;
    }
}
