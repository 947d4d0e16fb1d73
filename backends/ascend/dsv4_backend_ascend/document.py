"""The generated part of docs/ascend.md: which op runs what on which chip, how far that was proven,
and what runs on simulated CANN showed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_backend_ascend.proof import RUNGS
from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.files.markdown import in_lines

BEGIN, END = "<!-- generated: tools/collect.py -->", "<!-- end of generated part -->"


def page(
    text: str,
    proofs: dict[str, Any],
    runs: dict[str, dict[str, Any]],
    selftests: dict[str, dict[str, Any]],
    planted: dict[str, Any],
    l1: dict[str, Any],
    l2: dict[str, Any],
    errors: dict[str, dict[str, float]],
    counted: dict[str, Any],
    kernels: dict[str, Any],
    replayed: dict[str, Any],
    planted_kernels: dict[str, Any],
) -> str:
    """The page with its generated part made new. ``runs``: of the conformance suite, ``selftests``:
    at full sizes, by chip.
    """
    before, _, rest = text.partition(BEGIN)
    lines = [
        *_rungs(proofs, l1, l2),
        *_calls(proofs),
        *_composed(proofs),
        *_runs(runs),
        *_selftests(selftests),
        *_planted(planted),
        *_launches(counted),
        *_saved(counted),
        *_kernels(kernels),
        *_replayed(replayed),
        *_planted_kernels(planted_kernels),
        *_w8a8(runs, errors),
        *_memory(),
    ]
    return in_lines("\n".join([before + BEGIN, "", *lines, END]) + rest.partition(END)[2])


def _launches(counted: dict[str, Any]) -> list[str]:
    """What ``dsv4 ascend launches`` counted."""
    if not counted:
        return []
    rows = []
    for name, step in counted["steps"].items():
        layers = sorted(step["layers"].values())
        most = ", ".join(f"{contract} {n}" for contract, n in list(step["contracts"].items())[:4])
        again = "yes" if not (step["recorded"]["moved"] or step["recorded"]["read on the host"]) else "no"
        rows.append(
            f"| {name} | {step.get('before', '-')} | {step['launches']} | {layers[0]} to {layers[-1]} | {step['AICPU']} | {again} | {most} |"
        )
    return [
        "### Launches of a decode step",
        "",
        f"{counted['says'][0].upper()}{counted['says'][1:]} ({counted['date']}).",
        "",
        "| chip, tier | before | launches | a layer | on AICPU | can be recorded | most by |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _saved(counted: dict[str, Any]) -> list[str]:
    """What kernels of our own save, contract by contract."""
    plain, kernels = (counted.get("steps", {}).get(f"910B cann{more}", {}).get("contracts") for more in ("", " triton"))
    if not plain or not kernels:
        return []
    rows = [f"| {name} | {plain[name]} | {kernels.get(name, 0)} | {text} |" for name, text in OF_WHICH.items()]
    rest = [sum(n for name, n in found.items() if name not in OF_WHICH) for found in (plain, kernels)]
    return [
        "### The step on 910B, cann tier, by contract",
        "",
        "| contract | launches | with kernels of our own | of which |",
        "|---|---|---|---|",
        *rows,
        f"| the others | {rest[0]} | {rest[1]} | compressors' products, the indexer, streams back, joins and projections |",
        "",
    ]


OF_WHICH = {
    "hc_pre_norm": "widening, product, and a kernel for Sinkhorn, mixing and norm",
    "moe": "rows twice and the products; expansion, SwiGLU and the sum are kernels",
    "linear": "the product: who made its rows rounded them, too",
    "ffn": "two products, and SwiGLU with its rounding",
    "act_qdq": "a kernel, or nothing where a rotation rounded",
    "cached_compress": "a kernel",
    "rms_norm_rope": "a kernel; cosines and sines once a step",
    "cache_write": "a kernel",
    "gate": "widening, product, kernel",
    "cached_sparse_attn": "rows joined by a kernel; the operator; what it wants beside",
    "apply_rope": "a kernel",
    "hadamard": "a kernel",
}
"""What is launched of a contract where kernels of our own are preferred."""


def _replayed(report: dict[str, Any]) -> list[str]:
    """What the kernels' linalg gave on a CPU."""
    if not report:
        return []
    off = [kernel["units off"] for kernel in report["kernels"]]
    same = sum(not any(units.values()) for units in off)
    furthest = {
        dtype: max(units.get(dtype, 0) for units in off) for dtype in sorted({d for units in off for d in units})
    }
    said = ", ".join(f"{dtype} {units:.3g}" for dtype, units in furthest.items() if units)
    text = (
        f"Replayed on a CPU ({report['date']}): {same} of {len(off)} launches gave the interpreter's results bit for bit; "
        f"furthest of the others, in units of the last place of a row's largest: {said or 'none'}."
    )
    return [text, ""]


