"""``dsv4 conformance mutants``: what kills each wrong backend, and that no honest one is failed."""

from __future__ import annotations

import datetime
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click

from dsv4_core.files import writing as files
from dsv4_core.files.reading import json_file

RECORD = "museum.json"


@click.command("mutants")
@click.option("--name", "names", multiple=True, help="Only this mutant or variant; may be repeated.")
@click.option(
    "--tier",
    type=click.Choice(["smoke", "standard"]),
    default="standard",
    show_default=True,
    help="Give up on a mutant after it.",
)
@click.option(
    "--seeds",
    default=20,
    show_default=True,
    help="Seeds of the numeric op cases for the honest variants; 0 leaves them as they were recorded.",
)
@click.option("--whole", is_flag=True, help="Also the whole standard tier once on each honest variant.")
@click.option(
    "--earlier",
    type=click.Path(path_type=Path, exists=True),
    help="A report of an earlier suite: also say what its cases and traces of the faulty ops would have found.",
)
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1, 1024), help="Processes.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write museum.json, mutants.md and safety-factor.md with its picture here; the record after every result.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Take up the record in --out: what this same suite has found stands; elsewhere the check that killed last is tried first.",
)
def command(
    names: tuple[str, ...],
    tier: str,
    seeds: int,
    whole: bool,
    earlier: Path | None,
    jobs: int,
    out: Path | None,
    resume: bool,
) -> None:
    """Prove that the suite bites: run it on backends with one fault each, until something fails;
    and on honest ones, which must pass.
    """
    from dsv4_conformance.museum.catalogue import MUTANTS, VARIANTS
    from dsv4_conformance.report.certificate import suite

    if unknown := set(names) - set(MUTANTS) - set(VARIANTS):
        raise ValueError(
            f"--name {min(unknown)!r}: neither a mutant nor an honest variant; names: {', '.join([*MUTANTS, *VARIANTS])}"
        )
    if resume and not out:
        raise ValueError("--resume: needs --out DIR, whose museum.json is taken up")
    ids, date = of_ops_in(earlier) if earlier else (frozenset(), "")
    last = load(out / RECORD) if resume and out and (out / RECORD).exists() else {"mutants": {}, "honest": {}}
    record: dict[str, Any] = {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "suite": suite(),
        "seeds": seeds or last.get("seeds", 0),
        "whole": whole if seeds else last.get("whole", False),
        "mutants": {n: k for n, k in last["mutants"].items() if n in MUTANTS},
        "honest": {n: h for n, h in last["honest"].items() if n in VARIANTS},
    }
    same = last.get("suite") == record["suite"]

    def noted() -> None:
        if out:
            files.write(out / RECORD, json.dumps(record, indent=1) + "\n")

    chosen = [n for n in MUTANTS if not names or n in names]
    hunted = [n for n in chosen if record["mutants"].get(n, {}).get("suite") != record["suite"]]
    honest = [n for n in VARIANTS if seeds and (not names or n in names)]
    stamp = {"suite": record["suite"], "date": record["date"]}
    if not names:
        kept = {n: h for n, h in record["honest"].items() if same and h.get("seeds") == seeds}
        tried_already = {n for n, h in kept.items() if h.get("whole", False) >= whole}
        honest = [n for n in honest if n not in tried_already]
    begun = {record["honest"].get(n, {}).get("seeds", 0) for n in honest} if same else set()
    first = min(begun) if len(begun) == 1 and min(begun) < seeds else 0  # a seed that all of them have not had yet
    found: dict[str, Any] = {}
    for name in honest if first else ():
        merge(found, record["honest"][name])
    record["honest"] = {n: h for n, h in record["honest"].items() if n not in honest}
    killers = [last["mutants"].get(n, {}).get("id", "") for n in hunted]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for kill in pool.map(hunted_one, hunted, [tier] * len(hunted), killers):
            record["mutants"][kill["name"]] = {**kill, "suite": record["suite"]}
            verdict = f"{kill['tier']:8} {kill['id']}" if kill["id"] else click.style("SURVIVES", fg="red")
            click.echo(f"{kill['name']:46} {verdict}  {kill['seconds']:.1f} s")
            noted()
        if earlier:
            record["earlier"] = date
            had = [
                n
                for n in chosen
                if n in record["mutants"] and record["mutants"][n].get("earlier", {}).get("of") != date
            ]
            kills = [found_already(record, n, ids) for n in had]
            for name, kill in zip(had, pool.map(hunted_before, had, [ids] * len(had), kills), strict=True):
                record["mutants"][name]["earlier"] = {"of": date, **kill}
                click.echo(
                    f"{name:46} {kill['tier'] or click.style('passes', fg='yellow'):8} {kill['id']}  (suite of {date})"
                )
                noted()
        if honest:
            parts = [range(i, i + 1) for i in range(first, seeds)]
            for seed, part in enumerate(pool.map(tried, parts, [honest] * len(parts)), first):
                for result in part:
                    merge(found, result)
                record["honest"] |= {n: {**h, **stamp, "seeds": seed + 1, "whole": False} for n, h in found.items()}
                alarms = sum(len(h["alarms"]) for h in found.values())
                click.echo(f"honest variants, seed {seed}: {alarms} false alarms so far")
                noted()
        if whole and honest:
            for result in pool.map(whole_one, honest):
                merge(found, result)
                record["honest"][result["name"]] = {**found[result["name"]], **stamp, "seeds": seeds, "whole": True}
                noted()
        record["honest"] |= {n: {**h, **stamp, "seeds": seeds, "whole": whole} for n, h in found.items()}
    record["mutants"] = {n: record["mutants"][n] for n in MUTANTS if n in record["mutants"]}
    record["honest"] = {n: record["honest"][n] for n in VARIANTS if n in record["honest"]}
    for name, h in record["honest"].items():
        alarm = click.style(f"FAILED {h['alarms'][0]}", fg="red") if h["alarms"] else "passes"
        click.echo(
            f"honest {name:39} {alarm}; {h['cases']} cases, at most {h['used']:.1%} of a budget, factor {h['factor']:.2f} ({h['at']})"
        )
    if out:
        from dsv4_conformance.museum.pages import write

        write(record, out)
    raise click.exceptions.Exit(closing(record))


