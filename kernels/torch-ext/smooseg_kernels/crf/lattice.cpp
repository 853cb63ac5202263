// Mean-field inference of a dense CRF on a permutohedral lattice, for the CPU, behind a C interface.
//
// The classes of a pixel are stored in blocks of 16 or 32, one or two cache lines. Every sum is a gather in a fixed order
// and every row has one writer, so the result does not depend on the number of threads.

#include "lattice.hpp"

namespace {

// A row of a block of classes: R vectors of type T.
template <typename T, int R>
struct Row {
    T part[R];
    static constexpr int FLOATS = R * int(sizeof(T) / sizeof(float));
    static const Row& at(const float* base, int64_t i) { return *reinterpret_cast<const Row*>(base + i * FLOATS); }
    static Row& at(float* base, int64_t i) { return *reinterpret_cast<Row*>(base + i * FLOATS); }
    static void prefetch(const float* base, int64_t i) {
        for (int f = 0; f < FLOATS; f += 16) __builtin_prefetch(base + i * FLOATS + f);
    }
    void add(float weight, const Row& other) {
        for (int r = 0; r < R; ++r) part[r] += weight * other.part[r];
    }
};

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

// Sums values [N,row] into lattice points [M,row], in the order of the gather that several threads use. Lattice points are
// numbered in the order in which they first come, so the next new number starts a sum.
template <typename R>
void scatter(const Lattice& lattice, const float* values, float* sums) {
    int32_t reached = 0;
    for (int64_t n = 0; n < lattice.N; ++n) {
        const R row = R::at(values, n);
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
}

// Sums values [N,row] into lattice points [M,row], and blurs these in place: a + 2 b + c along every axis, halved.
template <typename R>
void splat_and_blur(const Worker& worker, const Lattice& lattice, const float* values, float* blurred) {
    const int64_t last = lattice.N * AXES - 1;
    if (worker.count == 1) scatter<R>(lattice, values, blurred);
    else worker.loop(lattice.M, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
            R::at(blurred, m) = weighted_sum<R>(values, lattice.rows.get(), lattice.row_weights.get(), lattice.starts[m],
                                                lattice.starts[m + 1], last);
    });
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
        R::prefetch(blurred, vertices[i + PADDING / 2]);
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

// The Gaussian of a distance on the grid, a product of one along the rows and one along the columns.
struct Grid {
    int64_t H, W, reach;
    std::vector<float> taps;          // from the middle outwards, [reach+1], and STRIP zeros
    std::vector<float> down, across;  // n_i is down[y] * across[x]
};

std::vector<float> norms(int64_t size, const std::vector<float>& taps) {
    std::vector<float> result(size);
    for (int64_t i = 0; i < size; ++i) {
        double sum = taps[0];
        for (int64_t t = 1; t < std::min<int64_t>(size, taps.size()); ++t) sum += (i >= t ? taps[t] : 0) + (i + t < size ? taps[t] : 0);
        result[i] = float(1 / std::sqrt(sum));
    }
    return result;
}

struct Problem {
    const float* scores;   // [K,N]
    float* probabilities;  // [K,N] out
    int64_t K, blocks, iterations;
    float spatial_weight, color_weight;
    Lattice lattice;
    Grid grid;
};

// The lines of q around those of one worker, summed across. Lines from `end` on belong to another worker, which overwrites
// them in q, so they keep slots of their own.
struct Ring {
    Array<float> values;  // [blocks,slots,W,row]
    int64_t lines, slots, line_size, end;
    Ring(const Problem& p, int floats)
        : lines(std::min(p.grid.H, 2 * p.grid.reach + 1)), slots(lines + p.grid.reach),
          line_size(p.grid.W * floats), end(0) {
        if (p.spatial_weight > 0) values = Array<float>(p.blocks * slots * line_size);
    }
    float* line(int64_t b, int64_t j) const {
        return values.get() + (b * slots + (j < end ? j % lines : lines + j - end)) * line_size;
    }
};

// Sums a line of values [W,row] along itself. Taps beyond the reach are 0.
template <typename R>
void sum_across(const Grid& grid, const float* from, float* to) {
    for (int64_t start = 0; start < grid.W; start += STRIP) {
        R sums[STRIP] = {};
        const int64_t last = std::min(grid.W - 1, start + STRIP - 1 + grid.reach);
        for (int64_t j = std::max<int64_t>(0, start - grid.reach); j <= last; ++j) {
            const R& row = R::at(from, j);
            for (int i = 0; i < STRIP; ++i) sums[i].add(grid.taps[std::abs(j - start - i)] * grid.across[j], row);
        }
        for (int i = 0; i < STRIP && start + i < grid.W; ++i) R::at(to, start + i) = sums[i];
    }
}

// One line of all messages and of the softmax, into q [blocks,N,row].
template <typename R>
void update_line(const Problem& p, int64_t y, const Ring& ring, const float* blurred, const float* scores, float* q) {
    const Grid& grid = p.grid;
    const int64_t N = grid.H * grid.W, M = p.lattice.M;
    const int64_t first = std::max<int64_t>(0, y - grid.reach), last = std::min(grid.H - 1, y + grid.reach);
    for (int64_t start = 0; start < grid.W; start += STRIP) {
        const int count = int(std::min<int64_t>(STRIP, grid.W - start));
        for (int64_t b = 0; b < p.blocks; ++b) {
            R sums[STRIP] = {};
            if (p.spatial_weight > 0)
                for (int64_t j = first; j <= last; ++j) {
                    const float tap = grid.taps[std::abs(j - y)] * grid.down[j] * p.spatial_weight * grid.down[y];
                    const float* line = ring.line(b, j);
                    if (count == STRIP)
                        for (int i = 0; i < STRIP; ++i) sums[i].add(tap, R::at(line, start + i));
                    else
                        for (int i = 0; i < count; ++i) sums[i].add(tap, R::at(line, start + i));
                }
            for (int i = 0; i < count; ++i) {
                const int64_t n = y * grid.W + start + i;
                R total = R::at(scores, b * N + n);
                if (p.spatial_weight > 0) total.add(grid.across[start + i], sums[i]);
                if (p.color_weight > 0) total.add(p.color_weight, slice<R>(p.lattice, n, blurred + b * M * R::FLOATS));
                R::at(q, b * N + n) = total;
            }
        }
        for (int i = 0; i < count; ++i)
            softmax<R>(&R::at(q, y * grid.W + start + i).part[0][0], p.blocks, N * R::FLOATS);
    }
}

template <typename R>
void iterate(const Worker& worker, const Problem& p, const float* scores, float* q, float* blurred,
             std::vector<Ring>& rings) {
    const Grid& grid = p.grid;
    const int64_t N = grid.H * grid.W, line = grid.W * R::FLOATS;
    Ring& ring = rings[worker.index];
    const auto sum_lines = [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; p.spatial_weight > 0 && j < end; ++j)
            for (int64_t b = 0; b < p.blocks; ++b)
                sum_across<R>(grid, q + b * N * R::FLOATS + j * line, ring.line(b, j));
    };
    for (int64_t i = 0; i < p.iterations; ++i) {
        if (p.color_weight > 0)
            for (int64_t b = 0; b < p.blocks; ++b)
                splat_and_blur<R>(worker, p.lattice, q + b * N * R::FLOATS, blurred + b * p.lattice.M * R::FLOATS);
        worker.loop(grid.H, [&](int64_t begin, int64_t end) {
            ring.end = end;
            // reads lines of other workers before they overwrite them
            sum_lines(std::max<int64_t>(0, begin - grid.reach), begin);
            sum_lines(end, std::min(grid.H, end + grid.reach));
            worker.barrier->wait();
            int64_t done = begin;
            for (int64_t y = begin; y < end; ++y) {
                const int64_t next = std::min(end, y + grid.reach + 1);
                sum_lines(done, next);
                done = next;
                update_line<R>(p, y, ring, blurred, scores, q);
            }
        });
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
    const int64_t N = p.grid.H * p.grid.W, size = (p.blocks = (p.K + L - 1) / L) * N * L;
    Array<float> scores(size), q(size), blurred(p.color_weight > 0 ? p.blocks * p.lattice.M * L : 0);
    std::vector<Ring> rings;
    for (int t = 0; t < threads; ++t) rings.emplace_back(p, L);
    with_team(threads, [&](const Worker& worker) {
        worker.loop(N, [&](int64_t begin, int64_t end) {
            for (int64_t start = begin; start < end; start += TURNED) {
                const int64_t stop = std::min(end, start + TURNED);
                for (int64_t k = 0; k < p.blocks * L; ++k)
                    for (int64_t n = start; n < stop; ++n) {
                        const int64_t place = (k / L * N + n) * L + k % L;
                        scores[place] = q[place] = k < p.K ? p.scores[k * N + n] : -1e30f;
                    }
                for (int64_t n = start; n < stop; ++n) softmax<R>(&q[n * L], p.blocks, N * L);
            }
        });
        iterate<R>(worker, p, scores.get(), q.get(), blurred.get(), rings);
    });
}

Array<double> bilateral_points(const uint8_t* image, int64_t H, int64_t W, double sigma, double color_sigma) {
    Array<double> points(H * W * 5);
    for (int64_t n = 0; n < H * W; ++n) {
        points[5 * n] = (n % W) / sigma;
        points[5 * n + 1] = (n / W) / sigma;
        for (int c = 0; c < 3; ++c) points[5 * n + 2 + c] = image[3 * n + c] / color_sigma;
    }
    return points;
}

// Folds n_i into the lattice.
void normalise(Lattice& lattice) {
    using One = Row<float, 1>;
    Array<float> norm(lattice.N), blurred(lattice.M);
    std::fill(norm.get(), norm.get() + lattice.N, 1.0f);
    Barrier barrier(1);
    splat_and_blur<One>(Worker{0, 1, &barrier}, lattice, norm.get(), blurred.get());
    for (int64_t n = 0; n < lattice.N; ++n) norm[n] = 1 / std::sqrt(slice<One>(lattice, n, blurred.get()).part[0]);
    for (int64_t n = 0; n < lattice.N; ++n)
        for (int i = 0; i < AXES; ++i) lattice.weights[n * AXES + i] *= norm[n];
    if (lattice.gathers)
        for (int64_t e = 0; e < lattice.N * AXES; ++e) lattice.row_weights[e] *= norm[lattice.rows[e]];
}

}  // namespace

// Takes scores [K,H,W] and a picture [H,W,3] to probabilities [K,H,W]. Returns 0; or 1 without enough memory; or 2 where
// the points reach too far, or are too many, for the keys.
extern "C" int smooseg_mean_field(const float* scores, const uint8_t* image, int64_t H, int64_t W, int64_t K,
                                  double sigma, double spatial_weight, double far_sigma, double color_sigma,
                                  double color_weight, int64_t reach, int64_t iterations, int64_t threads,
                                  float* probabilities) {
    try {
        Problem p;
        p.scores = scores, p.probabilities = probabilities, p.K = K, p.iterations = iterations;
        p.spatial_weight = float(spatial_weight), p.color_weight = float(color_weight);
        p.grid.H = H, p.grid.W = W, p.grid.reach = reach;
        for (int64_t t = 0; t <= reach; ++t) p.grid.taps.push_back(float(std::exp(-0.5 * t * t / (sigma * sigma))));
        p.grid.taps.resize(reach + 1 + STRIP);
        p.grid.down = norms(H, p.grid.taps);
        p.grid.across = norms(W, p.grid.taps);
        if (color_weight > 0) {
            p.lattice = build(bilateral_points(image, H, W, far_sigma, color_sigma).get(), H * W, threads > 1);
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
