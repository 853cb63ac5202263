// The permutohedral lattice of a picture's pixels by their places alone, which is a plane of triangles.
//
// Its points lie on horizontal lines, half a sigma apart. So the filter walks down the picture with the lattice lines
// around it in the cache: it sums pixels into the next ones, blurs those that are complete, and pixels read from these.

#pragma once

#include "lattice.hpp"

namespace {

constexpr int CORNERS = 3, STAGES = 4;                  // the sums, and one blur along each axis
constexpr int REACH[STAGES] = {0, 1, 1, 2};             // lines to either side that a blur reads
constexpr int SLOTS[STAGES] = {10, 3, 5, 8}, FIRST_SLOT[STAGES] = {1, 11, 14, 19}, ALL_SLOTS = 27;  // slot 0: zeros
constexpr int LINE_BITS = 28, MOST_LINES = 8;           // lattice lines of a line of pixels: 4, and 1 for rounding

// Point c of lattice line k lies in column 2 c, or 2 c + 1 in odd lines; a column is sqrt(3)/2 sigma wide.
struct Plane {
    int64_t lines = 0, columns = 0;
    Array<uint32_t> corners;           // [H,W,CORNERS] line - first[y] in the high bits, and c
    Array<float> weights;              // [H,W,CORNERS]
    Array<uint8_t> exists;             // [lines,columns] whether a pixel is there; none at both ends of a line
    std::vector<int64_t> first, last;  // [H] lattice lines of a line of pixels
};

Plane build_plane(int64_t H, int64_t W, double sigma) {
    Plane plane;
    const int64_t N = H * W;
    if (N >= INT32_MAX / CORNERS) throw std::range_error("too many");
    plane.corners = Array<uint32_t>(N * CORNERS);
    plane.weights = Array<float>(N * CORNERS);
    plane.first.assign(H, INT64_MAX), plane.last.assign(H, INT64_MIN);
    Array<int32_t> places[2] = {Array<int32_t>(N * CORNERS), Array<int32_t>(N * CORNERS)};  // line, column / 2
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t start = 0; start < N; start += LANES) {
        Lanes point[2], elevated[CORNERS], quotients[CORNERS], weights[CORNERS];
        Choices ranks[CORNERS];
        for (int l = 0; l < LANES; ++l) {
            const int64_t n = std::min(start + l, N - 1);
            point[0][l] = (n % W) / sigma, point[1][l] = (n / W) / sigma;
        }
        elevate<2>(point, elevated);
        enclose<2>(elevated, quotients, ranks, weights);
        for (int l = 0; l < LANES && start + l < N; ++l) {
            const int64_t n = start + l, y = n / W;
            for (int k = 0; k < CORNERS; ++k) {  // entries of rank above 2 - k are one period lower
                const int64_t across = int64_t(quotients[0][l]) * CORNERS + k - (ranks[0][l] > 2 - k ? CORNERS : 0);
                const int64_t down = int64_t(quotients[2][l]) * CORNERS + k - (ranks[2][l] > 2 - k ? CORNERS : 0);
                const int64_t line = -down;
                const int64_t c = ((2 * across + down) / CORNERS) >> 1;
                if (std::max(std::abs(line), std::abs(c)) >= INT32_MAX) throw std::range_error("too far");
                places[0][n * CORNERS + k] = int32_t(line), places[1][n * CORNERS + k] = int32_t(c);
                plane.weights[n * CORNERS + k] = float(weights[k][l]);
                plane.first[y] = std::min(plane.first[y], line), plane.last[y] = std::max(plane.last[y], line);
                low = std::min(low, c), high = std::max(high, c);
            }
        }
    }
    for (int64_t y = H - 2; y >= 0; --y) plane.first[y] = std::min(plane.first[y], plane.first[y + 1]);
    for (int64_t y = 1; y < H; ++y) plane.last[y] = std::max(plane.last[y], plane.last[y - 1]);
    const int64_t top = plane.first[0] & ~int64_t(1);  // an even number, so that odd lines stay odd
    for (int64_t y = 0; y < H; ++y) plane.first[y] -= top, plane.last[y] -= top;
    plane.lines = plane.last[H - 1] + 1, plane.columns = high - low + 3;
    const int64_t all = plane.lines * plane.columns;
    if (all >= INT32_MAX || plane.columns >= int64_t(1) << LINE_BITS) throw std::range_error("too many");
    plane.exists = Array<uint8_t>(all);
    std::fill(plane.exists.get(), plane.exists.get() + all, 0);
    for (int64_t e = 0; e < N * CORNERS; ++e) {
        const int64_t line = places[0][e] - top, c = places[1][e] - low + 1;
        plane.corners[e] = uint32_t((line - plane.first[e / CORNERS / W]) << LINE_BITS | c);
        plane.exists[line * plane.columns + c] = 1;
    }
    return plane;
}

// The filter of values [blocks,N,row], from one line of pixels on downwards. It reads a line before it gives its sums.
template <typename R>
class Walk {
public:
    Walk(const Plane& plane, int64_t blocks, int64_t H, int64_t W)
        : plane_(plane), blocks_(blocks), H_(H), W_(W), N_(H * W), line_size_(plane.columns * R::FLOATS),
          slots_(blocks * ALL_SLOTS * line_size_) {}

