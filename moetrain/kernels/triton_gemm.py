"""Triton kernels of an expert layer: grouped GEMMs that gather their rows and do SwiGLU where its numbers already are.

    plan        offsets_S -> tiles of BLOCK_M rows, none of which belongs to two slots
    up          H = X[index] W1^T, A' = s silu(H_gate) H_up                  (M, D) x (2F, D) -> (M, 2F), (M, F)
    rows        Y = A' W2^T, and dX~ = dH W1                                  (M, K) x (N, K) or (K, N) -> (M, N)
    sums        O[n] = sum of Y[back[n]]                                      (M, D) -> (N, D)
    down_grad   dA' = dO[index] W2; A, A', dH and dS = <dA', A> from H        (M, D) x (D, F) -> (M, 2F), (M, F), (M,)
    weights     dW = L^T R over each slot's rows, either side gathered        (M, P), (M, Q) -> (S, P, Q)

The algorithm is SonicMoE's (arXiv 2512.14080): nothing of a row is kept for backward but H. Programs stay and take one
tile after another; none waits for another and no sum is shared, so that a replay gives the same bits. Block sizes do
not change the order of a sum either: each number of a result is one sum over K in order, and dS, which adds up parts of
BLOCK_N columns, has a fixed one. K is a multiple of BLOCK_K, N of nothing. Weights come through tensor descriptors (TMA
on Hopper), gathered rows through pointers.
"""

# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl


