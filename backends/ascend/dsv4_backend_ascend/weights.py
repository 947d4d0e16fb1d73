"""Weights as 950 multiplies them: MX.

MX lays one E8M0 scale per 32 channels as [..., k / 64, 2]. The checkpoint's grids repeat into it
(128 x 128 blocks of FP8, 1 x 32 groups of FP4), so the repacking is exact and reversible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from dsv4_backend_torch.weights import StackedExperts

from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, WEIGHT_DTYPES, Experts, Format, ScaledArray

MX_PAIR = 64  # channels under one pair of E8M0 scales


@dataclass(frozen=True)
class MxWeight:
    """``data``: E4M3 [..., out, in], or E2M1 pairs in uint8 [..., out, in / 2]; ``scale``: uint8
    E8M0 [..., out, in / 64, 2].
    """

    data: torch.Tensor
    scale: torch.Tensor
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, [..., out, in]."""
        *lead, last = self.data.shape
        return (*lead, last * 2 if self.format == "e2m1" else last)

    @property
    def dtype(self) -> str:
        """The checkpoint's format, which repacking keeps."""
        return WEIGHT_DTYPES[self.format]


@dataclass(frozen=True)
class MxArray(ScaledArray):
    """A quantised weight as the checkpoint stores it, with the MX scales that 950 reads; the codes
    are the same bytes.
    """

    mx: MxWeight

    @classmethod
    def of(cls, weight: ScaledArray) -> MxArray:
        """Repack a weight, or a stack of them, that is on the device."""
        return cls(weight.data, weight.scale, weight.format, to_mx(weight.data, weight.scale, weight.format))


class MxExperts(StackedExperts):
    """A stack of experts with MX scales."""

    stack: MxArray


class TiledExperts(Experts):
    """A stack of experts whose E2M1 codes lie in NZ tiles: only the grouped product reads it."""

    def __init__(self, mx: MxWeight) -> None:
        self.mx = mx

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]  # of the packed stack, not of a list
        """[experts, out, in]."""
        experts, out, cols = self.mx.shape
        return experts, out, cols

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The checkpoint's format."""
        return self.mx.dtype

    def __getitem__(self, index: int) -> NoReturn:
        raise TypeError(f"expert {index} lies in NZ tiles with the others; -O tier=composed keeps rows")


def spread(x: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each element along the last axis; as ``repeat_interleave``, which on an NPU ends at
    2^22 results.
    """
    return x.unsqueeze(-1).expand(*x.shape, times).reshape(*x.shape[:-1], -1)


def to_mx(data: torch.Tensor, scale: torch.Tensor, fmt: Format) -> MxWeight:
    """Repack the checkpoint's codes and scales, uint8 [..., out, in] and their grid; ``in`` is a
    multiple of 32.
    """
    if fmt == "e4m3":
        out, cols = data.shape[-2:]
        per_row = spread(scale.transpose(-1, -2), FP8_BLOCK).transpose(-1, -2)[..., :out, :]
        per_group = spread(per_row, FP8_BLOCK // FP4_GROUP)[..., : cols // FP4_GROUP]
        return MxWeight(data.view(torch.float8_e4m3fn), _paired(per_group), fmt)
    return MxWeight(data, _paired(scale), fmt)


def from_mx(weight: MxWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Give back the checkpoint's codes and scales, both uint8."""
    groups = weight.shape[-1] // FP4_GROUP
    scale = weight.scale.flatten(-2)[..., :groups]
    if weight.format == "e4m3":
        return weight.data.view(torch.uint8), scale[..., ::FP8_BLOCK, :: FP8_BLOCK // FP4_GROUP].contiguous()
    return weight.data, scale.contiguous()


def _paired(scale: torch.Tensor) -> torch.Tensor:
    """[..., groups] -> [..., ceil(groups / 2), 2]; the padding is 0, as npu_dynamic_mx_quant
    pads.
    """
    return torch.nn.functional.pad(scale, (0, scale.shape[-1] % 2)).unflatten(-1, (-1, 2)).contiguous()
