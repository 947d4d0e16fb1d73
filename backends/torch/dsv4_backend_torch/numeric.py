"""Dtypes by name, widening and rounding; what every family of ops is written in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dsv4_core.dtypes import E8M0_VALUES, Host
from dsv4_core.spec import Ops


def torch_dtype(name: str) -> torch.dtype:
    """Give torch's dtype object for a dtype name; raise ``ValueError`` where this torch has none. Looked up when called, never at import."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown to torch {torch.__version__}; bytes of it travel as uint8")
    return found


@functools.cache
def table(values: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Float32 values as a lookup table in ``dtype`` on ``device``; one copy of each is kept."""
    return torch.frombuffer(bytearray(values), dtype=torch.float32).to(device=device, dtype=dtype)


class Numeric(Ops):
    """Conversions between an op's operands and the dtype that it computes in."""

    device: Any  # a torch.device once the backend is constructed

    @property
    def wide_type(self) -> torch.dtype:
        """The dtype inside ops."""
        return torch.float64 if self.numerics == "float64" else torch.float32

    @property
    def act_type(self) -> torch.dtype:
        """The dtype between ops."""
        return torch.bfloat16 if self.numerics == "native" else self.wide_type

    @property
    def on_cpu(self) -> bool:
        """Say whether arrays are in host memory, where reading one costs no synchronisation."""
        return bool(self.device.type == "cpu")

    def widen(self, x: Tensor) -> Tensor:
        """Take an operand to the dtype inside ops; exact."""
        return x.to(self.wide_type)

    def rounded(self, x: Tensor) -> Tensor:
        """Round a result once to the activation dtype."""
        return x.to(self.act_type)

    def lookup(self, values: Host, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """``values[codes]`` in ``dtype``; ``values`` is one of the format tables of ``dsv4_core.dtypes``, in float32."""
        found = table(values.tobytes(), dtype, codes.device).index_select(0, codes.reshape(-1).to(torch.int32))
        return found.reshape(codes.shape)

    def scale_values(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of E8M0 bytes: powers of two; 255 is NaN."""
        return self.lookup(E8M0_VALUES, scale, dtype)
