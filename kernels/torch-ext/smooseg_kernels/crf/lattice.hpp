// The permutohedral lattice (Adams, Baek and Davis 2010) of N points, and a team of threads that shares loops.
//
// Plain C++17 without a header of PyTorch or Python.

#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

template <int width>
struct Numbers {  // vectors of so many
    typedef float Vector __attribute__((vector_size(4 * width), may_alias));
    typedef int32_t Integers __attribute__((vector_size(4 * width), may_alias));
};
constexpr int D = 5, AXES = D + 1;  // place and colour
constexpr size_t LARGE_BYTES = 1 << 21;
constexpr int LANES = 8;       // points that are placed together
typedef double Lanes __attribute__((vector_size(8 * LANES), may_alias));
typedef int64_t Choices __attribute__((vector_size(8 * LANES), may_alias));
constexpr double ROUNDS = 6755399441055744.0;  // x + this - this is x rounded
constexpr int AHEAD = 64;      // gathered rows are asked for so many steps before they are needed
constexpr int MOST_SUMMED = 128;   // numbers that one sum adds before it is added to others
constexpr int PADDING = 8 * AXES;  // numbers that are read ahead of the last

// An array on cache lines, not initialised: the threads that use a part are the first to touch it.
template <typename T>
class Array {
public:
    explicit Array(int64_t size = 0) {
        if (size == 0) return;
        // large arrays are read at random: large pages save most of the address look-ups
        const size_t align = size * sizeof(T) >= LARGE_BYTES ? LARGE_BYTES : 64;
        const size_t bytes = (size * sizeof(T) + align - 1) / align * align;
        data_.reset(static_cast<T*>(std::aligned_alloc(align, bytes)));
        if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (align == LARGE_BYTES) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
    }
    T* get() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_.get()[i]; }

private:
    struct Free { void operator()(T* pointer) const { std::free(pointer); } };
    std::unique_ptr<T, Free> data_;
};

class Barrier {
public:
    explicit Barrier(int count) : count_(count), missing_(count) {}
    void wait() {
        if (count_ == 1) return;
        std::unique_lock<std::mutex> lock(mutex_);
        const int64_t turn = turn_;
        if (--missing_ == 0) {
            missing_ = count_;
            ++turn_;
            all_here_.notify_all();
        } else {
            all_here_.wait(lock, [&] { return turn_ != turn; });
        }
    }

private:
    std::mutex mutex_;
    std::condition_variable all_here_;
    const int count_;
    int missing_;
    int64_t turn_ = 0;
};

// One thread of a team: it takes its part of every loop, and waits for the others after it.
struct Worker {
    int index, count;
    Barrier* barrier;
    template <typename Body>
    void loop(int64_t size, const Body& body) const {
        body(size * index / count, size * (index + 1) / count);
        barrier->wait();
    }
    // One thread runs body while the others wait.
    template <typename Body>
    void alone(const Body& body) const {
        if (index == 0) body();
        barrier->wait();
    }
};

// Runs body on so many threads, or on as many as the system grants.
template <typename Body>
void with_team(int threads, const Body& body) {
    std::mutex mutex;
    std::condition_variable begin;
    std::unique_ptr<Barrier> barrier;
    int count = 0;
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        for (int i = 1; i < threads; ++i)
            others.emplace_back([&, i] {
                std::unique_lock<std::mutex> lock(mutex);
                begin.wait(lock, [&] { return count > 0; });
                lock.unlock();
                body(Worker{i, count, barrier.get()});
            });
    } catch (const std::system_error&) {
    }
    {
        std::lock_guard<std::mutex> lock(mutex);
        count = int(others.size()) + 1;
        barrier.reset(new Barrier(count));
    }
    begin.notify_all();
    body(Worker{0, count, barrier.get()});
    for (auto& thread : others) thread.join();
}

