"""Triton kernels of routing: a token's top-k in one pass over its scores, and the order of rows by target.

    choose      scores, bias -> the ids of each token's K highest sums       (T, E), (E,) -> (T, K)
    weigh       the weights of these ids                                      (T, E), (T, K) -> (T, K)
    weigh_grad  and their gradient                                            (T, K) -> (T, E)
    count       how many of each key a block of rows has                      (N,) -> (X, blocks)
    place       where each row goes in a stable sort, and the inverse         (N,) -> (N,), (N,)

Letters as in ``moe/types.py``; X keys, G groups of E / G experts of which M are taken. Ties go to the lower id. Sums
over K are in order, of scores in float64, and nothing is added up by atomics: the same bits each time. What is not a
number counts as the highest score, as in ``torch.sort``: an id is always one of the E.
"""

# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl


@triton.jit
def _highest(value_TX, column_X, WIDTH: tl.constexpr):
    """-> of each row the lowest column that has the highest value."""
    high_T = tl.max(value_TX, 1)
    return tl.min(tl.where(value_TX == high_T[:, None], column_X[None, :], WIDTH), 1)


@triton.jit
def choose_kernel(
    steering, bias, ids, num_tokens, E, K, G, M,
    GROUPED: tl.constexpr, BEST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The K highest of steering + bias; if ``GROUPED``, of the M groups whose ``BEST`` (1 or 2) add up to most."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, WIDTH)
    real_TE = (t_T < num_tokens)[:, None] & (e_E < E)[None, :]
    value_TE = tl.load(steering + t_T[:, None] * E + e_E[None, :], mask=real_TE, other=0.0)
    value_TE += tl.load(bias + e_E, mask=e_E < E, other=0.0)[None, :]
    value_TE = tl.where(value_TE == value_TE, value_TE, float("inf"))
    value_TE = tl.where((e_E < E)[None, :], value_TE, float("-inf"))
    if GROUPED:
        g_G, group_E = tl.arange(0, GROUPS), e_E // (E // G)
        score_TG = tl.full((BLOCK_T, GROUPS), float("-inf"), tl.float32)
        for g in range(0, G):
            inside_TE = tl.where((group_E == g)[None, :], value_TE, float("-inf"))
            score_T = tl.max(inside_TE, 1)
            if BEST == 2:
                first_T = _highest(inside_TE, e_E, WIDTH)
                inside_TE = tl.where(e_E[None, :] == first_T[:, None], float("-inf"), inside_TE)
                score_T += tl.max(inside_TE, 1)
            score_TG = tl.where((g_G == g)[None, :], score_T[:, None], score_TG)
        allowed_TE = tl.zeros((BLOCK_T, WIDTH), tl.int1)
        for _ in range(0, M):
            group_T = _highest(score_TG, g_G, GROUPS)
            score_TG = tl.where(g_G[None, :] == group_T[:, None], float("-inf"), score_TG)
            allowed_TE = allowed_TE | (group_E[None, :] == group_T[:, None])
        value_TE = tl.where(allowed_TE, value_TE, float("-inf"))
    for k in range(0, K):
        id_T = _highest(value_TE, e_E, WIDTH)
        tl.store(ids + t_T * K + k, id_T.to(tl.int64), mask=t_T < num_tokens)
        value_TE = tl.where(e_E[None, :] == id_T[:, None], float("-inf"), value_TE)


@triton.jit
def weigh_kernel(
    scores, ids, weights, scale, num_tokens, E, K,
    NORMED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_T = t_T < num_tokens
    total_T = tl.zeros((BLOCK_T,), tl.float64)
    if NORMED:
        for k in range(0, K):
            id_T = tl.load(ids + t_T * K + k, mask=real_T, other=0)
            total_T += tl.load(scores + t_T * E + id_T, mask=real_T, other=1.0).to(tl.float64)
    for k in range(0, K):
        id_T = tl.load(ids + t_T * K + k, mask=real_T, other=0)
        weight_T = tl.load(scores + t_T * E + id_T, mask=real_T, other=0.0)
        if NORMED:
            weight_T = tl.div_rn(weight_T, total_T.to(tl.float32))
        tl.store(weights + t_T * K + k, weight_T * scale, mask=real_T)


@triton.jit
def weigh_grad_kernel(
    g, scores, ids, d_scores, scale, num_tokens, E, K,
    NORMED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of w = scale c / sum(c): d_c = scale / sum(c) (g - sum(g c) / sum(c)), zero for who was not chosen."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E, real_T = tl.arange(0, WIDTH), t_T < num_tokens
    factor_T, shift_T = tl.zeros((BLOCK_T,), tl.float32) + scale, tl.zeros((BLOCK_T,), tl.float32)
    if NORMED:
        total_T = tl.zeros((BLOCK_T,), tl.float64)
        for k in range(0, K):
            id_T = tl.load(ids + t_T * K + k, mask=real_T, other=0)
            score_T = tl.load(scores + t_T * E + id_T, mask=real_T, other=1.0)
            total_T += score_T.to(tl.float64)
            shift_T += tl.load(g + t_T * K + k, mask=real_T, other=0.0) * score_T
        factor_T = tl.div_rn(factor_T, total_T.to(tl.float32))
        shift_T = tl.div_rn(shift_T, total_T.to(tl.float32))
    d_TE = tl.zeros((BLOCK_T, WIDTH), tl.float32)
    for k in range(0, K):
        id_T = tl.load(ids + t_T * K + k, mask=real_T, other=0)
        d_T = factor_T * (tl.load(g + t_T * K + k, mask=real_T, other=0.0) - shift_T)
        d_TE += tl.where(e_E[None, :] == id_T[:, None], d_T[:, None], 0.0)
    tl.store(d_scores + t_T[:, None] * E + e_E[None, :], d_TE, mask=real_T[:, None] & (e_E < E)[None, :])


@triton.jit
def count_kernel(keys, counts, num_rows, X, BINS: tl.constexpr, BLOCK_N: tl.constexpr):
    """``counts``: int32 (X, blocks)."""
    block = tl.program_id(0)
    n_N = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_N = tl.load(keys + n_N, mask=n_N < num_rows, other=X).to(tl.int32)
    x_X = tl.arange(0, BINS)
    tl.store(counts + x_X.to(tl.int64) * tl.num_programs(0) + block, tl.histogram(key_N, BINS), mask=x_X < X)


@triton.jit
def place_kernel(
    keys, counts, ends, order, back, num_rows,
    BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """``ends``: the sums of ``counts`` from the first key and block on. A block's rows keep their order."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    i_N = tl.arange(0, BLOCK_N)
    n_N = block.to(tl.int64) * BLOCK_N + i_N
    real_N = n_N < num_rows
    key_N = tl.load(keys + n_N, mask=real_N, other=0).to(tl.int32)
    before_N = tl.zeros((BLOCK_N,), tl.int32)  # rows of the block with the same key that come earlier
    for part in range(0, BLOCK_N, PART):
        i_P = part + tl.arange(0, PART)
        n_P = block.to(tl.int64) * BLOCK_N + i_P
        key_P = tl.load(keys + n_P, mask=n_P < num_rows, other=-1).to(tl.int32)
        earlier_NP = (key_N[:, None] == key_P[None, :]) & (i_P[None, :] < i_N[:, None])
        before_N += tl.sum(earlier_NP.to(tl.int32), 1)
    at_N = key_N.to(tl.int64) * blocks + block
    start_N = tl.load(ends + at_N, mask=real_N, other=0) - tl.load(counts + at_N, mask=real_N, other=0)
    place_N = (start_N + before_N).to(tl.int64)
    tl.store(order + place_N, n_N, mask=real_N)
    tl.store(back + n_N, place_N, mask=real_N)
