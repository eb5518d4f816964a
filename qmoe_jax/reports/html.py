"""A compression report as one HTML page that needs nothing else: no script, no style sheet, no picture beside it."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qmoe_jax import reports, resources
from qmoe_jax.reports.figures import compression_svgs


def html_report(report: Mapping[str, Any]) -> str:
    """The page, for what compress.py writes as report.json.

    Whatever comes from outside (paths, settings) is escaped; the page says that it loads nothing.
    """
    title = f"{_model_name(report)}: {reports.method_title(report)}"
    sections = {
        "Loss and size": _headline(report) + _comparison(report),
        "Layer by layer": _figures(report) + _layers(report),
        "Experts that fell back": _fallbacks(report),
        "Left out": _left_out(report),
        "Experts with few tokens": _starved(report),
        "Super experts": _super_experts(report),
        "Time": _seconds(report),
        "Memory": _memory(report),
        "Settings": _settings(report.get("config", {})),
        "Made from, and with": _settings(
            {"checkpoint": report.get("checkpoint", {}), "environment": report.get("environment", {})}
        ),
    }
    body = "".join(f"<section><h2>{escape(name)}</h2>\n{content}</section>\n" for name, content in sections.items())
    return PAGE.format(title=escape(title), style=STYLE, body=body)


def escape(value: Any) -> str:
    return html.escape("-" if value is None else str(value))


def _model_name(report) -> str:
    """The checkpoint's last two folders, such as switch_base_128/checkpoint_500100."""
    folders = [f for f in report.get("checkpoint", {}).get("checkpoint", "").split("/") if f]
    if folders[-1:] == ["checkpoint"]:  # the file in T5X's step directory
        folders.pop()
    return "/".join(folders[-2:]) or "Compression"


# --- Sections --------------------------------------------------------------------------------------------------------


def _headline(report) -> str:
    loss, bfloat16 = report["loss"], report.get("baselines", {}).get("bfloat16", {}).get("loss")
    against = "" if bfloat16 is None else f"bfloat16: {bfloat16:.4f}, {loss - bfloat16:+.4f}"
    rates = [None if r is None else f"{r:.2f}x" for r in (report["compression_experts"], report["compression_model"])]
    stored, entropy = report["bits_per_weight"], f"entropy of the symbols: {report['entropy_per_weight']:.3f}"
    tiles = [
        ("validation loss, nats per token", f"{loss:.4f}", against),
        ("the same, weighted as in the paper", f"{report['loss_paper']:.4f}", "documents count by their length"),
        ("stored bits per expert weight", None if stored is None else f"{stored:.3f}", entropy),
        ("compression of the experts", rates[0], "against bfloat16, metadata included"),
        ("compression of the model", rates[1], _megabytes(report)),
        ("natural sparsity", f"{report['zeros']:.1%}", "weights that are zero"),
        (
            "experts quantized",
            f"{report['experts_quantized']} of {report['experts_total']}",
            f"{report['experts_fallback']} fell back",
        ),
    ]
    cells = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(number)}</dd><small>{escape(more)}</small></div>\n"
        for what, number, more in tiles
    )
    return f'<dl class="tiles">{cells}</dl>\n'


def _megabytes(report) -> str:
    before, after = report["bytes_bfloat16"], report["bytes_model"]
    return f"{before / 1e6:,.2f} MB in bfloat16" + ("" if after is None else f", {after / 1e6:,.2f} MB compressed")


def _comparison(report) -> str:
    return _table(reports.COMPRESSION_HEADER, reports.comparison_rows(report)) + (
        "<p>loss: mean cross-entropy per predicted token; loss_paper: the paper's mean over documents; zeros, entropy: "
        "of the experts' symbols; bits/weight: as stored, all metadata included; rates: against bfloat16, "
        "of the experts and of the model; MB: the whole model.</p>\n"
        f"<p>{report['num_documents']:,} validation documents of {report['num_tokens']:,} predicted tokens; "
        f"{report['num_calibration_documents']:,} calibration documents.</p>\n"
    )


def _figures(report) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(t)}</figcaption>{s}</figure>\n" for t, s in compression_svgs(report).items()
    )
    return (
        f'<div class="figures">{figures}</div>\n'
        "<p>Relative output error: the share of a layer's expert outputs that quantizing it loses, on validation "
        "tokens that no Hessian has seen; |y - ŷ|² over |y|², weighted by the router. It is of one layer alone, "
        "given its inputs; the loss above is of all of them together.</p>\n"
    )


