"""What the model of the machine code predicts for the large products of a decode step of the
published models: one token, one GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsv4_backend_cuda import pieces, roofline
from dsv4_backend_cuda.launch import Work, cdiv
from dsv4_core.checkpoint.config import PRESETS, ModelConfig


@dataclass(frozen=True)
class Step:
    """A product of a decode step on one architecture. ``share``: time of memory alone over
    predicted time; never above 1.
    """

    model: str
    layer: str
    kernel: str
    arch: int
    programs: int
    megabytes: float
    microseconds: float
    share: float


@dataclass(frozen=True)
class _Product:
    """``copies``: experts or groups. ``split``: may be cut over its inputs (``pieces``);
    ``reader``: in two pieces too, since the kernel that reads them adds them up; ``awaited``: it
    does so as well, but is not known when the sum is cut. Else a launch of their own does.
    ``beside``: in a launch that was counted already.
    """

    layer: str
    kernel: str
    outputs: int
    inputs: int
    copies: int = 1
    variant: str = "flash"
    split: bool = True
    reader: bool = False
    awaited: bool = False
    beside: bool = False


def _products(c: ModelConfig) -> list[_Product]:
    d, heads, inter = c.hidden_size, c.num_attention_heads * c.head_dim, c.moe_intermediate_size
    experts = c.num_experts_per_tok
    return [
        _Product("wq_a", "linear_decode", c.q_lora_rank, d, awaited=True),
        _Product("wq_b", "linear_decode", heads, c.q_lora_rank),
        _Product("wkv", "linear_decode", c.head_dim, d, awaited=True),
        _Product("wo_a", "grouped_linear_decode", c.o_lora_rank, heads // c.o_groups, c.o_groups, split=False),
        _Product("wo_b", "linear_decode", d, c.o_groups * c.o_lora_rank),
        _Product(
            "compressor wkv, wgate (ratio 4)",
            "bf16_linear_decode",
            4 * c.head_dim,
            d,
            variant="scaled_five",
            awaited=True,
            beside=True,
        ),
        _Product("gate", "bf16_linear_decode", c.n_routed_experts, d, reader=True),
        _Product("experts w1, w3", "fp4_experts_decode", 2 * inter, d, experts, "shared_up", split=False),
        _Product("experts w2", "fp4_experts_decode", d, inter, experts, "shared_down", split=False),
        _Product("shared w1, w3", "linear_decode", 2 * inter, d, variant="pair", reader=True, beside=True),
        _Product("shared w2", "linear_decode", d, inter, beside=True),
        _Product("head", "bf16_linear_decode", c.vocab_size, d),
    ]


BYTES = {
    "linear_decode": 1 + 1 / 128**2,
    "grouped_linear_decode": 1 + 1 / 128**2,
    "fp4_experts_decode": 1 / 2 + 1 / 32,
    "bf16_linear_decode": 2.0,
}
"""Per weight, its scale included."""


def steps(results: Iterable[Any]) -> Iterator[Step]:
    """Predict every product whose kernel is among the results.

    A program passes its hot loop once per 128 inputs (of its piece, where the sum is split); the
    multiprocessor with most programs sets the pace, and those that it holds at a time fill each
    other's waiting; memory is read at its full rate; each launch comes on top, of products that
    share one once. The sparse attention's list is the window and ``index_topk`` rows.
    """
    built = {(r.kernel, r.variant, r.arch): r for r in results if not r.unsupported and r.loop_instructions}
    for name in ("flash", "pro"):
        config = PRESETS[name]
        for arch, device in roofline.DEVICES.items():
            for p in _products(config):
                if r := built.get((p.kernel, p.variant, arch)):
                    programs, passes = cdiv(p.outputs, r.config["BLOCK_N"]) * p.copies, p.inputs // 128
                    span = pieces.span(programs, passes, arch, reader=p.reader) if p.split else passes
                    count = cdiv(passes, span)
                    split = built.get((p.kernel, "split", arch), r) if count > 1 and p.variant == "flash" else r
                    size = p.outputs * p.inputs * p.copies * BYTES[p.kernel]
                    launches = 1 - p.beside + (count > 1 and not p.reader and not p.awaited)
                    yield _step(name, p.layer, split, device, programs * count, span, size, launches)
            if r := built.get(("sparse_attn", "decode", arch)):
                rows = config.sliding_window + config.index_topk
                programs = cdiv(config.num_attention_heads, r.config["HEADS"]) * cdiv(rows, r.config["SPLIT"])
                passes = r.config["SPLIT"] // r.config["ROWS"]
                yield _step(name, "sparse_attn", r, device, programs, passes, rows * 2.0 * config.head_dim, 2)


def _step(
    model: str, layer: str, r: Any, device: roofline.Device, programs: int, passes: int, size: float, launches: int
) -> Step:
    memory = size / (device.gigabytes_per_second * 1e9)
    most = -(
        -programs // device.multiprocessors
    )  # programs of the busiest multiprocessor, and those that it holds at a time
    together, warps = min(most, max(r.blocks, 1)), r.config["num_warps"]
    once = roofline.estimate(
        device,
        Work(0.0),
        instructions=r.loop_instructions,
        warps=warps,
        conversions=r.conversions,
        stalls=r.stall_cycles,
        blocks=together,
    )
    cycles = most * passes * once.predicted
    time = max(memory, cycles / (device.gigahertz * 1e9)) + launches * roofline.LAUNCH
    return Step(
        model, layer, r.kernel, r.arch, programs, round(size / 1e6, 3), round(time * 1e6, 2), round(memory / time, 4)
    )
