// Mean-field inference of a dense CRF on a permutohedral lattice, for the CPU, behind a C interface.
//
// The classes of a pixel are stored in blocks of 16 or 32, one or two cache lines. Every sum has a fixed order and
// every row has one writer, so the result does not depend on the number of threads.

#include "lattice.hpp"
#include "plane.hpp"

namespace {

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
            R sum = {};
            if (vertices[i] == reached) ++reached;
            else sum = R::at(sums, vertices[i]);
            sum.add(weights[i], row);
            R::at(sums, vertices[i]) = sum;
        }
    }
    return reached;
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
    for (const std::vector<int32_t>& chain : lattice.chains)
        worker.loop(chain.size(), [&](int64_t begin, int64_t end) {
            const int64_t last = int64_t(chain.size()) - 1;
            while (begin > 0 && begin < end && chain[begin - 1] >= 0) ++begin;  // a chain is its first worker's
            while (end <= last && begin < end && chain[end - 1] >= 0) ++end;
            R before = {};
            for (int64_t i = begin; i < end; ++i) {
                const bool ends = chain[i] < 0;
                const int32_t ahead = chain[std::min(i + AHEAD, last)];
                R::prefetch(blurred, ahead < 0 ? ~ahead : ahead);
                R& row = R::at(blurred, ends ? ~chain[i] : chain[i]);
                const R here = row;
                row.add(0.5f, before);
                if (ends) {
                    before = R{};
                } else {
                    row.add(0.5f, R::at(blurred, chain[i + 1] < 0 ? ~chain[i + 1] : chain[i + 1]));
                    before = here;
                }
            }
        });
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

// exp for arguments to 0; below -50 it is 0, so that no product with it is subnormal.
inline Vector exponential(Vector x) {
    const Integers kept = x > -50.0f;
    x = kept ? x : Vector{} - 50.0f;
    const Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
    const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return (Vector)((Integers)(p * (Vector)power) & kept);
}

template <typename Two>
float reduced(Vector x, const Two& two) {
    typedef float Quad __attribute__((vector_size(16)));
    Quad quads[WIDTH / 4];
    std::memcpy(quads, &x, sizeof x);
    for (int i = 1; i < WIDTH / 4; ++i) quads[0] = two(quads[0], quads[i]);
    return two(two(quads[0][0], quads[0][1]), two(quads[0][2], quads[0][3]));
}

// Softmax over the blocks of a pixel, in place; blocks are `stride` floats apart.
template <typename R>
void softmax(float* x, int64_t blocks, int64_t stride) {
    constexpr int PARTS = R::FLOATS / WIDTH;
    Vector top = R::at(x, 0).part[0], sum = {};
    for (int64_t b = 0; b < blocks; ++b)
        for (int r = 0; r < PARTS; ++r) {
            const Vector other = R::at(x + b * stride, 0).part[r];
            top = top > other ? top : other;
        }
    const float highest = reduced(top, [](auto a, auto b) { return a > b ? a : b; });
    for (int64_t b = 0; b < blocks; ++b)
        for (int r = 0; r < PARTS; ++r) {
            Vector& part = R::at(x + b * stride, 0).part[r];
            part = exponential(part - highest);
            sum += part;
        }
    const float scale = 1.0f / reduced(sum, [](auto a, auto b) { return a + b; });
    for (int64_t b = 0; b < blocks; ++b)
        for (int r = 0; r < PARTS; ++r) R::at(x + b * stride, 0).part[r] *= scale;
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
        for (int64_t n = start; n < stop; ++n) softmax<R>(&R::at(q, n).part[0][0], p.blocks, N * R::FLOATS);
    }
}

// Several threads write q to another array than they read. One writes in place, and sums its next lattice meanwhile.
template <typename R>
void iterate(const Worker& worker, const Problem& p, const float* scores, Array<float>* all_q, Array<float>* all_sums) {
    const int64_t N = p.H * p.W, size = N * R::FLOATS, points = p.lattice.M * R::FLOATS;
    const bool spatial = p.spatial_weight > 0, color = p.color_weight > 0;
    Walk<R> walk(p.plane, spatial ? p.blocks : 0, N);
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
                for (int64_t n = start; n < stop; ++n) softmax<R>(&q[0][n * L], p.blocks, N * L);
            }
        });
        iterate<R>(worker, p, scores.get(), q, sums);
    });
}

Lattice build_lattice(const uint8_t* image, int64_t H, int64_t W, double sigma, double color_sigma, bool gathers) {
    Array<double> points[D];
    for (auto& coordinates : points) coordinates = Array<double>(H * W + LANES);
    for (int64_t i = 0; i < H * W + LANES; ++i) {
        const int64_t n = std::min(i, H * W - 1);
        points[0][i] = (n % W) / sigma;
        points[1][i] = (n / W) / sigma;
        for (int c = 0; c < 3; ++c) points[2 + c][i] = image[3 * n + c] / color_sigma;
    }
    return build(points, H * W, gathers);
}

// Folds n_i into the lattice.
void normalise(Lattice& lattice) {
    using One = Row<float, 1>;
    Array<float> norm(lattice.N), blurred(lattice.M);
    std::fill(norm.get(), norm.get() + lattice.N, 1.0f);
    Barrier barrier(1);
    scatter<One>(lattice, 0, lattice.N, 0, norm.get(), blurred.get());
    blur<One>(Worker{0, 1, &barrier}, lattice, blurred.get());
    for (int64_t n = 0; n < lattice.N; ++n) norm[n] = 1 / std::sqrt(slice<One>(lattice, n, blurred.get()).part[0]);
    for (int64_t n = 0; n < lattice.N; ++n)
        for (int i = 0; i < AXES; ++i) lattice.weights[n * AXES + i] *= norm[n];
    if (lattice.gathers)
        for (int64_t e = 0; e < lattice.N * AXES; ++e) lattice.row_weights[e] *= norm[lattice.rows[e]];
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
        if (K % 32 == 0 || K % 32 > 16) infer<Row<Vector, 32 / WIDTH>>(p, int(threads));
        else infer<Row<Vector, 16 / WIDTH>>(p, int(threads));
        return 0;
    } catch (const std::range_error&) {
        return 2;
    } catch (...) {
        return 1;
    }
}
