"""Other scalars than the published models have: an op with a constant built in, or that takes one
scalar for another, is seen by them alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_conformance.cases.pairs import MOST, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dsv4_conformance.cases.case import Case

Change = dict[str, Any]

TWO_EPS = [{"norm_eps": 0.25, "eps": 0.02}]
OTHERS: Mapping[str, Sequence[Change]] = {
    "sample": [{"temperature": t, "top_p": p} for t, p in ((2.5, 1.0), (0.2, 0.99), (1e4, 0.5), (1e-4, 1.0))],
    "rms_norm": [{"eps": 0.5}, {"eps": 1e-12}],
    "rms_norm_rope": [{"eps": 0.5}],
    "act_quant": [{"block": 32}],
    "act_qdq": [{"block": 32}, {"channels": 64}, {"channels": 128}, {"block": 128, "channels": 128}],
    "gate": [{"route_scale": 1.0}, {"route_scale": 2.5}],
    "gate_hash": [{"route_scale": 1.0}, {"route_scale": 2.5}],
    "dispatch": [{"first_expert": 1, "n_experts": 7}],
    "swiglu": [{"limit": 0.25}, {"limit": 1e4}],
    "combine": [{"out_dtype": "wide"}, {"out_dtype": "wide", "topk": 1}],
    "ffn": [{"limit": 3.0}],
    "moe": [{"limit": 3.0}, {"out_dtype": "wide"}, {"out_dtype": "wide", "first_expert": 1}],
    "linear": [{"out_dtype": "wide"}],
    "index_scores": [{"scale": 0.3}],
    "index_topk": [{"scale": 0.3}, {"topk": 5}],
    "cached_index_topk": [{"scale": 0.3}, {"topk": 5}],
    "index_select": [{"topk": 5}],
    "sparse_attn": [{"softmax_scale": 0.01}, {"softmax_scale": 0.5}],
    "cached_sparse_attn": [{"softmax_scale": 0.01}, {"softmax_scale": 0.5}],
    "hc_expand": [{"hc": 2}, {"hc": 3}],
    "hc_add": [{"hc": 2}, {"hc": 3}],
    "hc_post": [{"hc": 2}, {"hc": 3}],
    "hc_split_sinkhorn": [{"eps": 0.02}, {"iters": 2}, {"iters": 3}, {"hc": 2}, {"hc": 3}],
    "hc_pre": [*TWO_EPS, {"iters": 2}, {"hc": 2}, {"hc": 3}],
    "hc_pre_norm": [*TWO_EPS, {"iters": 2}, {"hc": 2}, {"hc": 3}],
    "hc_head": [*TWO_EPS, {"hc": 2}, {"hc": 3}],
}
"""Per op the changes to the scalars of its first case, and of those that ``FIRST`` names."""

FIRST: Mapping[str, Sequence[str]] = {
    "linear": ("bf16", "fp8", "fp4"),
    "act_qdq": ("kv", "key"),
    "swiglu": ("routed", "shared"),
    "combine": ("small", "routed_alone"),
    "moe": ("fp4", "other_ranks"),
}
DATA: Mapping[str, str] = {
    **dict.fromkeys(("hc_split_sinkhorn", "hc_pre", "hc_pre_norm"), "slow"),  # where every iteration shows
    **dict.fromkeys(("act_quant", "act_qdq"), "outliers"),  # where a block's size shows
}


def rescaled(op: str, cases: Sequence[Case]) -> list[Case]:
    """The op's cases with other scalars, from those that are declared."""
    by_name = {c.name: c for c in cases}
    found = []
    for base in (by_name[name] for name in FIRST.get(op, (cases[0].name,))):
        for change in OTHERS.get(op, ()):
            if change.items() <= {**base.sizes, **base.scalars}.items():
                continue
            name = "_".join(
                [base.name, "with", *(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in change.items())]
            )
            found.append(base.but(name, "standard", data=DATA.get(op, ""), **change))
    return found


ROWS = (1, 65)  # a decode step's kernel and a tile's, each of which may have a constant built in


def beside_rows(op: str, cases: Sequence[Case]) -> Iterator[Case]:
    """Of ``cases`` one of each combination of scalars and formats that no smoke case has, with one
    row and with more than a tile.
    """
    seen, names = {_kind(c) for c in cases if c.tier == "smoke"}, {c.name for c in cases}
    for case in cases:
        if case.tier != "standard" or case.views or _kind(case) in seen or case.name.startswith(("flash", "pro")):
            continue
        seen.add(_kind(case))
        axis = rows_of(case)
        for n in ROWS:
            sizes: Change = {axis: n}
            if {"slots", "n"} <= case.sizes.keys():
                sizes["slots"] = max(case.sizes["slots"], n + 1)
            if n <= MOST.get(op, n) and f"{case.name}_{axis}={n}" not in names:
                yield case.but(f"{case.name}_{axis}={n}", **sizes)


def _kind(case: Case) -> tuple[object, ...]:
    return tuple(sorted(case.scalars.items())), tuple(sorted(case.dtypes.items()))
