"""Cases of products: a function an op, with its name."""

from __future__ import annotations

from typing import Any

from dsv4_conformance.cases.case import Case


def _in(size: int, **others: int) -> dict[str, Any]:
    """Sizes with the axis ``in``, which Python reserves."""
    return {"in": size, **others}


def linear() -> tuple[Case, ...]:
    base = Case("bf16", {"tokens": 5, "in": 256, "out": 192}, {"out_dtype": "act"}, tier="smoke")
    fp8, fp4 = {"weight": "e4m3"}, {"weight": "e2m1"}
    return (
        base,
        base.but("wide", "smoke", out_dtype="wide"),
        base.but("float32", dtypes={"weight": "float32"}, out_dtype="wide"),
        base.but("fp8", "smoke", dtypes=fp8),
        base.but("fp4", "smoke", dtypes=fp4),
        *(odd.but(f"fp8_{odd.name}", odd.tier, dtypes=fp8) for odd in base.odd()),
        *(odd.but(f"fp4_{odd.name}", odd.tier, dtypes=fp4) for odd in base.odd(sizes=(0, 1, 17, 65))),
        *(odd.but(f"bf16_{odd.name}", odd.tier) for odd in base.odd(sizes=(0, 1, 17))),
        base.but("fp8_out=129", dtypes=fp8, out=129),  # one row past a scale block
        base.but("fp8_out=1", dtypes=fp8, out=1),
        base.but("fp4_out=33", dtypes=fp4, out=33),
        *(
            base.but(f"{name}_{data}", "smoke" if data == "cancel" else "standard", dtypes=dtypes, data=data)
            for name, dtypes in (("fp8", fp8), ("fp4", fp4), ("bf16", {}))
            for data in ("outliers", "zero_rows", "cancel", "positive")
        ),
        *(
            base.but(f"{name}_scale_ends", "smoke", dtypes=dtypes, data="scale_ends")
            for name, dtypes in (("fp8", fp8), ("fp4", fp4))
        ),
        base.but("fp8_every_code", "smoke", dtypes=fp8, data="one_hot", tokens=256, out=256),
        base.but("fp4_every_code", "smoke", dtypes=fp4, data="one_hot", tokens=256, out=256),  # and every scale
        base.but("fp8_every_scale", dtypes=fp8, data="one_hot", **_in(1024, tokens=8, out=3712)),
        base.but("fp4_last_byte", dtypes=fp4, data="last_byte"),
        base.but("fp8_subnormal", dtypes=fp8, data="subnormal"),
        base.but("fp8_floor", dtypes=fp8, data="below_floor"),  # the quantisation within has its floor, too
        base.but("fp4_floor", dtypes=fp4, data="below_floor"),
        base.but("fp4_late", dtypes=fp4, data="late"),
        base.but("fp8_views", views=True, dtypes=fp8),
        base.but("fp4_views", views=True, dtypes=fp4),
        base.but("bf16_views", views=True),
        base.but("bf16_nan", data="nan"),
        *(odd.but(f"int8_{odd.name}", odd.tier, dtypes={"weight": "int8"}) for odd in base.odd(sizes=(0, 1, 17, 65))),
        base.but("int8", "smoke", dtypes={"weight": "int8"}),
        base.but("int8_outliers", dtypes={"weight": "int8"}, data="outliers"),
        base.but("int8_zero_rows", dtypes={"weight": "int8"}, data="zero_rows"),
        base.but("int8_long_sums", dtypes={"weight": "int8"}, data="positive", **_in(4096, tokens=3, out=128)),
        *(
            base.but(f"{name}_deep_and_tall", dtypes=dtypes, **_in(4096, tokens=2, out=1024))  # Flash's wq_a
            for name, dtypes in (("bf16", {}), ("fp8", fp8), ("fp4", fp4))
        ),
        base.but("float32_rounded", dtypes={"weight": "float32"}),  # what a checkpoint's odd scales are read as
        base.but("flash_wkv", dtypes=fp8, **_in(4096, tokens=7, out=512)),
        base.but("flash_long_sums", dtypes=fp4, data="positive", **_in(4096, tokens=3, out=128)),
        base.but("flash_compressor", out_dtype="wide", **_in(4096, tokens=7, out=512)),
        base.but("flash_wq_b", "full", dtypes=fp8, **_in(1024, tokens=3, out=32768)),
        base.but("flash_wo_b", "full", dtypes=fp8, **_in(8192, tokens=17, out=4096)),
        base.but("pro_wq_a", "full", dtypes=fp8, **_in(7168, tokens=17, out=1536)),
        base.but("pro_w1", "full", dtypes=fp4, **_in(7168, tokens=17, out=3072)),
    )


