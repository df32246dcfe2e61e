"""Attention of a rank's queries over whole rows of keys, inside documents and windows: which backend computes it."""

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import world
from moetrain.model.blocked import Block, Blocked, split
from moetrain.world import to_device

_FLASH = (torch.bfloat16, torch.float16)
_UNBLOCKED = 2048  # positions up to which one block is the whole row in bf16's backward


class Packed(NamedTuple):
    """A piece of all rows, in segments: the documents that meet it, and between them keys that no query sees."""

    queries_N: Tensor  # int32, on the device: where each segment's queries begin, and the end
    keys_N: Tensor  # the same for its keys, of all rows end to end
    most: tuple[int, int]  # queries and keys of a segment


@dataclass(frozen=True)
class Visible:
    """Which keys this rank's queries may see: none later, with documents none of another, and in a window the last
    ``window`` only, the query's own included (arXiv 2310.06825, section 2).

    Keys are whole rows in position order. Queries are equal pieces of them: one without context parallelism, else
    chunks c and 2cp - 1 - c of 2cp, so that ranks have the same work (arXiv 2407.21783, section 3.3.2).
    """

    pieces: tuple[tuple[int, int], ...]  # [start, end) positions, ascending
    length: int  # P, positions of a whole row
    blocks: tuple[Block, ...]
    start_BS: Tensor | None  # int64, on the device: the first key of each query; one row for all: without documents
    packed: tuple[Packed, ...]  # on a GPU, with documents or a window: each piece
    window: int = 0  # 0: all

    @classmethod
    def build(
        cls,
        *,
        pieces: tuple[tuple[int, int], ...],
        length: int,
        documents_BP: Tensor | None,
        device: torch.device,
        rows: int,
        window: int = 0,
    ) -> "Visible":
        """``documents_BP``: int64 on the host, ids that never fall along a row; None: attention crosses documents.
        ``rows``: B. Made once a micro-batch, for all layers of the same window."""
        assert len({end - start for start, end in pieces}) == 1, pieces
        assert pieces[-1][1] <= length, (pieces, length)
        window = window if window < length else 0
        if documents_BP is None and not window:
            at_once = pieces == ((0, length),) and length <= _UNBLOCKED
            return cls(pieces, length, split(pieces, None, size=length) if at_once else split(pieces, None), None, ())
        start_BP = torch.zeros(1, length, dtype=torch.int64) if documents_BP is None else document_starts(documents_BP)
        packed = ()
        if not world.on_cpu(device):
            packed = tuple(_pack(start_BP.expand(rows, -1), piece, device, window=window) for piece in pieces)
        first_BP = start_BP.maximum(torch.arange(length) - (window - 1)) if window else start_BP
        start_BS = torch.cat([first_BP[:, start:end] for start, end in pieces], dim=1)
        return cls(pieces, length, split(pieces, start_BS), to_device(start_BS, device), packed, window)

    @property
    def whole(self) -> bool:
        """One piece that is the row."""
        return self.pieces == ((0, self.length),)

    def pairs(self) -> int:
        """Causal (query, key) pairs of a sequence without documents: what context parallelism has to balance."""
        most = self.window or self.length
        return sum(min(at + 1, most) for start, end in self.pieces for at in range(start, end))


def document_starts(documents_BP: Tensor) -> Tensor:
    """(B, P) ids that never fall along a row -> (B, P) int64: where each position's document begins."""
    begins_BP = F.pad(documents_BP[:, 1:] != documents_BP[:, :-1], (1, 0), value=True)
    return (begins_BP * torch.arange(documents_BP.shape[1])).cummax(dim=1).values