def _layers(report) -> str:
    header = (
        "layer",
        "output error",
        "entropy",
        "bits/weight",
        "zeros",
        "fewest tokens",
        "median",
        "most",
        "over cap",
        "fell back",
    )

    def row(name, layer):
        tokens = layer["tokens_per_expert"]
        spread = (min(tokens), f"{statistics.median(tokens):g}", max(tokens))
        rates = [layer[k] for k in ("output_error", "entropy_per_weight", "bits_per_weight", "zeros")]
        return [name, *rates, *spread, len(layer.get("overloaded", ())), len(layer["fallback"])]

    return _table(header, [row(name, layer) for name, layer in report["layers"].items()]) + (
        "<p>over cap: experts that more calibration tokens were routed to than token_cap lets into a Hessian.</p>\n"
    )


def _fallbacks(report) -> str:
    rows = []
    for name, layer in report["layers"].items():
        by_reason: dict[str, list[str]] = {}
        for expert, reason in layer["fallback"].items():
            by_reason.setdefault(reason, []).append(expert)
        rows += [[name, ", ".join(experts), reason] for reason, experts in by_reason.items()]
    if not rows:
        return "<p>None: every expert was quantized by its own calibration tokens.</p>\n"
    return _table(("layer", "experts", "why"), rows, "text")


def _left_out(report) -> str:
    if not report.get("left_out"):
        return "<p>Nothing: the compressed checkpoint has all that the checkpoint has.</p>\n"
    return _table(("what", "tensors"), [[why, ", ".join(n)] for why, n in report["left_out"].items()], "text")


def _starved(report) -> str:
    rows = [
        [name, ", ".join(f"{e} ({n})" for e, n in layer["starved"].items())]
        for name, layer in report["layers"].items()
        if layer.get("starved")
    ]
    if not rows:
        return "<p>None: no expert's tokens were made up by tokens of its layer.</p>\n"
    return _table(("layer", "experts (tokens of their own); tokens of the layer stood for the rest"), rows, "text")


def _super_experts(report) -> str:
    found = report.get("super_experts")
    if not found:
        return "<p>Not looked for: that takes calibration.</p>\n"
    rows = [[f["layer"], f["expert"], f["peak"], f["times_median"]] for f in found]
    return _table(("layer", "expert", "largest output", "times the median"), rows) + (
        "<p>By the rule of arXiv:2507.23279: above the 99.5th percentile of all experts' largest outputs, and above a "
        "tenth of the largest. Some expert always is; massive activations are hundreds of times the median.</p>\n"
    )


def _seconds(report) -> str:
    seconds = dict(report["seconds"])
    longest = max(seconds.values()) or 1.0
    rows = "".join(
        f"<tr><td>{escape(stage)}</td><td>{s:,.1f}</td>"
        f'<td class="bar"><div style="width:{100 * s / longest:.1f}%"></div></td></tr>\n'
        for stage, s in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return (
        '<div class="wide"><table><thead><tr><th>stage</th><th>seconds</th><th></th></tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
        f"<p>total: of the compression; the baselines' comparison comes on top of it.</p>\n"
    )


def _memory(report) -> str:
    planned = report.get("plan", {}).get("peak_host_bytes")
    rows = [("the host process, at most", _gigabytes(report["peak_rss_bytes"]), _gigabytes(planned))]
    for part, size in report.get("plan", {}).get("host_bytes", {}).items():
        rows.append((f"of that: {part}", "", _gigabytes(size)))
    return _table(("memory", "measured", "planned"), rows)


def _gigabytes(number: float | None) -> str | None:
    return None if number is None else resources.gigabytes(number)


def _settings(settings: Mapping[str, Any]) -> str:
    return _table(("setting", "value"), list(_leaves(settings)), "text")


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "numbers") -> str:
    """Floats with four decimals."""

    def line(cells, tag):
        shown = (f"{c:.4f}" if isinstance(c, float) and kind == "numbers" else c for c in cells)
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in shown) + "</tr>\n"

    head, body = line(header, "th"), "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>\n'


# --- Page ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #667; --line: #d8dce2; --tile: #f4f6f9;
  --bar: #4878a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #15181c; --faint: #9aa3ad; --line: #343a42;
  --tile: #1e2329; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 0 auto; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p, small, figcaption { color: var(--faint); }
p { max-width: 48rem; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .75rem; margin: 0 0 1.5rem; }
.tiles > div { background: var(--tile); border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-weight: 600; }
svg { width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
.numbers th, .numbers td { white-space: nowrap; }
.text td { overflow-wrap: anywhere; min-width: 6rem; }
.bar { width: 20rem; }
.bar div { background: var(--bar); height: .8rem; margin-top: .3rem; }
""".strip()

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}</body>
</html>
"""
