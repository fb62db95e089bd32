/*
Cooperative groups: the block, and tiles of 1 to 32 lanes. Each operation is one collective of the
engine, whatever the size of the tile, and a tile waits for its own lanes only. Of all of these only
sync orders memory, as on a GPU.
*/
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
    static void sync() { __syncthreads(); }
    static unsigned thread_rank() { return cpu::current_thread(); }
    static unsigned size() { return cpu::threads_of_block(); }
    static unsigned num_threads() { return cpu::threads_of_block(); }
    static dim3 group_index() { return dim3(cpu::current_block_index()); }
    static dim3 thread_index() { return dim3(cpu::current_thread_index()); }
    static dim3 dim_threads() { return cpu::current_block_dim(); }
};

inline thread_block this_thread_block() { return thread_block(); }

template <unsigned Size, class Parent = void> struct thread_block_tile {
    static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0,
                  "a tile has 1, 2, 4, 8, 16 or 32 lanes");

    thread_block_tile() = default;
    // thread_block_tile<N> fits every parent
    template <class Other> thread_block_tile(const thread_block_tile<Size, Other>&) {}

    static unsigned first_lane() { return cpu::current_lane() & ~(Size - 1); }
    static unsigned mask() { return (Size == 32 ? ~0u : (1u << (Size % 32)) - 1) << first_lane(); }

    static unsigned thread_rank() { return cpu::current_lane() % Size; }
    static constexpr unsigned size() { return Size; }
    static constexpr unsigned num_threads() { return Size; }
    static unsigned meta_group_rank() { return cpu::current_thread() / Size; }
    static unsigned meta_group_size() { return (cpu::threads_of_block() + Size - 1) / Size; }

    static void sync() { cpu::sync_warp(mask()); }
    template <class T> static T shfl(T value, int rank) {
        return cpu::shuffle(mask(), value, first_lane() | ((unsigned)rank % Size));
    }
    template <class T> static T shfl_up(T value, unsigned delta) {
        const unsigned rank = thread_rank();
        return cpu::shuffle(mask(), value, first_lane() | (delta <= rank ? rank - delta : rank));
    }
    template <class T> static T shfl_down(T value, unsigned delta) {
        const unsigned rank = thread_rank();
        return cpu::shuffle(mask(), value,
                            first_lane() | (delta < Size - rank ? rank + delta : rank));
    }
    template <class T> static T shfl_xor(T value, unsigned lane_mask) {
        const unsigned rank = thread_rank();
        return cpu::shuffle(mask(), value,
                            first_lane() | ((rank ^ lane_mask) < Size ? rank ^ lane_mask : rank));
    }
    static unsigned ballot(int predicate) {
        return cpu::ballot(mask(), predicate != 0) >> first_lane();
    }
    static int any(int predicate) { return ballot(predicate) != 0; }
    static int all(int predicate) { return ballot(predicate == 0) == 0; }
};

template <unsigned Size, class Parent>
inline thread_block_tile<Size, Parent> tiled_partition(const Parent&) {
    return {};
}

template <class Group> inline void sync(const Group& group) { group.sync(); }

template <class T = void> struct plus { T operator()(T a, T b) const { return a + b; } };
// the minimum
template <class T = void> struct less { T operator()(T a, T b) const { return b < a ? b : a; } };
// the maximum
template <class T = void> struct greater { T operator()(T a, T b) const { return a < b ? b : a; } };
template <class T = void> struct bit_and { T operator()(T a, T b) const { return a & b; } };
template <class T = void> struct bit_or { T operator()(T a, T b) const { return a | b; } };
template <class T = void> struct bit_xor { T operator()(T a, T b) const { return a ^ b; } };

} // namespace cooperative_groups