def attend(q_BHSd: Tensor, k_BGPd: Tensor, v_BGPd: Tensor, visible: Visible) -> Tensor:
    """q (B, H, S, d), k and v (B, G, P, d) -> (B, H, S, d): softmax(q k^T / sqrt(d)) v over the keys each query sees.
    Key head g serves query heads g H / G to (g + 1) H / G - 1 (arXiv 2305.13245)."""
    on_gpu, dtype, all_before = not world.on_cpu(q_BHSd), q_BHSd.dtype, visible.start_BS is None
    if visible.whole and all_before:
        if on_gpu or dtype is not torch.bfloat16:
            grouped = q_BHSd.shape[1] != k_BGPd.shape[1]
            return F.scaled_dot_product_attention(q_BHSd, k_BGPd, v_BGPd, is_causal=True, enable_gqa=grouped)
        # torch's backward in bf16 on a CPU takes twice the time of the blocks' plain matmuls
        return Blocked.apply(q_BHSd, k_BGPd, v_BGPd, None, visible.blocks, True)  # pyright: ignore
    if on_gpu and dtype in _FLASH and all_before:
        return _by_piece(q_BHSd, k_BGPd, v_BGPd, visible)
    if on_gpu and dtype in _FLASH and q_BHSd.shape[-1] in range(8, 257, 8):  # what the kernel takes
        return _by_segment(q_BHSd, k_BGPd, v_BGPd, visible)
    return Blocked.apply(q_BHSd, k_BGPd, v_BGPd, visible.start_BS, visible.blocks, False)  # pyright: ignore


def _by_piece(q_BHSd: Tensor, k_BGPd: Tensor, v_BGPd: Tensor, visible: Visible) -> Tensor:
    """The flash kernel, each piece on the keys up to its end: no mask is made."""
    from torch.nn.attention.bias import causal_lower_right  # takes two seconds to import, which a CPU never needs

    pieces, grouped = [], q_BHSd.shape[1] != k_BGPd.shape[1]
    for q, (start, end) in zip(q_BHSd.chunk(len(visible.pieces), dim=2), visible.pieces, strict=True):
        k, v, bias = k_BGPd[:, :, :end], v_BGPd[:, :, :end], causal_lower_right(end - start, end)
        pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped))
    return torch.cat(pieces, dim=2)


def _by_segment(q_BHSd: Tensor, k_BGPd: Tensor, v_BGPd: Tensor, visible: Visible) -> Tensor:
    """The flash kernel for sequences of any lengths, which skips blocks of keys outside a window; its mask puts a
    segment's last query on its last key, and counts a window's keys before the query's own."""
    from torch.nn.attention.varlen import varlen_attn  # takes two seconds to import, which a CPU never needs

    (B, H, _, _), G = q_BHSd.shape, k_BGPd.shape[1]
    k_TGd, v_TGd = (t.transpose(1, 2).flatten(0, 1) for t in (k_BGPd, v_BGPd))
    gqa: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    if G != H and not gqa:  # torch 2.11
        k_TGd, v_TGd = (t.repeat_interleave(H // G, dim=1) for t in (k_TGd, v_TGd))
    pieces = []
    for q, packed in zip(q_BHSd.chunk(len(visible.pieces), dim=2), visible.packed, strict=True):
        q_THd = q.transpose(1, 2).flatten(0, 1)
        y_THd = varlen_attn(
            q_THd, k_TGd, v_TGd, packed.queries_N, packed.keys_N, *packed.most, window_size=(visible.window - 1, 0),
            **gqa,
        )  # fmt: skip
        pieces.append(y_THd.unflatten(0, (B, -1)))  # pyright: ignore
    return torch.cat(pieces, dim=1).transpose(1, 2)


def _pack(start_BP: Tensor, piece: tuple[int, int], device: torch.device, *, window: int = 0) -> Packed:
    """Every key of every row is in a segment, so that k and v are read where they lie; a segment that no query of the
    piece sees has none. ``start_BP``: where each position's document begins."""
    (begin, end), (B, P) = piece, start_BP.shape
    queries, keys = [0], [0]

    def segment(query: int, key: int) -> None:
        if key > keys[-1]:
            queries.append(query)
            keys.append(key)

    for row, start_S in enumerate(start_BP[:, begin:end]):
        first, *later = start_S.unique_consecutive().tolist()
        first = max(first, begin - window + 1) if window else first
        segment(queries[-1], row * P + first)  # before the first key that is seen, and after the row before's last
        for stop in (*later, end):
            segment(row * (end - begin) + stop - begin, row * P + stop)
    segment(queries[-1], B * P)
    most = [max(b - a for a, b in pairwise(at)) for at in (queries, keys)]
    tables = (to_device(torch.tensor(at, dtype=torch.int32), device) for at in (queries, keys))
    return Packed(*tables, most=(max(most[0], 2), most[1]))  # for 1 the kernel wants a query in every segment
