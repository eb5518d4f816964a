"""What a checkpoint of any layout is, without reading its weights.

    python experiments/inspect_checkpoint.py PATH

Layout, architecture and the published model that has it, parameters, dtypes, chunks, bytes; of compressed experts bits
per weight, density and codec by layer; what is missing or foreign. Exit code 1 if it can't be opened. --density reads
compressed experts, to count what a report beside them doesn't tell; --sample hashes some of the weights, which a
checkpoint that is compressed from them notes; --report=FILE writes all of it as JSON. --checksums reads all files:
SHA256SUMS is written beside a checkpoint that has none, or verified where there is one; exit code 1 if a file changed.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import collections

from absl import app, flags

import command_line
import common
from qmoe_jax import files, reports
from qmoe_jax.checkpoints import checksums, open_checkpoint
from qmoe_jax.checkpoints.inspection import inspect
from qmoe_jax.errors import listed

DENSITY = flags.DEFINE_bool("density", False, "Decode compressed experts to count non-zero weights.")
SAMPLE = flags.DEFINE_bool("sample", False, "Hash a sample of the weights, to tell models of one shape apart.")
CHECKSUMS = flags.DEFINE_bool(
    "checksums", False, "Write the SHA-256 of all files beside them (SHA256SUMS), or verify those that are there."
)
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
        *([["weights (sample)", report["weights_sample"]]] if report["weights_sample"] else []),
        *([["made of weights", origin]] if (origin := report["provenance"].get("weights_sample")) else []),
        ["on disk", f"{on_disk['bytes']:,} bytes in {on_disk['files']:,} files" if on_disk["files"] else None],
    ]


def report_checksums(path: str) -> None:
    """Raises ValueError that lists the files that aren't as they were."""
    found = checksums.write_or_verify(open_checkpoint(path))
    if found["problems"]:
        raise ValueError(listed(f"{found['file']}: the checkpoint isn't what it was:", found["problems"]))
    done = "written" if found["written"] else "verified"
    reports.say(f"{'checksums':<18}{found['files']:,} files {done}: {found['file']}")


def main(argv):
    if len(argv) != 2:
        raise ValueError("expected one path: python experiments/inspect_checkpoint.py PATH")
    common.check_file(REPORT.value, "report")
    report = inspect(argv[1], density=DENSITY.value, sample=SAMPLE.value, preset=PRESET.value)
    if REPORT.value:
        files.write_json(REPORT.value, report)
    for name in report["foreign"]:
        reports.say(f"foreign: {name}")
    if report["problems"]:
        raise ValueError(f"a {report['layout']} checkpoint that can't be opened: " + "\n  ".join(report["problems"]))
    if CHECKSUMS.value:
        report_checksums(argv[1])
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
    if report["super_experts"]:
        reports.say(f"\nlargest outputs: {reports.super_experts(report['super_experts'])}")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
