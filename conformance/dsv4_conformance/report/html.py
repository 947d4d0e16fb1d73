"""One self-contained page: verdict and level, what was not tested, heat map of budget used, worst
cases with the command that re-runs them.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from dsv4_conformance.check import BAD
from dsv4_conformance.report.matrix import command, fails_the_run, name
from dsv4_conformance.run.runner import LEVELS
from dsv4_conformance.verdict.budget import SAFETY
from dsv4_core.contract.registry import OWN
from dsv4_core.contract.spec import OPS

STYLE = """
:root{--bg:#fbfbfd;--fg:#1c1e26;--dim:#6b7080;--card:#fff;--line:#e3e5ec;--good:#15803d;--bad:#b91c1c;--code:#f1f2f6}
@media(prefers-color-scheme:dark){:root{--bg:#14161b;--fg:#e6e8ee;--dim:#9499a8;--card:#1c1f27;--line:#2d313c;--good:#4ade80;--bad:#f87171;--code:#262a34}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.55 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}h1{font-size:30px;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:18px;margin:44px 0 12px}p{margin:6px 0}.dim{color:var(--dim)}.good{color:var(--good)}.bad{color:var(--bad)}
.top{display:flex;flex-wrap:wrap;gap:14px;margin:26px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 20px;flex:1 1 170px}
.card b{display:block;font-size:28px;line-height:1.25;letter-spacing:-.02em}.card>span{color:var(--dim);font-size:13px}
.ladder{display:flex;gap:6px;margin:14px 0}
.ladder div{flex:1;padding:10px 12px;border-radius:8px;border:1px solid var(--line);font-size:13px;background:var(--card)}
.ladder .yes{background:color-mix(in srgb,var(--good) 16%,var(--card));border-color:var(--good)}
.ladder .no{background:color-mix(in srgb,var(--bad) 14%,var(--card));border-color:var(--bad)}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--dim);font-weight:600}
.heat td{border:2px solid var(--bg);text-align:center;min-width:74px;border-radius:5px;font-variant-numeric:tabular-nums}
.heat td:first-child{text-align:left;background:none;font-family:ui-monospace,monospace}.heat td.none{color:var(--dim)}
code{font:12.5px ui-monospace,SFMono-Regular,monospace;background:var(--code);padding:2px 6px;border-radius:5px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
details{margin:4px 0}
summary{cursor:pointer}.scale{display:flex;gap:4px;align-items:center;font-size:12px;color:var(--dim);margin:8px 0}
.scale i{width:34px;height:14px;border-radius:3px;display:block}
"""


def page(report: dict[str, Any], oracle: dict[str, str]) -> str:
    """Render a report's data; ``oracle``: as in a certificate."""
    findings = report["findings"]
    counts = {s: sum(f["status"] == s for f in findings) for s in dict.fromkeys(f["status"] for f in findings)}
    level = report["level"]
    verdict = "<span class=good>passed</span>" if report["ok"] else "<span class=bad>failed</span>"
    judged = {f["op"] for f in findings if f["status"] != "unsupported"}
    untested = [name for name in OPS if name not in judged]
    cards = [
        (verdict, "all that was claimed or required" if report["ok"] else "something that was claimed or required"),
        ("none" if level is None else str(level), "level reached: " + ("" if level is None else LEVELS[level])),
        (str(counts.get("passed", 0)), f"of {len(findings)} checks passed"),
        (
            f"{max((edge(f) for f in findings if f['status'] == 'passed'), default=0):.0%}",
            "of what rounding noise is allowed, in the worst passing check",
        ),
        (f"{report['duration']:.1f} s", f"tier {report['tier']}, {report['numerics']} numerics"),
    ]
    env = report["environment"]
    others = ", ".join(f"{n} {s}" for s, n in counts.items() if s != "passed") or "none"
    missing = (
        "; ".join([*([f"{len(untested)} ops: {', '.join(untested)}"] if untested else []), *report["not_run"]])
        or "nothing that this suite knows"
    )
    claim = "no level" if report["claims_level"] is None else f"level {report['claims_level']}"
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>{escape(report["backend"])}: DeepSeek-V4 conformance</title><style>{STYLE}</style><main>
<h1>{escape(name(report))}</h1><p class=dim>DeepSeek-V4 conformance, {escape(report["date"])}.
Suite {escape(env["suite"])}, device {escape(report["device"])},
Python {escape(env["python"])}, NumPy {escape(env["numpy"])}, {escape(env["system"])} {escape(env["machine"])}. Claims {claim}.
<code>{escape(command(report))}</code></p>
{judge(oracle)}
<div class=top>{"".join(f"<div class=card><b>{big}</b><span>{escape(small)}</span></div>" for big, small in cards)}</div>
<div class=ladder>{ladder(findings, report["partial"])}</div>
<p><b>Not tested:</b> {escape(missing)}.</p><p class=dim>Not passed: {escape(others)}.</p>
{"".join(f"<p class=bad>{escape(s)}</p>" for s in report["stale"])}
{failures(findings, report["rerun"])}
<h2>Budget used, by op and dtype</h2><p class=dim>Each cell is the worst element of the worst case: its error beyond half a unit of the output format,
over what the contract allows for rounding inside. (Rounding the result to nearest takes up to all of the half unit, so the share of the whole budget,
which a cell shows when it is pointed at, comes near 100 % in any correct backend.) Exact ops have no budget: 0 or broken.</p>
{scale()}<div class=scroll>{heat(findings)}</div>
<h2>Closest to the edge</h2><div class=scroll>{worst(findings, report["rerun"])}</div>
<h2>Laws, models and recorded traces</h2><div class=scroll>{other(findings)}</div>
{proofs(report.get("proof", {}))}<h2>Every check</h2><details><summary>{len(findings)} checks</summary><div class=scroll>{everything(findings)}</div></details>
</main></html>
"""


def judge(oracle: dict[str, str]) -> str:
    """Who judged: in red where it is not dsv4's own oracle."""
    own = oracle["distribution"] == OWN
    text = "{module} of distribution {distribution} {version}, files {files}".format(**oracle)
    return f"<p class={'dim' if own else 'bad'}>Judged by the oracle {escape(text)}{'' if own else ': not dsv4&#39;s own'}.</p>"


def number(value: Any) -> float:
    """A figure that may be spelled ``"inf"``; null is no number, and beyond any."""
    return math.inf if value is None else float(value)


def edge(finding: dict[str, Any]) -> float:
    """How near the edge a check is: the share of the allowance for noise where its result was
    rounded, else of the whole budget.
    """
    factor = finding["metrics"].get("factor")
    return number(finding["used"]) if factor is None or number(finding["used"]) > 1 else number(factor) / SAFETY


def colour(used: float, status: str) -> str:
    """Green through amber to red as the budget is used up; solid red beyond it."""
    if status not in {"passed", "xfailed", "xpassed"} or used > 1:
        return "background:#dc2626;color:#fff;font-weight:700"
    hue = 140 - 100 * math.sqrt(min(used, 1))
    return f"background:hsl({hue:.0f} 62% 78%);color:#17301f"


def scale() -> str:
    """The legend."""
    steps = "".join(f'<i style="{colour(u, "passed")}"></i>' for u in (0, 0.05, 0.2, 0.4, 0.6, 0.8, 1))
    return f'<div class=scale>0 {steps} 100 % <i style="{colour(2, "failed")}"></i> over budget</div>'


def ladder(findings: list[dict[str, Any]], partial: bool) -> str:
    """The five levels, each passed, failed or not run."""
    cells = []
    for i, what in enumerate(LEVELS):
        here = [f for f in findings if f["level"] == i]
        passed = sum(f["status"] in {"passed", "xfailed"} for f in here)
        unclaimed = sum(not fails_the_run(f) and f["status"] in BAD for f in here)
        undecided = not here or (partial and passed == len(here)) or (unclaimed and passed + unclaimed == len(here))
        kind = "" if undecided else "yes" if passed == len(here) else "no"
        cells.append(
            f"<div class='{kind}'><b>{i}</b> {escape(what)}<br><span class=dim>{passed} of {len(here)}</span></div>"
        )
    return "".join(cells)


def heat(findings: list[dict[str, Any]]) -> str:
    """Ops down, dtypes across."""
    ops = [f for f in findings if f["group"] == "op"]
    columns = sorted({f["dtypes"] for f in ops if f["dtypes"]})
    rows = []
    for op in dict.fromkeys(f["op"] for f in ops):
        cells = []
        for column in columns:
            here = [f for f in ops if f["op"] == op and f["dtypes"] == column]
            if not here:
                cells.append("<td class=none></td>")
            elif all(f["status"] == "unsupported" for f in here):
                cells.append("<td class=none>not tested</td>")
            else:
                top = max(
                    (f for f in here if f["status"] != "unsupported"),
                    key=lambda f: (f["status"] in BAD, edge(f)),
                )
                used = edge(top)
                text = f"{used:.0%}" if math.isfinite(used) and used < 100 else "broken"
                title = f"{top['id']}: {number(top['used']):.0%} of the whole budget"
                cells.append(
                    f"<td style='{colour(used, top['status'])}' title='{escape(title, quote=True)}'>{text}</td>"
                )
        rows.append(f"<tr><td>{escape(op)}</td>{''.join(cells)}</tr>")
    return f"<table class=heat><tr><th>op</th>{''.join(f'<th>{escape(c)}</th>' for c in columns)}</tr>{''.join(rows)}</table>"


def failures(findings: list[dict[str, Any]], rerun: str) -> str:
    """What went wrong, each with its command; what was not claimed is folded away."""
    bad = [f for f in findings if f["status"] in BAD]
    parts = []
    for title, part in (
        ("Failures", [f for f in bad if fails_the_run(f)]),
        ("Not claimed, and failing", [f for f in bad if not fails_the_run(f)]),
    ):
        rows = "".join(
            f"<tr><td><code>{escape(f['id'])}</code></td><td class=bad>{f['status']}</td><td>{escape(f['message'])}"
            f"<br><code>{escape(rerun)} --case {escape(f['id'])}</code></td></tr>"
            for f in part[:200]
        )
        table = f"<div class=scroll><table><tr><th>check</th><th>status</th><th>what, and how to re-run it</th></tr>{rows}</table></div>"
        if part:
            folded = f"<details><summary>{len(part)} checks</summary>{table}</details>"
            parts.append(f"<h2>{title} ({len(part)})</h2>{table if title == 'Failures' else folded}")
    return "".join(parts)


def worst(findings: list[dict[str, Any]], rerun: str) -> str:
    """The passing checks that are nearest the edge."""
    near = sorted((f for f in findings if f["status"] == "passed" and edge(f) > 0), key=lambda f: -edge(f))[:15]
    rows = "".join(
        f"<tr><td>{edge(f):.0%}</td><td>{number(f['used']):.0%}</td><td><code>{escape(f['id'])}</code></td><td>{place(f['worst'])}</td>"
        f"<td>{figures(f['metrics'])}</td><td><code>{escape(rerun)} --case {escape(f['id'])}</code></td></tr>"
        for f in near
    )
    head = "<th>of the noise allowed</th><th>of the budget</th><th>check</th><th>worst element</th><th>figures</th><th>re-run</th>"
    return f"<table><tr>{head}</tr>{rows}</table>"


def place(worst_element: dict[str, Any]) -> str:
    """Where, got and want."""
    if not worst_element:
        return ""
    got, want = worst_element.get("got"), worst_element.get("want")
    return escape(
        f"{worst_element.get('element')}: got {short(got)}, want {short(want)}, budget {short(worst_element.get('budget'))}"
    )


def short(value: Any) -> str:
    """A figure in seven digits."""
    return f"{value:.7g}" if isinstance(value, (int, float)) else str(value)


def figures(metrics: dict[str, Any]) -> str:
    """A verdict's figures."""
    return escape(", ".join(f"{k.replace('_', ' ')} {short(v)}" for k, v in metrics.items()))


def other(findings: list[dict[str, Any]]) -> str:
    """Checks that are not op cases."""
    rest = [f for f in findings if f["group"] != "op"]
    if not rest:
        return "<p class=dim>None were run.</p>"
    rows = "".join(
        f"<tr><td><code>{escape(f['id'])}</code></td><td class={'good' if f['status'] == 'passed' else 'bad'}>{f['status']}</td>"
        f"<td>{figures(f['metrics'])}</td><td>{f['duration']:.2f} s</td></tr>"
        for f in rest
    )
    return f"<table><tr><th>check</th><th>status</th><th>figures</th><th>took</th></tr>{rows}</table>"


def proofs(proof: dict[str, str]) -> str:
    """How far each op is proven, where the backend keeps account."""
    rows = "".join(
        f"<tr><td><code>{escape(op)}</code></td><td>{escape(reached)}</td></tr>" for op, reached in proof.items()
    )
    return f"<h2>Proof</h2><table><tr><th>op</th><th>reached</th></tr>{rows}</table>" if proof else ""


def everything(findings: list[dict[str, Any]]) -> str:
    """The full list."""
    rows = "".join(
        f"<tr><td><code>{escape(f['id'])}</code></td><td>{f['level']}</td><td>{f['status']}</td><td>{short(number(f['used']))}</td>"
        f"<td>{f['duration'] * 1000:.0f} ms</td><td>{f['seed']}</td></tr>"
        for f in findings
    )
    return f"<table><tr><th>check</th><th>level</th><th>status</th><th>used</th><th>took</th><th>seed</th></tr>{rows}</table>"