// Numbers keys in the order in which they first come; open addressing.
class Numbering {
public:
    explicit Numbering(int64_t expected) { resize(expected); }
    void prefetch(int64_t key) const { __builtin_prefetch(&slots_[home(key)]); }
    int32_t add(int64_t key) {
        if (2 * int64_t(keys.size()) >= capacity_) resize(2 * capacity_);
        Slot& slot = slots_[place(key)];
        if (slot.number < 0) {
            slot = {key, int32_t(keys.size())};
            keys.push_back(key);
        }
        return slot.number;
    }
    int32_t find(int64_t key) const { return slots_[place(key)].number; }  // -1 where it never came
    // Gives a key the next number in place of its old one.
    int32_t renew(int64_t key) {
        const int32_t number = slots_[place(key)].number = int32_t(keys.size());
        keys.push_back(key);
        return number;
    }
    std::vector<int64_t> keys;

private:
    struct Slot {
        int64_t key;
        int32_t number;
    };
    int64_t home(int64_t key) const { return int64_t((uint64_t(key) * 0x9E3779B97F4A7C15ull) >> shift_); }
    int64_t place(int64_t key) const {
        int64_t i = home(key);
        while (slots_[i].number >= 0 && slots_[i].key != key) i = (i + 1) & (capacity_ - 1);
        return i;
    }
    void resize(int64_t expected) {
        int bits = 10;
        while ((int64_t(1) << bits) < expected) ++bits;
        const Array<Slot> old = std::move(slots_);
        const int64_t before = capacity_;
        capacity_ = int64_t(1) << bits;
        shift_ = 64 - bits;
        slots_ = Array<Slot>(capacity_);
        std::fill(slots_.get(), slots_.get() + capacity_, Slot{-1, -1});
        for (int64_t s = 0; s < before; ++s)
            if (old[s].number >= 0) slots_[place(old[s].key)] = old[s];
    }
    int64_t capacity_ = 0;
    int shift_ = 0;
    Array<Slot> slots_;
};

// A row of a block of classes: R vectors of type T.
template <typename T, int R>
struct Row {
    T part[R];
    static constexpr int PARTS = R, FLOATS = R * int(sizeof(T) / sizeof(float));
    static const Row& at(const float* base, int64_t i) { return *reinterpret_cast<const Row*>(base + i * FLOATS); }
    static Row& at(float* base, int64_t i) { return *reinterpret_cast<Row*>(base + i * FLOATS); }
    static void prefetch(const float* base, int64_t i) {
        for (int f = 0; f < FLOATS; f += 16) __builtin_prefetch(base + i * FLOATS + f);
    }
    void add(float weight, const Row& other) {
        for (int r = 0; r < R; ++r) part[r] += weight * other.part[r];
    }
    void clear_if(bool condition) {  // without a jump
        using Bits = typename Numbers<int(sizeof(T) / sizeof(float))>::Integers;
        for (int r = 0; r < R; ++r) {
            Bits bits;
            std::memcpy(&bits, &part[r], sizeof bits);
            bits &= int32_t(condition) - 1;
            std::memcpy(&part[r], &bits, sizeof bits);
        }
    }
};

struct Lattice {
    int64_t N = 0, M = 0;
    bool gathers = false;      // whether the last three are there: one thread scatters instead
    Array<int32_t> vertices;   // [N,AXES] lattice points around a point
    Array<float> weights;      // [N,AXES] of the linear interpolation between them
    Array<int64_t> starts;     // [M+1] into the next two
    Array<int32_t> rows;       // [N,AXES] points that a lattice point gathers from
    Array<float> row_weights;  // [N,AXES]
    Array<int32_t> chains;     // [AXES,M] neighbours in a row along an axis; ~m ends a chain
    int64_t lengths[AXES];     // of the chains of an axis, in all
    // A lattice point that sums more than MOST_SUMMED takes a new number; a pair is its old and its new one. So no sum
    // of thousands of numbers loses digits. Chains have the last numbers alone.
    std::vector<std::pair<int32_t, int32_t>> renewed;
};

