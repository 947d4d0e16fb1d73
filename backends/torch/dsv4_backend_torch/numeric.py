"""Dtypes by name, widening and rounding; what every family of ops is written in."""

from __future__ import annotations

import functools
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv4_backend_torch.compiled import Kernels, build
from dsv4_backend_torch.kept import NotCompiledError
from dsv4_core.contract import dtypes
from dsv4_core.contract.spec import Ops

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 1 << 18  # elements: 1 MB in float32, the second cache level of a core
_DOUBLE = {
    2: torch.int32,
    4: torch.int64,
    8: torch.complex128,
}  # dtypes of twice the width, to look two values up at once


def torch_dtype(name: str) -> torch.dtype:
    """Give torch's dtype object for a dtype name; raise ``ValueError`` where this torch has none.
    Looked up when called, never at import.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(  # noqa: TRY004  the name is wrong, not its type
            f"dtype {name!r} is unknown to torch {torch.__version__}; bytes of it travel as uint8"
        )
    return found


@functools.cache
def table(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One of the format tables of ``dsv4_core.contract.dtypes`` in ``dtype`` on ``device``. Pairs
    of values are one element of twice the width.
    """
    values = torch.from_numpy(getattr(dtypes, name).copy()).to(device=device, dtype=dtype)
    return values if values.ndim == 1 else values.view(_DOUBLE[dtype.itemsize])[:, 0]


class Numeric(Ops):
    """Conversions between an op's operands and the dtype that it computes in."""

    device: Any  # a torch.device once the backend is constructed
    few_tokens_by: str = "torch"  # an option of the torch backend, not of those that extend it

    @cached_property
    def wide_type(self) -> torch.dtype:
        """The dtype inside ops."""
        return torch.float64 if self.numerics == "float64" else torch.float32

    @cached_property
    def act_type(self) -> torch.dtype:
        """The dtype between ops."""
        return torch.bfloat16 if self.numerics == "native" else self.wide_type

    @cached_property
    def compiled(self) -> Kernels | None:
        """The C kernels for a few tokens on a CPU; None where PyTorch does everything: by option,
        in float64, without a compiler.

        Raises ``NotCompiledError`` where they cannot be built and the option says that they must.
        """
        if not self.on_cpu or self.few_tokens_by == "torch" or self.numerics == "float64":
            return None
        try:
            return build()
        except NotCompiledError:
            if self.few_tokens_by == "c":
                raise
            return None

    @cached_property
    def on_cpu(self) -> bool:
        """Say whether arrays are in host memory, where reading one costs no synchronisation."""
        return bool(self.device.type == "cpu")

    def widen(self, x: Tensor) -> Tensor:
        """Take an operand to the dtype inside ops; exact."""
        return x if x.dtype == self.wide_type else x.to(self.wide_type)

    def rounded(self, x: Tensor) -> Tensor:
        """Round a result once to the activation dtype."""
        return x if x.dtype == self.act_type else x.to(self.act_type)

    def blocks(self, rows: int, width: int) -> Iterator[slice]:
        """Slices of rows that fill the second cache level of a CPU in float32; on a device, all
        rows at once.
        """
        step = max(1, BLOCK // max(1, width)) if self.on_cpu else max(1, rows)
        return (slice(i, i + step) for i in range(0, rows, step))

    def lookup(self, name: str, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of codes by one of the tables of ``dsv4_core.contract.dtypes``: several times
        faster on a CPU than torch's own casts from float8.
        """
        return table(name, dtype, codes.device).index_select(0, codes.to(torch.int32).reshape(-1)).reshape(codes.shape)

    def scale_values(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of E8M0 bytes: powers of two; 255 is NaN."""
        if self.on_cpu and (e8m0 := getattr(torch, "float8_e8m0fnu", None)):
            return scale.view(e8m0).to(dtype)
        return self.lookup("E8M0_VALUES", scale, dtype)