def grouped_linear() -> tuple[Case, ...]:
    base = Case("bf16", {"tokens": 5, "groups": 2, "in": 256, "out": 128}, tier="smoke")
    fp8 = {"weight": "e4m3"}
    return (
        base,
        base.but("fp8", "smoke", dtypes=fp8),
        *(odd.but(f"fp8_{odd.name}", odd.tier, dtypes=fp8) for odd in base.odd()),
        base.but("float32", dtypes={"weight": "float32"}),
        base.but("fp8_out=320", dtypes=fp8, out=320),  # a group's rows begin inside a scale block
        base.but("fp8_outliers", "smoke", dtypes=fp8, data="outliers"),
        base.but("fp8_cancel", dtypes=fp8, data="cancel"),
        base.but("fp8_views", views=True, dtypes=fp8),
        base.but("fp8_every_code", "smoke", dtypes=fp8, data="one_hot", tokens=256, groups=1, out=256),
        base.but("fp8_every_scale", dtypes=fp8, data="one_hot", groups=1, **_in(1024, tokens=8, out=3712)),
        base.but("flash", dtypes=fp8, groups=8, out=1024, **_in(4096)),
        base.but("pro", "full", dtypes=fp8, groups=16, out=16384, **_in(4096)),
    )


def expert_linear() -> tuple[Case, ...]:
    base = Case("fp4", {"rows": 24, "experts": 6, "in": 128, "out": 96}, dtypes={"weight": "e2m1"}, tier="smoke")
    return (
        base,
        base.but("fp8", "smoke", dtypes={"weight": "e4m3"}, out=160),
        base.but("bf16", dtypes={"weight": "bfloat16"}),
        base.but("float32", dtypes={"weight": "float32"}),
        base.but("int8", "smoke", dtypes={"weight": "int8"}, out=160),
        base.but("int8_one_expert", dtypes={"weight": "int8"}, data="one_expert"),
        base.but("int8_other_ranks", dtypes={"weight": "int8"}, data="other_ranks"),
        *base.odd("rows"),
        base.but("one_expert", "smoke", data="one_expert"),
        base.but("other_ranks", "smoke", data="other_ranks"),
        base.but("nothing_here", data="nothing_here"),
        base.but("last_byte", data="last_byte"),
        base.but("outliers", data="outliers"),
        base.but("floor", data="below_floor"),
        base.but("fp8_floor", dtypes={"weight": "e4m3"}, data="below_floor", out=160),
        base.but("scale_ends", data="scale_ends"),
        base.but("every_scale", data="one_hot", **_in(256, experts=3, out=96)),
        base.but("views", views=True),
        base.but("flash", experts=3, out=512, **_in(4096)),
        base.but("flash_w1", "full", rows=48, experts=8, out=2048, **_in(4096)),
        base.but("pro_w2", "full", rows=48, experts=8, out=7168, **_in(3072)),
    )


def logits() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256, "vocab": 512}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("cancel", data="cancel"),
        base.but("views", views=True),
        base.but("flash", tokens=2, dim=4096, vocab=2048),
    )
