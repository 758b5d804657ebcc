"""Attention among the tokens of an image: of all to all, to those around, or within windows.

Each takes queries, keys and values (B, heads, h, w, channels) and gives as many values. Products of queries and keys are taken as
they are, for queries and keys of a length of their own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, WHOLE = 8, 16  # queries a side that share keys; up to WHOLE tokens a side they all do (measured: docs/log.md)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)


def everywhere(q: Tensor, k: Tensor, v: Tensor, reach: int = 0, shifted: bool = False) -> Tensor:
    """Each token to all."""
    return attend(*(z.flatten(2, 3) for z in (q, k, v))).view_as(q)


class Side(NamedTuple):
    """Tiles of queries along one side of the image, and the keys that those of a tile can reach."""

    tile: int  # queries of each
    keys: Tensor  # (tiles, keys): where they lie
    near: Tensor  # (tiles, tile, keys): which are in the neighbourhood of a query


def side(tokens: int, reach: int, device: torch.device) -> Side:
    """Tiles along a side; a neighbourhood that would lie partly outside is moved inside, so that it is always of `reach`."""
    tile = max(n for n in range(1, min(tokens, WHOLE if tokens <= WHOLE else TILE) + 1) if tokens % n == 0)
    starts = (torch.arange(tokens, device=device) - reach // 2).clamp(0, tokens - reach)  # of the neighbourhoods
    count = min(tokens, tile + reach - 1)
    keys = starts[::tile, None].clamp(max=tokens - count) + torch.arange(count, device=device)
    ahead = keys[:, None] - starts.view(-1, tile, 1)  # tiles tile keys
    return Side(tile, keys, (ahead >= 0) & (ahead < reach))


def tiled(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, heads, h, w, c) as tiles of rows x columns tokens: (tiles, B x heads, rows x columns, c)."""
    parts = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # b n th rows tw columns c
    return parts.permute(2, 4, 0, 1, 3, 5, 6).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def untiled(x: Tensor, like: Tensor, rows: int, columns: int) -> Tensor:
    """Tiles as `tiled` makes them, put together again to the shape of `like`."""
    heads, height, width = like.shape[1:4]
    grid = height // rows, width // columns
    parts = x.unflatten(2, (rows, columns)).unflatten(1, (-1, heads)).unflatten(0, grid)  # n m b heads rows columns c
    return parts.permute(2, 3, 0, 4, 1, 5, 6).flatten(4, 5).flatten(2, 3)


def neighbours(q: Tensor, k: Tensor, v: Tensor, reach: int, shifted: bool = False) -> Tensor:
    """Each token to the reach x reach around it, at the edges to those of them that lie nearest (Hassani et al. 2023, NATTEN).

    Queries of a tile share the keys around it, under a mask: less is gathered than by each alone, less computed than by all.
    """
    rows, columns = (side(size, reach, q.device) for size in q.shape[2:4])
    seen = [z.index_select(2, rows.keys.flatten()).index_select(3, columns.keys.flatten()) for z in (k, v)]
    mask = rows.near[:, None, :, None, :, None] & columns.near[None, :, None, :, None, :]  # th tw rows columns keys keys
    mask = mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)[:, None]
    own = tiled(q, rows.tile, columns.tile)
    keys, values = (tiled(z, rows.keys.shape[1], columns.keys.shape[1]) for z in seen)
    return untiled(attend(own, keys, values, mask), q, rows.tile, columns.tile)


def windows(q: Tensor, k: Tensor, v: Tensor, reach: int, shifted: bool = False) -> Tensor:
    """Each token to those of its window of reach x reach; `shifted` ones begin half a window elsewhere (Liu et al. 2021, Swin).

    What is shifted out of the image comes in at the other edge, and does not see what was there.
    """
    by = reach // 2 if shifted else 0
    mask = None
    if by:
        q, k, v = (z.roll((by, by), (2, 3)) for z in (q, k, v))
        height, width = q.shape[2:4]
        came = [torch.arange(size, device=q.device) < by for size in (height, width)]
        place = (2 * came[0][:, None] + came[1])[None, None, :, :, None]  # 1 1 h w 1
        of = tiled(place, reach, reach)[:, :, :, 0]  # windows 1 tokens
        mask = of[..., None] == of[..., None, :]
    queries, keys, values = (tiled(z, reach, reach) for z in (q, k, v))
    out = untiled(attend(queries, keys, values, mask), q, reach, reach)
    return out.roll((-by, -by), (2, 3)) if by else out


REACHES: dict[str, Callable[..., Tensor]] = {"global": everywhere, "neighborhood": neighbours, "window": windows}


def reach(text: str, tokens: Sequence[int]) -> tuple[str, int]:
    """The kind of attention, and its reach, that a text asks for; ValueError where a level of so many tokens has none such."""
    kind, _, size = text.partition(":")
    sized = kind in ("neighborhood", "window")
    if kind not in (*REACHES, "none") or sized != (size.isdecimal() and int(size) > 0) or bool(size) != sized:
        raise ValueError(f"--level_attention {text!r} is none of: global, neighborhood:7, window:8, none")
    most, has = int(size or 0), "x".join(map(str, tokens))
    if kind == "neighborhood" and (most % 2 == 0 or most > min(tokens)):
        raise ValueError(f"--level_attention {text}: an odd number, at most the side of the level's {has} tokens")
    if kind == "window" and any(side % most for side in tokens):
        raise ValueError(f"--level_attention {text}: windows do not fill the level's {has} tokens: choose a divisor")
    return kind, most