def closing(record: dict[str, Any]) -> int:
    """Print the last line; give the exit status."""
    kills = record["mutants"].values()
    alive = [k["name"] for k in kills if not k["id"]]
    smoke = sum(k["tier"] == "smoke" for k in kills)
    alarms = sum(len(h["alarms"]) for h in record["honest"].values())
    ok = not alive and not alarms
    survivors = f"; alive: {', '.join(alive)}" if alive else ""
    click.echo(
        f"{'PASSED' if ok else 'FAILED'}. {len(kills) - len(alive)} of {len(kills)} mutants killed, {smoke} of them at smoke{survivors}; "
        f"{len(record['honest'])} honest variants, {alarms} false alarms."
    )
    return 0 if ok else 1


def hunted_one(name: str, tier: str, killer: str = "") -> dict[str, Any]:
    """Hunt one mutant, in a process of its own."""
    from dsv4_conformance.museum.catalogue import MUTANTS
    from dsv4_conformance.museum.hunt import hunt
    from dsv4_conformance.report.write import finite

    kill = hunt(MUTANTS[name], tier=tier, killer=killer)
    f = kill.finding
    plain: dict[str, Any] = finite(
        {
            "name": name,
            "tier": kill.tier,
            "id": f.id if f else "",
            "used": f.used if f else 0.0,
            "factor": f.metrics.get("factor", 0.0) if f else 0.0,
            "message": f.message if f else "",
            "numeric": kill.mutant.numeric,
            "seconds": round(kill.seconds, 2),
        }
    )
    return plain


def of_ops_in(report: Path) -> tuple[frozenset[str], str]:
    """Ids of a report's op cases and traces, and its date; raise ``FileError`` where it is none."""
    held = json_file(report / "report.json" if report.is_dir() else report, dict[str, Any], "give a report.json")
    ids = [str(f["id"]) for f in held["findings"]]
    return frozenset(i for i in ids if not i.startswith(("law/", "model/"))), str(held["date"])[:10]


def found_already(record: dict[str, Any], name: str, ids: frozenset[str]) -> dict[str, str] | None:
    """The check that killed a mutant first, where it is among these: then it is the first of them,
    too.
    """
    kill = record["mutants"][name]
    same = kill["id"] in ids and kill["suite"] == record["suite"]
    return {"id": kill["id"], "tier": kill["tier"]} if same else None


def hunted_before(name: str, ids: frozenset[str], found: dict[str, str] | None) -> dict[str, str]:
    """What the checks of these ids find of one mutant, in a process of its own; ``found``: what is
    known of it.
    """
    if found:
        return found
    from dsv4_conformance.museum.catalogue import MUTANTS
    from dsv4_conformance.museum.hunt import hunt

    kill = hunt(MUTANTS[name], only=ids)
    return {"id": kill.finding.id if kill.finding else "", "tier": kill.tier}


def tried(seeds: range, names: list[str]) -> list[dict[str, Any]]:
    """Honest variants over some seeds."""
    from dataclasses import asdict

    from dsv4_conformance.museum.hunt import trials

    return [asdict(h) for h in trials(seeds, names=names)]


def whole_one(name: str) -> dict[str, Any]:
    """The whole standard tier on one honest variant."""
    from dataclasses import asdict

    from dsv4_conformance.museum.hunt import whole_tier

    return asdict(whole_tier(name))


def merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    """Add one part's counts to a variant's."""
    known = into.setdefault(
        part["name"], {"name": part["name"], "cases": 0, "alarms": [], "used": 0.0, "factor": 0.0, "at": ""}
    )
    known["cases"] += part["cases"]
    known["alarms"] += part["alarms"]
    known["used"] = max(known["used"], part["used"])
    if part["factor"] > known["factor"]:
        known["factor"], known["at"] = part["factor"], part["at"]


def load(path: Path) -> dict[str, Any]:
    """Read a record that ``--out`` wrote."""
    return json_file(path, dict[str, Any], "write it again: dsv4 conformance mutants --out DIR")
