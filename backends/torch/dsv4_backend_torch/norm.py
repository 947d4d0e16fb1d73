"""RMS norm and RoPE."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.numeric import BLOCK, Numeric
from dsv4_core.contract.ops.norm import NormOps

SMALL = 1 << 13  # elements up to which a few plain calls cost less than the library's norm


@functools.cache
def epsilon(eps: float) -> Tensor:
    """``eps`` as a tensor on the CPU."""
    return torch.tensor([eps])


class TorchNorm(Numeric, NormOps):
    """Contracts of ``ops/norm.py``."""

    _rotation: tuple[Tensor, dict[int, Any]] | None = None

    def rms_norm(self, x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
        tokens, dim = x.shape
        if self.compiled and (few := self.compiled.rms_norm(x, weight, eps)) is not None:
            return few
        if (
            self.numerics == "float64"
        ):  # results are as fine as what is inside: one rounding of a row's common factor, not two
            y = x / x.square().mean(1, keepdim=True).add_(eps).sqrt_()
            return y if weight is None else y.mul_(weight)
        gain = None if weight is None else self.widen(weight)
        if self.on_cpu and tokens * dim <= SMALL:
            wide = self.widen(x)
            norm = torch.linalg.vector_norm(wide, 2, 1, True)
            y = wide * torch.addcmul(epsilon(eps), norm, norm, value=1 / dim).rsqrt_()
            return self.rounded(y if gain is None else y.mul_(gain))
        if tokens * dim <= BLOCK:
            return self.rounded(functional.rms_norm(self.widen(x), (dim,), gain, eps))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part in self.blocks(tokens, dim):
            out[part] = functional.rms_norm(self.widen(x[part]), (dim,), gain, eps)
        return out

    def apply_rope(self, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool) -> Tensor:
        if self.compiled and (turn := self._few_rotations(positions, freqs)) is not None:
            few = self.compiled.apply_rope(x, turn, inverse=inverse)
            if few is not None:
                return few
        rotated = 2 * freqs.shape[0]
        if not self.on_cpu:
            return self.turned(x, positions, freqs, inverse=inverse)
        turn, back = self.rotation(positions, freqs)
        pairs = torch.view_as_complex(self.widen(x[..., -rotated:]).reshape(*x.shape[:-1], freqs.shape[0], 2))
        y = torch.view_as_real(pairs * (back if inverse else turn)).reshape(*x.shape[:-1], rotated)
        return torch.cat([x[..., :-rotated], self.rounded(y)], -1)

    def _few_rotations(self, positions: Tensor, freqs: Tensor) -> Tensor | None:
        """Cosines and sines of a few positions, kept for the layer's other arrays; None where they
        are not few.
        """
        assert self.compiled
        kept = self._rotation
        if kept is None or kept[0] is not positions:
            kept = self._rotation = (positions, {})
        if (found := kept[1].get(id(freqs))) is not None and found[0] is freqs:
            few: Tensor | None = found[1] if len(found) == 2 else None
            return few
        if (turn := self.compiled.rotation(positions, freqs)) is not None:
            kept[1][id(freqs)] = (freqs, turn)
        return turn

    def turned(self, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool) -> Tensor:
        """``apply_rope`` in real numbers: complex ones have no kernels on some devices."""
        rotated = 2 * freqs.shape[0]
        cos, sin = self.turning(positions, freqs)
        if inverse:
            sin = sin.neg()
        real, imaginary = self.widen(x[..., -rotated:]).reshape(*x.shape[:-1], freqs.shape[0], 2).unbind(-1)
        y = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)
        return torch.cat([x[..., :-rotated], self.rounded(y)], -1)

    def turning(self, positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each pair's angle, [tokens, 1, half]; the angle is a float32 product
        in every mode.
        """
        angle = self.widen(positions.to(torch.float32)[:, None] * freqs)[:, None]
        return angle.cos(), angle.sin()

    def rotation(self, positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        """``cos + i sin`` of each pair's angle, [tokens, 1, half], and its inverse; the angle is a
        float32 product in every mode.

        On a CPU those of the last positions are kept: a layer turns four or more arrays by the same
        angles. On a device a kept tensor would break a captured graph.
        """
        kept = self._rotation
        if kept is None or kept[0] is not positions:
            kept = (positions, {})
        if (found := kept[1].get(id(freqs))) is not None and found[0] is freqs and len(found) == 3:
            return found[1], found[2]
        angle = self.widen(positions.to(torch.float32)[:, None] * freqs)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        back = turn.conj()
        if self.on_cpu:
            kept[1][id(freqs)] = (freqs, turn, back := back.resolve_conj())
            self._rotation = kept
        return turn, back
