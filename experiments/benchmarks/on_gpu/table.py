"""What the stages found, for a person: correct or not, speed beside cuBLAS, the paper beside ours, hours."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

from qmoe_jax import reports

# QMoE, figure 5: on an A6000 and a 3090; figure 5, right: 128 tokens, against one dense expert a layer; table 7.
PAPER_PRODUCT = "faster for every shape, up to 1.35 (A6000, 3090; one token)"
PAPER_GENERATION = 0.95
PAPER_HOURS = {"switch_base_128": 14.0 / 60, "switch_large_128": 30.2 / 60, "switch_c_2048": 16.0}


def summary(folder: pathlib.Path, stages: list[str]) -> str:
    """Markdown, of the JSON files in a folder; a stage without one was not run."""
    found = {name: json.loads(path.read_text()) for name in stages if (path := folder / f"{name}.json").exists()}
    parts = [_stages(stages, found)]
    if "check" in found:
        parts.append(_correct(found["check"], found.get("tests", {})))
    if "kernels" in found:
        parts += [_speeds(found["kernels"], "events"), _paper(found)]
    if "layers" in found:
        parts += [_speeds(found["layers"], "jit"), _derivatives(found["layers"])]
    if "rehearsal" in found:
        parts.append(_hours(found["rehearsal"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _stages(stages, found):
    rows = []
    for name in stages:
        stage = found.get(name)
        errors = 0 if stage is None else sum("error" in row for rows_ in _kinds(stage).values() for row in rows_)
        state = "not run" if stage is None else "complete" if stage["state"] == "complete" else "cut off"
        left_out = len(stage["left_out"]) if stage else None
        rows.append((name, state, stage and f"{stage['seconds']:.0f} s", errors, left_out))
    return reports.table(("stage", "", "time", "errors", "left out for time"), rows)


def _kinds(stage: dict[str, Any]) -> dict[str, list[dict]]:
    return {
        name: rows
        for name, rows in stage.items()
        if isinstance(rows, list) and name not in ("left_out", "implementations")
    }


def _correct(check, tests):
    rows = []
    by_name = collections.defaultdict(list)
    for row in check.get("product", []):
        by_name[row["implementation"] or "default", row["codec"]].append(row)
    for (name, codec), own in by_name.items():
        cannot = next((row["cannot"] for row in own if "cannot" in row), None)
        wrong = [row for row in own if "cannot" not in row and not row.get("right")]
        verdict = (
            f"cannot run: {cannot}" if cannot else "correct" if not wrong else f"WRONG in {len(wrong)} of {len(own)}"
        )
        if wrong:
            verdict += f": {wrong[0].get('error', 'beyond rounding')}"
        rows.append((f"{name}, {codec}", verdict.replace("\n", " ")[:300]))
    for kind in ("pytest", "sanitizer"):
        for row in tests.get(kind, []):
            what = row.get("tool", "the kernels' tests")
            verdict = row.get("cannot") or row.get("error") or ("correct" if row.get("right") else "WRONG")
            rows.append((what, verdict.replace("\n", " ")[:300]))
    return reports.table(("what", "against float64"), rows)


def speeds(stage: dict[str, Any], kind: str) -> dict[tuple, dict[str, float]]:
    """(shape, tokens, experts) -> microseconds by product; of cuBLAS the faster layout."""
    best: dict[tuple, dict[str, float]] = collections.defaultdict(dict)
    for row in stage.get(kind, []):
        if "microseconds" in row:
            own = best[row["shape"], row["tokens"], row["experts"]]
            own[row["product"]] = min(row["microseconds"], own.get(row["product"], float("inf")))
    return best


def _speeds(stage, kind):
    found = speeds(stage, kind)
    if not found:
        return ""
    dense = "cuBLAS" if kind == "events" else "dense"
    names = list(dict.fromkeys(name for own in found.values() for name in own if name != dense))
    rows = []
    for (shape, tokens, experts), own in found.items():
        times = [f"{own[dense] / own[name]:.2f}" if name in own and dense in own else None for name in names]
        microseconds = [f"{own[name]:.1f}" if name in own else None for name in (dense, *names)]
        rows.append((shape, f"{tokens} x {experts}", *microseconds, *times))
    header = (
        "shape",
        "tokens x experts",
        *(f"{n}, us" for n in (dense, *names)),
        *(f"{n}, times {dense}" for n in names),
    )
    title = {"events": "One product, by events around graphs", "jit": "One product, as JAX runs it"}[kind]
    return f"**{title}; weights that no cache holds, bfloat16**\n\n" + reports.table(header, rows)


def _derivatives(stage):
    rows = [
        (r["shape"], f"{r['tokens']} x {r['experts']}", f"{r['microseconds']:.1f}", f"{r['speed']:.2f}")
        for r in stage.get("derivative", [])
        if "speed" in r
    ]
    return reports.table(("derivative of tokens", "tokens x experts", "us", "times dense"), rows) if rows else ""


def _paper(found):
    ratios = [
        own["cuBLAS"] / own["cuda gap"]
        for (_, tokens, experts), own in speeds(found["kernels"], "events").items()
        if (tokens, experts) == (1, 1) and {"cuBLAS", "cuda gap"} <= set(own)
    ]
    rows = [
        (
            "a product, times cuBLAS bfloat16",
            PAPER_PRODUCT,
            f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else None,
        )
    ]
    for row in found.get("layers", {}).get("layer", []):
        if "speed" in row:
            what = f"a layer of {row['experts']} experts, batch {row['batch']}, times one dense expert"
            rows.append((what, None, f"{row['speed']:.2f}"))
    for report in found.get("layers", {}).get("generation", []):
        for row in report.get("rows", []):
            if row["experts"] != "dense" and row["times_ideal"]:
                model = f"{row['model']} with {row['experts_per_layer']} experts"
                what = f"generation, {model}, batch {row['batch']}, times ideal"
                rows.append(
                    (what, f"at least {PAPER_GENERATION}" if row["batch"] == 1 else None, f"{row['times_ideal']:.2f}")
                )
    return reports.table(("", "the paper's figure 5", "here"), rows)


def _hours(stage):
    rows = [
        (name, f"{PAPER_HOURS[name]:.2f} (A6000)" if name in PAPER_HOURS else None, f"{hours:.2f}")
        for row in stage.get("rehearsal", [])
        for name, hours in row.get("hours", {}).items()
    ]
    return reports.table(("compressing, hours", "the paper", "projected here"), rows) if rows else ""