// Takes LANES points [d] to the d+1 coordinates of the plane of sum 0, in units in which the filter's sigma is 1.
template <int d>
void elevate(const Lanes* points, Lanes* elevated) {
    Lanes total = {};
    for (int i = d - 1; i >= 0; --i) {
        const Lanes entry = points[i] * ((d + 1) * std::sqrt(2.0 / 3) / std::sqrt((i + 1.0) * (i + 2.0)));
        elevated[i + 1] = total - double(i + 1) * entry;
        total += entry;
    }
    elevated[0] = total;
}

// Finds quotients [d+1] and ranks [d+1] of the simplices around points, and their barycentric weights [d+1].
template <int d>
void enclose(const Lanes* elevated, Lanes* quotients, Choices* ranks, Lanes* weights) {
    constexpr int axes = d + 1;
    Lanes delta[axes], sorted[axes], sum = {};
    for (int i = 0; i <= d; ++i) {
        quotients[i] = (elevated[i] / double(axes) + ROUNDS) - ROUNDS;
        delta[i] = elevated[i] - quotients[i] * double(axes);
        sum += quotients[i];
    }
    for (int i = 0; i <= d; ++i) ranks[i] = __builtin_convertvector(sum, Choices);
    for (int i = 0; i <= d; ++i)
        for (int j = i + 1; j <= d; ++j) {
            const Choices less = delta[i] < delta[j];  // -1 or 0
            ranks[i] -= less;
            ranks[j] += 1 + less;
        }
    for (int i = 0; i <= d; ++i) {
        const Choices turn = (ranks[i] > d) - (ranks[i] < 0);  // -1, 0 or 1
        ranks[i] += turn * axes;
        quotients[i] += __builtin_convertvector(turn, Lanes);
        sorted[i] = elevated[i] / double(axes) - quotients[i];
    }
    for (int end = d; end > 0; --end)
        for (int i = 0; i < end; ++i) {
            const Lanes one = sorted[i], other = sorted[i + 1];
            sorted[i] = one > other ? one : other;
            sorted[i + 1] = one > other ? other : one;
        }
    weights[0] = 1.0 - (sorted[0] - sorted[d]);
    for (int k = 1; k <= d; ++k) weights[k] = sorted[d - k] - sorted[axes - k];
}

