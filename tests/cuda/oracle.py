"""The model's arithmetic in float64 torch, written from its definition, for judging kernels."""

from __future__ import annotations

import numpy as np
import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
POISON = {
    torch.bfloat16: float("nan"),
    torch.float32: float("nan"),
    torch.uint8: 0x7F,
    torch.int32: -(1 << 30),
    torch.int64: -(1 << 40),
}


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor in the middle of a poisoned buffer, so that a read outside it is seen in the
    result.
    """
    margin = 4096
    buffer = torch.full((tensor.numel() + 2 * margin,), POISON[tensor.dtype], dtype=tensor.dtype)
    view = buffer[margin : margin + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return guarded((torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype))


def uniform_int(low: int, high: int, *shape: int, seed: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return guarded(
        torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64).to(dtype)
    )


def e8m0(byte: torch.Tensor) -> torch.Tensor:
    return torch.exp2(byte.double() - 127)


def e4m3(code: torch.Tensor) -> torch.Tensor:
    return code.view(torch.float8_e4m3fn).double()


def fp8_codes(*shape: int, seed: int) -> torch.Tensor:
    """E4M3 codes of all magnitudes, without NaN."""
    codes = uniform_int(0, 256, *shape, seed=seed)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes


def exponent_byte(amax: torch.Tensor, limit: float) -> torch.Tensor:
    """The published rule, in NumPy on float32 bits."""
    bits = (amax.float().numpy() * np.float32(1 / limit)).view(np.uint32)
    return torch.from_numpy(((bits >> 23) + ((bits & 0x7FFFFF) != 0)).astype(np.int64))


def quantise_fp8(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.double().unflatten(-1, (-1, block))
    byte = exponent_byte(groups.abs().amax(-1).clamp(min=1e-4), 448)
    codes = (groups / e8m0(byte)[..., None]).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).flatten(-2), byte.to(torch.uint8)


def qdq(x: torch.Tensor, format: str, block: int) -> torch.Tensor:
    if format == "e4m3":
        codes, byte = quantise_fp8(x, block)
        return e4m3(codes) * e8m0(byte).repeat_interleave(block, -1)
    groups = x.double().unflatten(-1, (-1, block))
    scale = e8m0(exponent_byte(groups.abs().amax(-1).clamp(min=6 * 2.0**-126), 6))[..., None]
    scaled = (groups / scale).clamp(-6, 6)
    _, exponent = torch.frexp(scaled.abs().clamp(min=1))
    unit = torch.exp2(exponent.double() - 2)
    return (torch.round(scaled / unit) * unit * scale).flatten(-2)


def fp4(packed: torch.Tensor) -> torch.Tensor:
    return E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def fp8_weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    grid = e8m0(scale).repeat_interleave(128, -2).repeat_interleave(128, -1)
    return e4m3(codes) * grid[..., : codes.shape[-2], : codes.shape[-1]]


def fp4_weight(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return fp4(packed) * e8m0(scale).repeat_interleave(32, -1)


def close(got: torch.Tensor, exact: torch.Tensor, *, ulps: float = 0.51, wide: float = 2e-6) -> None:
    """``got`` is ``exact`` rounded once: within ``ulps`` of a BF16 unit, plus ``wide`` of the
    largest value for float32 sums.
    """
    assert torch.isfinite(got.double()).all()
    unit = 2.0**-7 if got.dtype == torch.bfloat16 else 2.0**-23
    _, exponent = torch.frexp(exact.abs())
    allowed = ulps * unit * torch.exp2(exponent.double() - 1) + wide * exact.abs().max()
    worst = ((got.double() - exact).abs() / allowed).max().item()
    assert worst <= 1, f"{worst:.2f} times the allowed error"
