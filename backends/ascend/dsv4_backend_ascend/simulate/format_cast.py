"""npu_format_cast: the same values, their bytes in another order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.formats import TILE_BYTES, TILE_ROWS, mark
from dsv4_backend_ascend.simulate.library import simulated

if TYPE_CHECKING:
    from types import SimpleNamespace


@simulated("npu_format_cast", shapes=lambda a: mark(torch.empty_like(a.input), a.acl_format))
def format_cast(a: SimpleNamespace) -> torch.Tensor:
    """Bytes [..., rows, width] tile by tile: reading them row by row gives nonsense, as it would on
    a chip.
    """
    return mark(to_tiles(a.input), a.acl_format)


def to_tiles(rows: torch.Tensor) -> torch.Tensor:
    """Order bytes [..., rows, width] as [width / 32, rows / 16, 16, 32], under the old shape."""
    *lead, height, width = rows.shape
    tiles = rows.reshape(*lead, height // TILE_ROWS, TILE_ROWS, width // TILE_BYTES, TILE_BYTES)
    return tiles.movedim(-2, -4).reshape(rows.shape).contiguous()


def from_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """Back to rows: the inverse of ``to_tiles``, by its own formula."""
    *lead, height, width = tiles.shape
    columns = tiles.reshape(*lead, width // TILE_BYTES, height, TILE_BYTES)
    return torch.cat([column.squeeze(-3) for column in columns.split(1, dim=-3)], dim=-1)