// Builds the lattice of N points; points(start, Lanes[D]) gives LANES of them, the last one again beyond the end.
template <typename Points>
Lattice build(const Points& points, int64_t N, bool gathers) {
    Lattice lattice;
    if (N >= INT32_MAX / AXES) throw std::range_error("too many");
    lattice.N = N, lattice.gathers = gathers;
    Lanes place[D], elevated[AXES], quotients[AXES], weights[AXES], lows[D], highs[D];
    Choices ranks[AXES];
    points(0, place);
    elevate<D>(place, elevated);
    for (int i = 0; i < D; ++i) lows[i] = highs[i] = elevated[i];
    for (int64_t start = 0; start < N; start += LANES) {
        points(start, place);
        elevate<D>(place, elevated);
        for (int i = 0; i < D; ++i) {
            lows[i] = lows[i] < elevated[i] ? lows[i] : elevated[i];
            highs[i] = highs[i] > elevated[i] ? highs[i] : elevated[i];
        }
    }
    int64_t strides[AXES], all = AXES, steps = 0;
    double low[D], room = AXES;
    for (int i = 0; i < D; ++i) {
        double lowest = lows[i][0], highest = highs[i][0];
        for (int l = 1; l < LANES; ++l) lowest = std::min(lowest, lows[i][l]), highest = std::max(highest, highs[i][l]);
        low[i] = std::floor(lowest / AXES) - 3;
        const double size = std::ceil(highest / AXES) + 4 - low[i];
        if (!((room *= size) < 4e18)) throw std::range_error("too far");
        strides[i] = all;
        all *= int64_t(size);
        steps += strides[i];
    }
    strides[D] = 0;

    lattice.vertices = Array<int32_t>(N * AXES + PADDING);
    std::fill(&lattice.vertices[N * AXES], &lattice.vertices[N * AXES] + PADDING, 0);
    lattice.weights = Array<float>(N * AXES);
    Numbering numbering(N);
    std::vector<uint8_t> summed;  // numbers that a lattice point sums
    constexpr int BATCH = 4 * LANES;  // points whose keys are asked for before they are looked up
    int64_t batch[BATCH * AXES];
    for (int64_t start = 0; start < N; start += BATCH) {
        const int64_t end = std::min(N, start + BATCH);
        int64_t* next_key = batch;
        for (int64_t first = start; first < end; first += LANES) {
            points(first, place);
            elevate<D>(place, elevated);
            enclose<D>(elevated, quotients, ranks, weights);
            for (int l = 0; l < std::min<int64_t>(LANES, end - first); ++l) {
                int64_t key = 0, lower[AXES] = {};
                for (int i = 0; i < D; ++i) {
                    key += int64_t(quotients[i][l] - low[i]) * strides[i];
                    lower[ranks[i][l]] = strides[i];
                }
                for (int k = 0; k <= D; ++k) {  // entries of rank above D - k are one period lower
                    *next_key = key + k;
                    numbering.prefetch(*next_key++);
                    lattice.weights[(first + l) * AXES + k] = float(weights[k][l]);
                    key -= lower[D - k];
                }
            }
        }
        for (int64_t e = start * AXES; e < end * AXES; ++e) {
            const int64_t key = batch[e - start * AXES];
            int32_t m = numbering.add(key);
            if (m < int64_t(summed.size()) && summed[m] == MOST_SUMMED) {
                lattice.renewed.push_back({m, numbering.renew(key)});
                m = lattice.renewed.back().second;
            }
            if (m == int64_t(summed.size())) summed.push_back(0);
            ++summed[m];
            lattice.vertices[e] = m;
        }
    }

    const int64_t M = lattice.M = numbering.keys.size();
    std::vector<int32_t> next(M), heads(M + 1);
    std::vector<bool> follows(M), old(M);
    for (const auto& pair : lattice.renewed) old[pair.first] = true;
    lattice.chains = Array<int32_t>(M * AXES);
    for (int axis = 0; axis <= D; ++axis) {
        std::fill(follows.begin(), follows.end(), false);
        const auto neighbour = [&](int64_t m) {
            const int64_t key = numbering.keys[m];
            return key + (key % AXES < D ? 1 - strides[axis] : steps - strides[axis] - D);
        };
        for (int64_t m = 0; m < M; ++m) {
            numbering.prefetch(neighbour(std::min(m + AHEAD, M - 1)));
            next[m] = old[m] ? -1 : numbering.find(neighbour(m));
            if (next[m] >= 0) follows[next[m]] = true;
        }
        // without jumps, because chains are short and their ends cannot be foreseen
        int64_t begun = 0, size = 0;
        for (int64_t m = 0; m < M; ++m) {
            heads[begun] = int32_t(m);
            begun += !follows[m] & (next[m] >= 0);
            size += follows[m] | (next[m] >= 0);
        }
        int32_t *const chain = &lattice.chains[axis * M], *head = heads.data(), i = *head;
        for (int64_t place = 0; place < size; ++place) {
            const int32_t after = next[i], ends = after >> 31;
            chain[place] = i ^ ends;
            head -= ends;
            i = ends ? *head : after;
        }
        lattice.lengths[axis] = size;
    }

    if (!gathers) return lattice;
    lattice.starts = Array<int64_t>(M + 2);
    lattice.rows = Array<int32_t>(N * AXES);
    lattice.row_weights = Array<float>(N * AXES);
    std::fill(lattice.starts.get(), lattice.starts.get() + M + 2, 0);
    for (int64_t e = 0; e < N * AXES; ++e) ++lattice.starts[lattice.vertices[e] + 2];
    for (int64_t m = 2; m < M + 2; ++m) lattice.starts[m] += lattice.starts[m - 1];
    for (int64_t e = 0; e < N * AXES; ++e) {
        const int64_t place = lattice.starts[lattice.vertices[e] + 1]++;
        lattice.rows[place] = int32_t(e / AXES);
        lattice.row_weights[place] = lattice.weights[e];
    }
    return lattice;
}

}  // namespace