    // Begins at a line of pixels of these values.
    void start(int64_t y, const float* values) {
        values_ = values;
        std::fill(slots_.get(), slots_.get() + blocks_ * ALL_SLOTS * line_size_, 0.0f);
        for (int64_t stage = STAGES - 1, line = plane_.first[y]; stage >= 0; line -= REACH[stage--])
            done_[stage] = std::max<int64_t>(0, line);
        summed_ = std::lower_bound(plane_.last.begin(), plane_.last.end(), done_[0]) - plane_.last.begin();
        entered_ = plane_.first[summed_] - 1;
    }

    // Blurs all that line y of pixels reads.
    void advance(int64_t y) { advance(STAGES - 1, plane_.last[y]); }

    // Points to the blurred lines that line y reads, for `at`.
    struct Lines { float* line[MOST_LINES]; };
    Lines lines(int64_t y, int64_t b) const { return lines_of(y, b, STAGES - 1); }
    R at(const Lines& lines, int64_t n) const {
        R sum = {};
        for (int64_t e = n * CORNERS; e < (n + 1) * CORNERS; ++e) {
            const uint32_t corner = plane_.corners[e];
            sum.add(plane_.weights[e], R::at(lines.line[corner >> LINE_BITS], corner & ((1u << LINE_BITS) - 1)));
        }
        return sum;
    }

private:
    Lines lines_of(int64_t y, int64_t b, int stage) const {
        Lines lines;
        const int64_t first = plane_.first[y];
        for (int64_t k = first; k <= plane_.last[y]; ++k) lines.line[k - first] = line(b, stage, k);
        return lines;
    }

    float* line(int64_t b, int stage, int64_t k) const {
        const int64_t slot = k < 0 || k >= plane_.lines ? 0 : FIRST_SLOT[stage] + k % SLOTS[stage];
        return slots_.get() + (b * ALL_SLOTS + slot) * line_size_;
    }

    void advance(int stage, int64_t k) {
        if (stage == 0) return sum(k);
        for (; done_[stage] <= k; ++done_[stage]) {
            advance(stage - 1, std::min(plane_.lines - 1, done_[stage] + REACH[stage]));
            for (int64_t b = 0; b < blocks_; ++b) blur(stage, done_[stage], b);
        }
    }

    // Sums pixels, line by line, until no other reaches lattice line k.
    void sum(int64_t k) {
        for (; summed_ < H_ && plane_.first[summed_] <= k; ++summed_) {
            enter(plane_.last[summed_]);
            for (int64_t b = 0; b < blocks_; ++b) {
                const Lines lines = lines_of(summed_, b, 0);
                for (int64_t n = summed_ * W_; n < (summed_ + 1) * W_; ++n) {
                    const R row = R::at(values_ + b * N_ * R::FLOATS, n);
                    for (int64_t e = n * CORNERS; e < (n + 1) * CORNERS; ++e) {
                        const uint32_t corner = plane_.corners[e];
                        R& sum = R::at(lines.line[corner >> LINE_BITS], corner & ((1u << LINE_BITS) - 1));
                        sum.add(plane_.weights[e], row);
                    }
                }
            }
        }
        enter(k);
    }

    // Clears the lattice lines to k for their sums.
    void enter(int64_t k) {
        while (entered_ < k) {
            ++entered_;
            for (int64_t b = 0; b < blocks_; ++b) std::fill_n(line(b, 0, entered_), line_size_, 0.0f);
        }
    }

    void blur(int stage, int64_t k, int64_t b) {
        const int64_t reach = REACH[stage], odd = k & 1;
        const int64_t left = stage == 1 ? odd - 1 : stage == 2 ? odd : 0;
        const int64_t right = stage == 1 ? odd : stage == 2 ? odd - 1 : 0;
        const float *above = line(b, stage - 1, k - reach) + left * R::FLOATS, *here = line(b, stage - 1, k);
        const float* below = line(b, stage - 1, k + reach) + right * R::FLOATS;
        const uint8_t* exists = &plane_.exists[k * plane_.columns];
        float* to = line(b, stage, k);
        for (int64_t c = 1; c < plane_.columns - 1; ++c) {
            R sum = R::at(here, c);
            sum.add(0.5f, R::at(above, c));
            sum.add(0.5f, R::at(below, c));
            sum.clear_if(!exists[c]);
            R::at(to, c) = sum;
        }
    }

    const Plane& plane_;
    const int64_t blocks_, H_, W_, N_, line_size_;
    const Array<float> slots_;  // [blocks,ALL_SLOTS,columns,row]
    const float* values_ = nullptr;
    int64_t done_[STAGES] = {};         // lattice lines that are blurred
    int64_t summed_ = 0, entered_ = 0;  // lines of pixels, and lattice lines for their sums
};

// Folds n_i, computed in fp64, into the weights.
void normalise(Plane& plane, int64_t H, int64_t W) {
    using One = Row<double, 1>;
    const std::vector<double> ones(H * W, 1.0);
    std::vector<double> norms(H * W);
    Walk<One> walk(plane, 1, H, W);
    walk.start(0, reinterpret_cast<const float*>(ones.data()));
    for (int64_t y = 0; y < H; ++y) {
        walk.advance(y);
        const auto lines = walk.lines(y, 0);
        for (int64_t n = y * W; n < (y + 1) * W; ++n) norms[n] = 1 / std::sqrt(walk.at(lines, n).part[0]);
    }
    for (int64_t n = 0; n < H * W; ++n)
        for (int64_t e = n * CORNERS; e < (n + 1) * CORNERS; ++e) plane.weights[e] = float(plane.weights[e] * norms[n]);
}

}  // namespace