def _kernels(report: dict[str, Any]) -> list[str]:
    """What compiling the Triton kernels reached."""
    if not report:
        return []
    rows = []
    for kernel in report["kernels"]:
        constants = ", ".join(f"{name} {value}" for name, value in kernel["constants"])
        cells = []
        for chip in GENERATIONS:
            found = kernel["chips"][chip]
            slow = f", {n} loops over elements" if (n := found.get("loops over elements")) else ""
            size = found.get("bytes of a core's memory")
            cells.append(f"{found['reached']}{f', {size / 1024:.0f} KB' if size else ''}{slow}")
        rows.append(f"| `{kernel['kernel'].partition('.')[2]}` | {constants} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    said = (
        f"Every one that a decode step of flash or pro launches, with its constants ({versions}; {report['date']}): "
        f"{report['says']}. Memory is what a vector core's buffers take, of 192 KB (910B, 910C) and 248 KB (950), where "
        "the compiler says it."
    )
    return [
        "### Triton kernels",
        "",
        said,
        "",
        f"| kernel | constants | {' | '.join(GENERATIONS)} |",
        f"|---|---|{'---|' * len(GENERATIONS)}",
        *rows,
        "",
    ]


def _planted_kernels(report: dict[str, Any]) -> list[str]:
    """Faults in the Triton kernels, and which case of the suite noticed."""
    if not report:
        return []
    return [
        "### Faults planted in the Triton kernels",
        "",
        f"{report['says'][0].upper()}{report['says'][1:]} ({report['date']}).",
        "",
        "| fault | kernel's file | noticed first by |",
        "|---|---|---|",
        *(f"| {f['what']} | {f['module']} | {f['noticed'] or '**not noticed**'} |" for f in report["faults"].values()),
        "",
    ]


def _rungs(proofs: dict[str, Any], l1: dict[str, Any], l2: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in proofs["versions"].items())
    return [
        f"Rungs of proof, of runs with {versions}:",
        "",
        *(f"- **{rung}** {says}" for rung, says in RUNGS.items()),
        "- **L6** on hardware: **not run**. Nothing below it proves that a vendor's kernel is right.",
        "",
        *(line for cann, report in l1.items() for line in (*_drift(cann, report), *_on_fake_tensors(l2[cann]))),
    ]


def _drift(cann: str, l1: dict[str, Any]) -> list[str]:
    """What the comparison with one wheel found."""
    if not l1:
        return [f"The comparison with the wheel of CANN {cann} was not run.", ""]
    drift = [
        *l1["drift"]["schemas"].values(),
        *dict.fromkeys(f"{e['call']}: {e['wheel'].partition('. You may')[0]}" for e in l1["drift"]["shapes"]),
    ]
    calls = sum(map(len, l1["calls"].values()))
    refused = l1["calls that we refuse"]
    accepted = sum(entry["wheel"] == "accepted" for entry in refused)
    otherwise = ", ".join(f"`{op}`" for op in l1["schemas that differ where nothing is passed"]) or "none"
    compared = (
        f"{calls} calls; schemas that differ where nothing is passed: {otherwise}; drift: {'; '.join(drift) or 'none'}"
    )
    laxer = f"Of {len(refused)} calls that the backend refuses to make, the wheel's shape functions accept {accepted}"
    wheel = f"torch-npu {l1['versions']['torch-npu']} (CANN {cann})"
    return [
        f"Compared with {wheel} on {l1['date']}: {compared}. {laxer}: constraints are checked before the call.",
        "",
    ]


