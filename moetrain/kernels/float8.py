"""The experts' products in float8 e4m3, a scale for every tile (DeepSeek-V3, arXiv 2412.19437, section 3.3): what they
are, emulated with torch's own float8 on any device.

    y  = Q(x) Q(W)^T     rows in tiles of 1 x n along what is summed over, a weight in blocks of n x n
    dX = Q(dY) Q(W)      the same blocks: they are as long the one way as the other
    dW = dY^T x          in the compute dtype

``Q`` rounds to e4m3 times a power of two, which every compute dtype holds exactly: what is multiplied here, in float32
sums, are the very numbers that a float8 tensor core multiplies. A tile of a row knows nothing of other rows. dW sums
over an expert's rows, and which of them lie next to one another, and on which rank, is the layout's business: tiles
along that sum would make it another run under every layout, so dW is not rounded (docs/numerics.md).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import deferred, world
from moetrain.config import UserError
from moetrain.kernels import grouped
from moetrain.moe.rows import gather, gather_sum
from moetrain.moe.types import Rows

E4M3 = torch.float8_e4m3fn
TILES = (8, 16, 32, 64, 128)


def check(tile: int, *, hidden: int, etp: int) -> None:
    """Raise ``UserError`` for tiles that are none, or that etp would cut apart; 0 = no float8."""
    if tile and tile not in TILES:
        raise UserError(f"model.moe.fp8_tile={tile}: use one of {', '.join(map(str, TILES))}, or 0 for no float8")
    width = -(-hidden // etp)
    if tile and etp > 1 and width % tile:
        fits = [n for n in TILES if width % n == 0]
        tiles = f"model.moe.fp8_tile={fits[-1]}" if fits else "another layout.etp"
        raise UserError(
            f"model.moe.fp8_tile={tile} does not divide the {width} of model.moe.hidden={hidden} that each of "
            f"layout.etp={etp} ranks has: tiles would lie otherwise than on one rank; use {tiles} or "
            f"model.moe.hidden={-(-width // tile) * tile * etp}"
        )


def unfit(*, dtype: torch.dtype) -> str | None:
    """Why experts cannot be computed so, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"{dtype} does not hold every float8 number times its scale"
    return None


def quantize_rows(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """(..., I) -> (..., I) e4m3 and (..., ceil(I / tile)) float32 powers of two: x is about the one times the other."""
    tiles = _padded(x, tile, dims=1).unflatten(-1, (-1, tile)).float()
    scale = power_of_2(tiles.abs().amax(-1))
    return (tiles / scale[..., None]).to(E4M3).flatten(-2)[..., : x.shape[-1]], scale


def quantize_blocks(w: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """(..., O, I) -> (..., O, I) e4m3 and (..., ceil(O / tile), ceil(I / tile)) float32."""
    O, I = w.shape[-2:]  # noqa: E741
    blocks = _padded(w, tile, dims=2).unflatten(-2, (-1, tile)).unflatten(-1, (-1, tile)).float()
    scale = power_of_2(blocks.abs().amax((-3, -1)))
    values = (blocks / scale[..., None, :, None]).to(E4M3)
    return values.flatten(-4, -3).flatten(-2)[..., :O, :I], scale


def rounded_rows(x: Tensor, tile: int) -> Tensor:
    """``x`` as float8 has it, in its own dtype."""
    values, scale = quantize_rows(x, tile)
    return _wide(values, scale.repeat_interleave(tile, -1), x)


def rounded_blocks(w: Tensor, tile: int) -> Tensor:
    values, scale = quantize_blocks(w, tile)
    return _wide(values, scale.repeat_interleave(tile, -2).repeat_interleave(tile, -1), w)


def power_of_2(most: Tensor) -> Tensor:
    """The least power of two that brings ``most``, float32 and not negative, to at most e4m3's 448; NaN for what is not
    finite, so that a tile with such a number shows it (torch's conversion would make 448 of infinity).

    By the bits: 448 is 1.75 * 2^8, and what is above 1.75 carries into the exponent. At least 2^-117: below, a product
    with e4m3's least number, 2^-9, would be no normal number of float32 and bfloat16 any more.
    """
    exponent = ((most.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    scale = (exponent.clamp(min=127 - 117) << 23).view(torch.float32)
    return torch.where(most.isfinite(), scale, torch.nan)


def _padded(x: Tensor, tile: int, *, dims: int) -> Tensor:
    """With zeros where the last tile of one of the last ``dims`` dimensions is not full."""
    short = [-n % tile for n in x.shape[: -dims - 1 : -1]]
    return F.pad(x, [end for n in short for end in (0, n)]) if any(short) else x


def _wide(values: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Exact: four significant bits, of normal numbers."""
    O, I = values.shape[-2:]  # noqa: E741
    return values.to(like.dtype).mul_(scale[..., :O, :I])


def swiglu(tile: int, rows: Rows, gate_up_S2FD: Tensor, down_SDF: Tensor, *, again: bool = False) -> Tensor:
    """See ``kernels/__init__.py``. The combine weight multiplies the hidden row, before that is rounded."""
    x_MD = gather(rows.x_ND, rows.index_M, rows.back_NJ, ragged=rows.ragged)
    ends, (D, hidden) = None, down_SDF.shape[1:]
    if world.on_cpu(x_MD) or grouped.unfit(dtype=x_MD.dtype, dim=D, hidden=hidden):
        ends = grouped.ends_on_host(rows.offsets_S, num_rows=x_MD.shape[0])
    product = partial(_product, offsets_S=rows.offsets_S, ends=ends, tile=tile)
    y_MD = grouped.sorted_swiglu(product, x_MD, gate_up_S2FD, down_SDF, rows.weights_M, again=again)
    return gather_sum(y_MD, rows.index_M, rows.back_NJ, ragged=rows.ragged)


def _product(x_MI: Tensor, w: Tensor, *, offsets_S: Tensor, ends: list[int] | None, tile: int) -> Tensor:
    """(M, I) rows by slot, (S, ..., I) -> (M, O), O all that lies between. ``ends``: of the slots, on the host; None =
    ``F.grouped_mm``, which does not ask for them."""
    shape = w.shape

    def rows(x_MI: Tensor, w_SIO: Tensor) -> Tensor:
        return F.grouped_mm(x_MI, w_SIO, offs=offsets_S) if ends is None else grouped.by_slot(x_MI, w_SIO, ends)

    def y(x_MI: Tensor, w: Tensor) -> Tensor:
        return rows(rounded_rows(x_MI, tile), rounded_blocks(w, tile).flatten(1, -2).transpose(1, 2))

    def d_x(g_MO: Tensor, w: Tensor) -> Tensor:
        g_MO = rounded_rows(g_MO.unflatten(1, shape[1:-1]), tile).flatten(1)  # gate and up have tiles of their own
        return rows(g_MO, rounded_blocks(w, tile).flatten(1, -2))

    def d_w(g_MO: Tensor, x_MI: Tensor) -> Tensor:
        if ends is not None:
            return grouped.weights_by_slot(g_MO, x_MI, ends).view(shape)
        return F.grouped_mm(g_MO.t(), x_MI, offs=offsets_S).view(shape)

    return deferred.product(x_MI, w, y=y, d_x=d_x, d_w=d_w, own=True)
