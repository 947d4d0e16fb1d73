"""The C kernels of ``c/``, for a decode step on a CPU: built with the compiler that is there, kept, and called.

PyTorch's calls cost more than what they compute there, and its products of one row in BF16 read half of what memory gives.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_core.contract.dtypes import FP4_GROUP, KV_BLOCK, ScaledArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsv4_core.contract.dtypes import Format, RowLayout

    Weight = Tensor | ScaledArray

SOURCES = Path(__file__).parent / "c"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in values.h
_DONE, _NO_MEMORY = 0, 2  # what kernels give; 1: not for them
FEW = 8  # tokens of a decode step: up to here the number of calls counts, not their size
FEW_VALUES = 1 << 16  # elements up to which one thread is done before others have woken up
STREAMS = 4  # of hyper-connections: the published models'
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double
_SIGNATURES = {
    "gemv": (_POINTER, _INT),
    "experts": (*[_POINTER] * 5, *[_INT] * 6, _FLOAT),
    "gate": (_POINTER, _INT, *[_POINTER] * 4, *[_INT] * 3, _FLOAT),
    "rms_norm": (_POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _INT, _DOUBLE),
    "hc_pre": (_POINTER, _INT, *[_POINTER] * 4, _INT, *[_POINTER] * 3, _INT, _INT, _DOUBLE, _DOUBLE, _INT),
    "apply_rope": (_POINTER, _POINTER, _INT, _POINTER, *[_INT] * 5),
    "act_qdq": (_POINTER, _POINTER, *[_INT] * 6),
    "cache_write": (_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER),
    "cache_read": (_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER),
    "hc_post": (_POINTER, _POINTER, _INT, *[_POINTER] * 3, _INT, _INT),
}


class NotCompiledError(Exception):
    """Why the kernels cannot be built or loaded here, and what to do."""


class Kernels:
    """A few tokens' ops on float32 and BF16 tensors in host memory. ``compiler``: its version.

    Each method is the contract of its name and gives None where the kernel is not for these operands (too many, of other dtypes or
    shapes, not contiguous, not finite, out of range): PyTorch's way is then taken, and raises what there is to raise. All raise
    ``MemoryError``.
    """

    def __init__(self, path: Path, compiler: str) -> None:
        self.compiler = compiler
        library = ctypes.CDLL(str(path))
        self._call: dict[str, Callable[..., int]] = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            self._call[name] = function

    def _run(self, name: str, *arguments: float | None) -> bool:
        """Call; say whether the kernel did it."""
        status = self._call[name](*arguments)
        if status == _NO_MEMORY:
            raise MemoryError(f"{name} of the torch backend's C kernels got no memory for a few rows in float32")
        return status == _DONE

    def products(self, products: Sequence[tuple[Tensor, Sequence[Weight]]], dtype: torch.dtype) -> Tensor | None:
        """``x @ concat(weights).T`` of each pair, one below the other, in ``dtype``; all pairs are of the same widths."""
        rows, width = 0, sum(weight.shape[0] for weight in products[0][1])
        for x, weights in products:
            rows += x.shape[0]
            if x.shape[0] > FEW or not (_taken(x) and _weights(weights)):
                return None
        y = torch.empty((rows, width), dtype=dtype)
        fields = array("q")
        to, size, y_type = y.data_ptr(), dtype.itemsize, _TYPES[dtype]
        for x, weights in products:
            start, x_type, tokens = x.data_ptr(), _TYPES[x.dtype], x.shape[0]
            at = to
            for weight in weights:
                out, cols = weight.shape
                if cols != x.shape[1]:
                    return None
                fields.extend((*_fields(weight), start, at, x_type, y_type, out, cols, tokens, width))
                at += out * size
            to += tokens * width * size
        return y if self._run("gemv", fields.buffer_info()[0], len(fields) // 11) else None

    def experts(
        self, x: Tensor, weights: Sequence[Weight], share: Tensor | None, shared: Tensor | None, limit: float, dtype: torch.dtype,
        *, quantise: bool,
    ) -> Tensor | None:  # fmt: skip
        """One row ``x`` [1, dim] through experts, given as w1, w3, w2 one after another, summed onto ``shared``, in ``dtype``.

        ``quantise``: what w2 multiplies, as ``act_qdq`` in blocks of 128.
        """
        if x.shape[0] != 1 or not (_taken(x) and _weights(weights) and _wide(share)):
            return None
        if shared is not None and not (shared.dtype == x.dtype and shared.is_contiguous()):
            return None
        fields = [_fields(weight) for weight in weights]
        if len({fields[0][2], *(kind for _, _, kind in fields)}) > 1:
            return None
        inter, dim = weights[0].shape
        if any(weight.shape != ((dim, inter) if i % 3 == 2 else (inter, dim)) for i, weight in enumerate(weights)):
            return None
        if (
            x.shape[1] != dim
            or (share is not None and share.numel() != len(weights) // 3)
            or (shared is not None and shared.numel() != dim)
        ):
            return None
        y = torch.empty((1, dim), dtype=dtype)
        described = array("q", [number for each in fields for number in each])
        done = self._run(
            "experts", described.buffer_info()[0], x.data_ptr(), _address(share), _address(shared), y.data_ptr(),
            _TYPES[x.dtype], _TYPES[dtype], len(weights) // 3, dim, inter, quantise, limit,
        )  # fmt: skip
        return y if done else None

    def gate(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor | None, topk: int, route_scale: float
    ) -> tuple[Tensor, Tensor] | None:
        """Contract of ``gate``, or without ``bias`` and with ``indices`` of ``gate_hash``, for one token."""
        if x.shape[0] != 1 or not (_taken(x, weight) and _wide(bias)):
            return None
        experts, dim = weight.shape
        if x.shape[1] != dim or (bias is not None and bias.shape != (experts,)):
            return None
        described = array("q", _fields(weight))
        chosen = torch.empty((1, topk), dtype=torch.int32) if indices is None else indices.to(torch.int32, copy=True)
        shares = torch.empty((1, topk))
        done = self._run(
            "gate", x.data_ptr(), _TYPES[x.dtype], described.buffer_info()[0], _address(bias), chosen.data_ptr(),
            shares.data_ptr(), experts, dim, topk, route_scale,
        )  # fmt: skip
        return (shares, chosen) if done else None

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
        """Contract of ``rms_norm``."""
        rows, dim = x.shape
        if rows * dim > FEW_VALUES or not _taken(x):
            return None
        if weight is not None and not (_taken(weight) and weight.shape == (dim,)):
            return None
        y = torch.empty_like(x)
        weight_type = 0 if weight is None else _TYPES[weight.dtype]
        done = self._run(
            "rms_norm", x.data_ptr(), y.data_ptr(), _TYPES[x.dtype], _address(weight), weight_type, rows, dim, eps
        )
        return y if done else None

    def apply_rope(self, x: Tensor, turn: Tensor, *, inverse: bool) -> Tensor | None:
        """``turn`` [tokens, 1, half]: cosines and sines as complex64."""
        tokens, heads, dim = x.shape
        if tokens > FEW or not _taken(x) or turn.shape[0] != tokens or 2 * turn.shape[2] > dim:
            return None
        y = torch.empty_like(x)
        done = self._run(
            "apply_rope",
            x.data_ptr(),
            y.data_ptr(),
            _TYPES[x.dtype],
            turn.data_ptr(),
            tokens,
            heads,
            dim,
            turn.shape[2],
            inverse,
        )
        return y if done else None

    def act_qdq(self, x: Tensor, fmt: Format, block: int, channels: int) -> Tensor | None:
        """Contract of ``act_qdq``, in native numerics."""
        rows, dim = x.shape
        if rows * dim > FEW_VALUES or channels > dim or channels % block or not _taken(x):
            return None
        y = torch.empty_like(x)
        done = self._run(
            "act_qdq", x.data_ptr(), y.data_ptr(), _TYPES[x.dtype], rows, dim, channels, block, fmt == "e4m3"
        )
        return y if done else None

    def hc_pre(
        self,
        h: Tensor,
        fn: Tensor,
        scale: Tensor,
        base: Tensor,
        norm: Tensor | None,
        norm_eps: float,
        eps: float,
        iters: int,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Contract of ``hc_pre``, or with ``norm`` of ``hc_pre_norm``, for four streams."""
        tokens, streams, dim = h.shape
        if streams != STREAMS or tokens > FEW or not (_taken(h) and _wide(fn, scale, base)):
            return None
        mixes = STREAMS * (STREAMS + 2)
        if fn.shape != (mixes, STREAMS * dim) or scale.shape != (3,) or base.shape != (mixes,):
            return None
        if norm is not None and not (_taken(norm) and norm.shape == (dim,)):
            return None
        y = torch.empty((tokens, dim), dtype=h.dtype)
        post, comb = torch.empty((tokens, STREAMS)), torch.empty((tokens, STREAMS, STREAMS))
        done = self._run(
            "hc_pre", h.data_ptr(), _TYPES[h.dtype], fn.data_ptr(), scale.data_ptr(), base.data_ptr(), _address(norm),
            0 if norm is None else _TYPES[norm.dtype], y.data_ptr(), post.data_ptr(), comb.data_ptr(), tokens, dim, norm_eps, eps, iters,
        )  # fmt: skip
        return (y, post, comb) if done else None

    def hc_post(self, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor | None:
        """Contract of ``hc_post``, for four streams."""
        tokens, streams, dim = h.shape
        if streams != STREAMS or tokens > FEW or y.dtype != h.dtype or not (_taken(y, h) and _wide(post, comb)):
            return None
        if y.shape != (tokens, dim) or post.shape != (tokens, STREAMS) or comb.shape != (tokens, STREAMS, STREAMS):
            return None
        out = torch.empty_like(h)
        done = self._run(
            "hc_post",
            y.data_ptr(),
            h.data_ptr(),
            _TYPES[h.dtype],
            post.data_ptr(),
            comb.data_ptr(),
            out.data_ptr(),
            tokens,
            dim,
        )
        return out if done else None

    def cache_write(self, cache: Tensor, rows: Tensor, index: Tensor, layout: RowLayout) -> bool:
        """Say whether rows were stored; where not, nothing is promised of those that ``index`` names."""
        return (
            index.shape[0] <= FEW
            and _taken(rows)
            and rows.dtype == (cache.dtype if layout.kind == "plain" else torch.bfloat16)
            and rows.shape == (index.shape[0], layout.dim)
            and cache.shape[1] == layout.width
            and _whole_blocks(layout)
            and cache.is_contiguous()
            and _indices(index)
            and self._run(
                "cache_write", cache.data_ptr(), cache.shape[0], rows.data_ptr(), _TYPES[rows.dtype], index.data_ptr(),
                index.shape[0], _layout(layout),
            )
        )  # fmt: skip

    def cache_read(
        self, cache: Tensor, index: Tensor, layout: RowLayout, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor | None:
        """Contract of ``cache_read``, in ``dtype``, or into ``out``."""
        if dtype not in _TYPES or not (cache.is_contiguous() and _indices(index)):
            return None
        if cache.shape[1] != layout.width or not _whole_blocks(layout):
            return None
        if layout.kind == "plain" and cache.dtype not in _TYPES:
            return None
        rows = torch.empty((index.shape[0], layout.dim), dtype=dtype) if out is None else out
        done = self._run(
            "cache_read", cache.data_ptr(), cache.shape[0], _TYPES.get(cache.dtype, 0), index.data_ptr(), index.shape[0],
            rows.data_ptr(), _TYPES[dtype], _layout(layout),
        )  # fmt: skip
        return rows if done else None


def _taken(*tensors: object) -> bool:
    """Say whether all are contiguous, float32 or BF16."""
    for tensor in tensors:  # noqa: SIM110  all() takes twice the time
        if not (isinstance(tensor, Tensor) and tensor.dtype in _TYPES and tensor.is_contiguous()):
            return False
    return True


def _weights(weights: Sequence[Weight]) -> bool:
    """Say whether all are contiguous float32, BF16, or E4M3 or E2M1 codes with their scales."""
    return all(
        weight.format != "int8" and weight.data.is_contiguous() and weight.scale.is_contiguous()
        if isinstance(weight, ScaledArray)
        else _taken(weight)
        for weight in weights
    )


def _fields(weight: Weight) -> tuple[int, int, int]:
    """A weight as ``weights.h`` describes it."""
    if isinstance(weight, ScaledArray):
        return weight.data.data_ptr(), weight.scale.data_ptr(), 2 if weight.format == "e4m3" else 3
    return weight.data_ptr(), 0, _TYPES[weight.dtype]


def _wide(*tensors: Tensor | None) -> bool:
    """Say whether all are contiguous float32, or absent."""
    return all(tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()) for tensor in tensors)


def _indices(tensor: Tensor) -> bool:
    """Say whether these are contiguous int32."""
    return tensor.dtype == torch.int32 and tensor.is_contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _whole_blocks(layout: RowLayout) -> bool:
    return layout.kind == "plain" or not (layout.dim - layout.rope_dim) % (
        KV_BLOCK if layout.kind == "kv" else FP4_GROUP
    )


@functools.cache
def _kept_layout(layout: RowLayout) -> array[int]:
    return array("q", (("plain", "kv", "key").index(layout.kind), layout.dim, layout.rope_dim, layout.width))


def _layout(layout: RowLayout) -> int:
    return _kept_layout(layout).buffer_info()[0]


@functools.cache
def build() -> Kernels:
    """Compile for this CPU, or find what was compiled with these sources, compiler and CPU; raise ``NotCompiledError``."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    target = run([*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull])  # its version, every instruction set
    key = hashlib.sha256(target.encode() + b"".join(source.read_bytes() for source in sorted(SOURCES.iterdir())))
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4"
        path = folder / f"torch-backend-{key.hexdigest()[:16]}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:  # several processes may build at once
                made = Path(own) / path.name
                run([*compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), "-lm", "-o", str(made)])
                made.replace(path)
        version = next(line for line in target.splitlines() if " __VERSION__ " in line).split('"')[1]
        return Kernels(path, f"{compiler[0]} {version}")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise NotCompiledError(
            f"C kernels cannot be kept or loaded: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error


def run(command: list[str]) -> str:
    """Run a compiler; give what it prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  the user's own compiler
    except FileNotFoundError:
        raise NotCompiledError(f"no C compiler {command[0]!r}: install one (gcc), or name it in CC") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[0]
        raise NotCompiledError(f"{command[0]} does not build c/*.c: {said}; name another compiler in CC") from None
