/*
cg::inclusive_scan and cg::exclusive_scan over a tile, in lane order. The first lane of an exclusive scan gets T().
*/
#pragma once

#include "../cooperative_groups.h"

namespace cooperative_groups {

template <unsigned Size, class Parent, class T, class Op>
inline T inclusive_scan(const thread_block_tile<Size, Parent>& tile, T value, Op op) {
    return cpu::scan(tile.mask(), value, op, true);
}
template <unsigned Size, class Parent, class T>
inline T inclusive_scan(const thread_block_tile<Size, Parent>& tile, T value) {
    return cpu::scan(tile.mask(), value, plus<T>(), true);
}
template <unsigned Size, class Parent, class T, class Op>
inline T exclusive_scan(const thread_block_tile<Size, Parent>& tile, T value, Op op) {
    return cpu::scan(tile.mask(), value, op, false);
}
template <unsigned Size, class Parent, class T>
inline T exclusive_scan(const thread_block_tile<Size, Parent>& tile, T value) {
    return cpu::scan(tile.mask(), value, plus<T>(), false);
}

} // namespace cooperative_groups