def _on_fake_tensors(l2: dict[str, Any]) -> list[str]:
    """What whole models on a wheel's fake tensors showed."""
    if not l2:
        return ["Whole models were not run on its fake tensors.", ""]
    runs = [run for pair in l2["runs"].values() for run in pair]
    missing = sorted({name for run in runs for name in run["without an NPU kernel"]})
    on_host = sum(bool(run["with an operand in host memory"]) for run in runs)
    text = (
        f"On its fake tensors ({l2['date']}): {len(runs)} runs of whole models, {on_host} with an operand in host memory; "
        f"operators without an NPU kernel: {', '.join(f'`{name}`' for name in missing) or 'none'}; shape functions of ours in "
        f"place of the wheel's: {', '.join(f'`{name}`' for name in l2['our shape functions'])}."
    )
    return [text, ""]


def _calls(proofs: dict[str, Any]) -> list[str]:
    """One row per call of the capability table: contracts, and per chip standing, CANN and
    rungs.
    """
    lines = [
        "### cann tier",
        "",
        f"| call | op | serves | {' | '.join(GENERATIONS)} |",
        f"|---|---|---|{'---|' * len(GENERATIONS)}",
    ]
    for call in table().calls:
        cells = []
        for generation in GENERATIONS:
            mine = [cell for cell in call.cells if generation in cell.generations]
            reached = " ".join(proofs["cann"][generation].get(call.name, [])) or "no rung"
            standings = ", ".join(dict.fromkeys(f"{cell.standing}, CANN {cell.min_cann}" for cell in mine))
            cells.append(f"{reached} ({standings})" if mine else "-")
        lines.append(
            f"| {call.name}{' (asked for)' if call.departs else ''} | `{call.op}` | {', '.join(call.serves)} | {' | '.join(cells)} |"
        )
    return [*lines, ""]


def _composed(proofs: dict[str, Any]) -> list[str]:
    """Where plain PyTorch ops run although an op looks as if it served."""
    reached = "; ".join(f"{chip} {' '.join(rungs) or 'no rung'}" for chip, rungs in proofs["composed"].items())
    lines = [
        "### composed tier: why",
        "",
        f"Rungs of composed ops: {reached}; on hardware: not run.",
        "",
        "| contract | chips | weights | reason |",
        "|---|---|---|---|",
    ]
    for absence in table().absent:
        weights = ", ".join(name for names in absence.operands.values() for name in names) or "any"
        lines.append(
            f"| {', '.join(absence.contracts)} | {', '.join(absence.generations)} | {weights} | {absence.reason} |"
        )
    lines += ["", "npu ops that are not called:", ""]
    return [*lines, *(f"- `{op}`: {reason}" for op, reason in table().unused.items()), ""]


