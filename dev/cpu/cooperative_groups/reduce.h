/*
cg::reduce: always in the order of an exclusive-or butterfly, so that a sum of floats is the same under every schedule.
*/
#pragma once

#include "../cooperative_groups.h"

namespace cooperative_groups {

template <unsigned Size, class Parent, class T, class Op>
inline T reduce(const thread_block_tile<Size, Parent>& tile, T value, Op op) {
    return cpu::reduce(tile.mask(), value, op);
}

} // namespace cooperative_groups