@triton.jit
def plan_kernel(
    offsets, tiles, num_slots,
    BLOCK_M: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``tiles``: int32, how many there are, then (slot, first row, end of the slot's rows) of each."""
    slot_S = tl.arange(0, SLOTS)
    end_S = tl.load(offsets + slot_S, mask=slot_S < num_slots, other=0)
    start_S = tl.load(offsets + slot_S - 1, mask=(slot_S > 0) & (slot_S < num_slots), other=0)
    blocks_S = (end_S - start_S + BLOCK_M - 1) // BLOCK_M
    last_S = tl.cumsum(blocks_S, 0)  # the first tile that comes after the slot's
    total = tl.sum(blocks_S, 0)
    if tl.program_id(0) == 0:
        tl.store(tiles, total)
    tile_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    before_TS = last_S[None, :] <= tile_T[:, None]
    slot_T = tl.sum(before_TS.to(tl.int32), 1)
    first_T = tl.sum(tl.where(before_TS, blocks_S[None, :], 0), 1)
    real_T = tile_T < total
    start_T = tl.load(offsets + slot_T - 1, mask=real_T & (slot_T > 0), other=0)
    end_T = tl.load(offsets + slot_T, mask=real_T, other=0)
    at = tiles + 1 + 3 * tile_T
    tl.store(at, slot_T, mask=real_T)
    tl.store(at + 1, start_T + (tile_T - first_T) * BLOCK_M, mask=real_T)
    tl.store(at + 2, end_T, mask=real_T)


@triton.jit
def _tile(tiles, t):
    at = tiles + 1 + 3 * t
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _into_swiglu(
    gate, up, weight_M, h, a, start, inside_M, f, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores a tile of H and of A' = s silu(gate) up."""
    f_N = f + tl.arange(0, BLOCK_N)
    write = inside_M[:, None] & (f_N < F)[None, :]
    gate = gate.to(h.dtype.element_ty)
    up = up.to(h.dtype.element_ty)
    h_MN = h + start.to(tl.int64) * (2 * F) + (tl.arange(0, BLOCK_M)[:, None] * (2 * F) + f_N[None, :])
    tl.store(h_MN, gate, mask=write)
    tl.store(h_MN + F, up, mask=write)
    gate = gate.to(tl.float32)  # of what backward finds: it makes the same A' again
    hidden = gate * tl.sigmoid(gate) * up.to(tl.float32) * weight_M[:, None]
    a_MN = a + start.to(tl.int64) * F + (tl.arange(0, BLOCK_M)[:, None] * F + f_N[None, :])
    tl.store(a_MN, hidden.to(a.dtype.element_ty), mask=write)


@triton.jit
def up_kernel(
    x, index, w, weights, tiles, h, a, num_slots, D, F,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    w_desc = tl.make_tensor_descriptor(w, [num_slots * 2 * F, D], [D, 1], [BLOCK_N, BLOCK_K])
    across = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tiles) * across, tl.num_programs(0)):
        slot, start, end = _tile(tiles, tile // across)
        f = tile % across * BLOCK_N
        row_M = start + tl.arange(0, BLOCK_M)
        inside_M = row_M < end
        source_M = tl.load(index + row_M, mask=inside_M, other=0).to(tl.int64)
        x_MK = x + source_M[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            left = tl.load(x_MK + k)
            gate = tl.dot(left, w_desc.load([slot * 2 * F + f, k]).T, gate, input_precision=PRECISION)
            up = tl.dot(left, w_desc.load([slot * 2 * F + F + f, k]).T, up, input_precision=PRECISION)
        weight_M = tl.load(weights + row_M, mask=inside_M, other=0.0).to(tl.float32)
        _into_swiglu(gate, up, weight_M, h, a, start, inside_M, f, F, BLOCK_M, BLOCK_N)


@triton.jit
def rows_kernel(
    a, w, tiles, y, num_rows, num_slots, K, N,
    KN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``KN``: a slot's weight is (K, N), else (N, K)."""
    a_desc = tl.make_tensor_descriptor(a, [num_rows, K], [K, 1], [BLOCK_M, BLOCK_K])
    if KN:
        w_desc = tl.make_tensor_descriptor(w, [num_slots * K, N], [N, 1], [BLOCK_K, BLOCK_N])
    else:
        w_desc = tl.make_tensor_descriptor(w, [num_slots * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tiles) * across, tl.num_programs(0)):
        slot, start, end = _tile(tiles, tile // across)
        n = tile % across * BLOCK_N
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left = a_desc.load([start, k])  # rows past the end are the next slot's, and not written
            right = w_desc.load([slot * K + k, n]) if KN else w_desc.load([slot * N + n, k]).T
            sum_MN = tl.dot(left, right, sum_MN, input_precision=PRECISION)
        row_M = start + tl.arange(0, BLOCK_M)
        n_N = n + tl.arange(0, BLOCK_N)
        write = (row_M < end)[:, None] & (n_N < N)[None, :]
        y_MN = y + start.to(tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + n_N[None, :])
        tl.store(y_MN, sum_MN.to(y.dtype.element_ty), mask=write)


@triton.jit
def sums_kernel(
    y, back, out, num_rows, J, D,
    RAGGED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    write = (row_R < num_rows)[:, None] & (d_N < D)[None, :]
    sum_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for j in range(0, J):
        from_R = tl.load(back + row_R.to(tl.int64) * J + j, mask=row_R < num_rows, other=0)
        read = write
        if RAGGED:
            read = write & (from_R >= 0)[:, None]
        sum_RN += tl.load(y + from_R[:, None] * D + d_N[None, :], mask=read, other=0.0).to(tl.float32)
    tl.store(out + row_R.to(tl.int64)[:, None] * D + d_N[None, :], sum_RN.to(out.dtype.element_ty), mask=write)


@triton.jit
def down_grad_kernel(
    g, index, w, weights, tiles, h, d_h, a, d_scale, num_slots, D, F,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``g``: dO, by row of x; ``d_scale`` (M, columns of tiles): parts of dS."""
    w_desc = tl.make_tensor_descriptor(w, [num_slots * D, F], [F, 1], [BLOCK_K, BLOCK_N])
    across = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(tiles) * across, tl.num_programs(0)):
        slot, start, end = _tile(tiles, tile // across)
        f = tile % across * BLOCK_N
        row_M = start + tl.arange(0, BLOCK_M)
        inside_M = row_M < end
        source_M = tl.load(index + row_M, mask=inside_M, other=0).to(tl.int64)
        g_MK = g + source_M[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        d_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            left = tl.load(g_MK + k)
            d_a = tl.dot(left, w_desc.load([slot * D + k, f]), d_a, input_precision=PRECISION)
        scale_M = tl.load(weights + row_M, mask=inside_M, other=0.0).to(tl.float32)
        left_half, right_half = d_a.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        part_M = _through_swiglu(left_half, scale_M, h, d_h, a, start, inside_M, f, F, BLOCK_M, BLOCK_N // 2)
        f += BLOCK_N // 2
        part_M += _through_swiglu(right_half, scale_M, h, d_h, a, start, inside_M, f, F, BLOCK_M, BLOCK_N // 2)
        tl.store(d_scale + row_M.to(tl.int64) * across + tile % across, part_M, mask=inside_M)


@triton.jit
def _through_swiglu(d_a, scale_M, h, d_h, a, start, inside_M, f, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Half a tile's columns at a time, for which there are registers -> its part of dS."""
    f_N = f + tl.arange(0, BLOCK_N)
    write = inside_M[:, None] & (f_N < F)[None, :]
    at = start.to(tl.int64) * (2 * F)
    at_MN = tl.arange(0, BLOCK_M)[:, None] * (2 * F) + f_N[None, :]
    gate = tl.load(h + at + at_MN, mask=write, other=0.0).to(tl.float32)
    up = tl.load(h + at + F + at_MN, mask=write, other=0.0).to(tl.float32)
    slope = tl.sigmoid(gate)
    silu = gate * slope
    hidden = silu * up
    part_M = tl.sum(tl.where(write, d_a * hidden, 0.0), 1)
    a_MN = a + start.to(tl.int64) * F + (tl.arange(0, BLOCK_M)[:, None] * F + f_N[None, :])
    tl.store(a_MN, (hidden * scale_M[:, None]).to(a.dtype.element_ty), mask=write)
    d_a = d_a * scale_M[:, None]
    tl.store(d_h + at + F + at_MN, (d_a * silu).to(d_h.dtype.element_ty), mask=write)
    d_gate = d_a * up * (slope + silu * (1 - slope))
    tl.store(d_h + at + at_MN, d_gate.to(d_h.dtype.element_ty), mask=write)
    return part_M


@triton.jit
def weights_kernel(
    left, right, index, offsets, out, num_slots, P, Q,
    GATHER_LEFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One of ``left`` and ``right`` is gathered, the other lies by slot. A slot without rows gets zeros."""
    down, across = tl.cdiv(P, BLOCK_M), tl.cdiv(Q, BLOCK_N)
    for tile in range(tl.program_id(0), num_slots * down * across, tl.num_programs(0)):
        slot = tile // (down * across)
        p_M = tile // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
        q_N = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
        start = tl.load(offsets + slot - 1, mask=slot > 0, other=0)
        end = tl.load(offsets + slot)
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for row in range(start, end, BLOCK_K):
            row_K = row + tl.arange(0, BLOCK_K)
            inside_K = row_K < end
            source_K = tl.load(index + row_K, mask=inside_K, other=0).to(tl.int64)
            if GATHER_LEFT:
                l_K, r_K = source_K, row_K.to(tl.int64)
            else:
                l_K, r_K = row_K.to(tl.int64), source_K
            inside_K1 = inside_K[:, None]
            l_KM = tl.load(left + l_K[:, None] * P + p_M[None, :], mask=inside_K1 & (p_M < P)[None, :], other=0.0)
            r_KN = tl.load(right + r_K[:, None] * Q + q_N[None, :], mask=inside_K1 & (q_N < Q)[None, :], other=0.0)
            sum_MN = tl.dot(l_KM.T, r_KN, sum_MN, input_precision=PRECISION)
        write = (p_M < P)[:, None] & (q_N < Q)[None, :]
        at = slot.to(tl.int64) * P * Q + p_M[:, None] * Q + q_N[None, :]
        tl.store(out + at, sum_MN.to(out.dtype.element_ty), mask=write)