def _runs(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The suite's runs on simulated CANN, as their reports have them."""
    lines = [
        "### Conformance on simulated CANN",
        "",
        "| chip | tier | level | checks | of them self-test | calls of the table that ran | seconds | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for chip, report in runs.items():
        findings = report["findings"]
        counts = Counter(
            finding["status"] + ("" if finding["claimed"] or finding["status"] == "passed" else ", not claimed")
            for finding in findings
        )
        device = [finding["status"] for finding in findings if finding["group"] == "device"]
        own = ", ".join(f"{n} {status}" for status, n in Counter(device).items()) or "not in this report"
        ran = {call for finding in findings for call in finding.get("ran", "").split()}
        claimed = [call for call in table().calls if any(chip in cell.generations for cell in call.cells)]
        lines.append(
            f"| {chip} | {report['tier']} | {report['level']} | {', '.join(f'{n} {s}' for s, n in counts.items())} | {own} "
            f"| {len(ran)} of {len(claimed)} | {report['duration']:.0f} | {report['date']} |"
        )
    failed = {
        finding["group"] for report in runs.values() for finding in report["findings"] if finding["status"] == "failed"
    }
    if failed == {"invariance"}:
        lines += ["", "What failed is of level 4 alone: the same row by itself and among others, to the bit."]
    return [*lines, ""]


def _selftests(selftests: dict[str, dict[str, Any]]) -> list[str]:
    """Dry runs of the self-test with its cases at high addresses."""
    lines = [
        "### Self-test, dry run at full sizes",
        "",
        "64 and 128 heads of 512 channels, indexer 64 x 128, rows past 2^31 bytes and past 2^31 elements, 81,920 key blocks, positions to 2^20.",
        "",
        "| chip | cases of the cann tier | of them at high addresses | composed | differ | date |",
        "|---|---|---|---|---|---|",
    ]
    for chip, report in selftests.items():
        asked = [o for o in report["outcomes"] if not o["skipped"]]
        high = sum("past_2^31" in o["case"] for o in asked)
        differ = sum(bool(o["found"]) for o in report["outcomes"])
        composed = len(report["outcomes"]) - len(asked)
        lines.append(
            f"| {chip}, {report['standing']} | {len(asked)} | {high} | {composed} | {differ} | {report['date']} |"
        )
    return [*lines, ""]


def _planted(planted: dict[str, Any]) -> list[str]:
    """Vendor bugs, and how the self-test words them."""
    lines = [
        "### Planted vendor bugs",
        "",
        "| bug | chip | op | cases that differ | the self-test says of the first |",
        "|---|---|---|---|---|",
    ]
    for name, bug in planted.get("bugs", {}).items():
        said = bug["first"] or "**not found**"
        lines.append(f"| {name} | {bug['chip']} | `{bug['op']}` | {len(bug['cases that differ'])} | {said} |")
    return [*lines, ""]


def _w8a8(runs: dict[str, dict[str, Any]], errors: dict[str, dict[str, float]]) -> list[str]:
    """What W8A8 loses: error of the weights by kind, and distance of the embedded model's logits
    from exact ones.
    """
    lines = [
        "### W8A8 on the embedded checkpoint",
        "",
        "Error of the weights, relative to their root mean square, as `dsv4 convert --to w8a8-int8` prints it:",
        "",
        "| tensors | error | worst tensor |",
        "|---|---|---|",
        *(f"| {kind} | {e['relative_rms']:.3%} | {e['worst_tensor']:.3%} |" for kind, e in errors.items()),
        "",
        "Distance from the exact logits, 160 positions of two prompts (reference: mean of eight chunkings; chips: one run each):",
        "",
        "| by | lossless, KL per token | W8A8, KL per token | lossless, relative L2 | W8A8, relative L2 |",
        "|---|---|---|---|---|",
    ]
    seen = False
    for chip, report in runs.items():
        figures = {f["id"].rpartition("/")[2]: f["metrics"] for f in report["findings"] if "distance" in f["id"]}
        lossless, w8a8 = figures["native_distance"], figures["w8a8_int8_distance"]
        if not seen:
            lines.append(_distances("reference", lossless, w8a8, " of the reference"))
            seen = True
        lines.append(_distances(f"simulated {chip}", lossless, w8a8))
    return [*lines, ""]


def _distances(by: str, lossless: dict[str, float], w8a8: dict[str, float], suffix: str = "") -> str:
    cells = [f"{figures[name + suffix]:.4f}" for name in ("KL", "relative L2") for figures in (lossless, w8a8)]
    return f"| {by} | {' | '.join(cells)} |"


def _memory() -> list[str]:
    """Experts packed and expanded, at the published sizes."""
    from dsv4_backend_ascend.expansion import measure

    lines = [
        "### Memory of the lossless way on 910B and 910C",
        "",
        "Experts stay packed. The peak is what one projection of a layer makes at a time, quantised activations included; `expand_bytes` is 1 GiB.",
        "",
        "| model | all experts packed | all expanded to BF16 | one projection packed | expanded | peak, decode | peak, 32 sequences | peak, prefill of 2048 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("flash", "pro"):
        config = PRESETS[name]
        picks, stacks = config.num_experts_per_tok, 3 * config.num_hidden_layers
        found = [measure(config, tokens * picks, 1 << 30) for tokens in (1, 32, 2048)]
        one = found[0]
        sizes = [stacks * one.packed, stacks * one.bf16, one.packed, one.bf16, *(f.peak for f in found)]
        lines.append(f"| {name} | {' | '.join(f'{size / 1e9:.2f} GB' for size in sizes)} |")
    return [*lines, ""]
