"""What a checkpoint of any layout is, without reading its weights.

    python experiments/inspect_checkpoint.py PATH

Layout, architecture and the published model that has it, parameters, dtypes, chunks, bytes; of compressed experts bits
per weight, density and codec by layer; what is missing or foreign. Exit code 1 if it can't be opened. --density reads
compressed experts, to count what a report beside them doesn't tell; --report=FILE writes all of it as JSON.
"""

import collections

from absl import app, flags

import common
from qmoe_jax import files, reports
from qmoe_jax.checkpoints.inspection import inspect

DENSITY = flags.DEFINE_bool("density", False, "Decode compressed experts to count non-zero weights.")
PRESET = flags.DEFINE_string("preset", None, "Published architecture of a checkpoint of MaxText's without config.json.")
REPORT = flags.DEFINE_string("report", None, "JSON file for all that is found.")


def summary(report: dict) -> list[list]:
    """Lines of the table: what, and what was found."""
    parameters, on_disk = report["parameters"], report["on_disk"]
    return [
        ["layout", report["layout"]],
        ["published model", report["preset"]],
        *report["summary"],
        ["parameters", f"{parameters['all']:,}, of which experts {parameters['experts']:,}"],
        ["dtypes", "; ".join(f"{name}: {count:,}" for name, count in report["dtypes"].items())],
        ["on disk", f"{on_disk['bytes']:,} bytes in {on_disk['files']:,} files" if on_disk["files"] else None],
    ]


def main(argv):
    if len(argv) != 2:
        raise ValueError("expected one path: python experiments/inspect_checkpoint.py PATH")
    report = inspect(argv[1], density=DENSITY.value, preset=PRESET.value)
    if REPORT.value:
        files.write_json(REPORT.value, report)
    for name in report["foreign"]:
        reports.say(f"foreign: {name}")
    if report["problems"]:
        raise ValueError(f"a {report['layout']} checkpoint that can't be opened: " + "\n  ".join(report["problems"]))
    for what, found in summary(report):
        reports.say(f"{what:<18}{'-' if found is None else found}")
    for why, names in report["left_out"].items():
        reports.say(f"{'left out':<18}{why}: {', '.join(names)}")
    if report["chunks"]:
        alike = collections.Counter(
            (name.split("/")[-2], str(c["shape"]), str(c["chunk"]), c["number"]) for name, c in report["chunks"].items()
        )
        rows = [[matrix, layers, *rest] for (matrix, *rest), layers in alike.items()]
        reports.say("\n" + reports.table(("matrix", "layers", "[experts, in, out]", "chunk", "chunks"), rows))
    if report["experts"]:
        rows = [
            [layer, e["codec"], e["weights"], e["bytes"], e["bits_per_weight"], e["density"]]
            for layer, e in report["experts"].items()
        ]
        header = ("layer", "codec", "weights", "bytes", "bits/weight", "density")
        reports.say("\n" + reports.table(header, rows))


if __name__ == "__main__":
    app.run(common.without_traceback(main))
