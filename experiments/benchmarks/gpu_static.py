"""What nvcc says of the CUDA kernels, without a GPU: registers, spills, shared memory, instructions of their loops.

    python experiments/benchmarks/gpu_static.py --output=results/gpu_static.json

Instructions are counted where there is an nvdisasm (CUDA, or the package nvidia-cuda-nvdisasm), of the architecture
--counted alone.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

from absl import app, flags

from qmoe_jax import files
from qmoe_jax.kernels.compressed_ragged_dot import cuda

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line

ARCHITECTURES = flags.DEFINE_list("architectures", [str(a) for a in cuda.shared.ARCHITECTURES], "Compute capabilities.")
COUNTED = flags.DEFINE_string("counted", "90", "The one whose instructions are counted.")
NVDISASM = flags.DEFINE_string("nvdisasm", "nvdisasm", "Program that disassembles.")
SOURCE = flags.DEFINE_string("source", str(cuda.gap.SOURCE), "CUDA source, such as one of another version.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report.")

ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


def kernels(architecture: str, binary: pathlib.Path) -> dict[str, dict[str, int]]:
    """By demangled name: registers, and bytes of registers that went to local memory."""
    flags = (*cuda.shared.FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v", "-o", binary)
    log = cuda.shared.compile_with(cuda.shared.find_nvcc(), pathlib.Path(SOURCE.value), *flags)
    return {
        name: {"registers": int(registers), "spilled_bytes": int(stack) + int(stores) + int(loads)}
        for name, stack, stores, loads, registers in ENTRY.findall(log)
    }


def loops(binary: pathlib.Path) -> dict[str, list[int]]:
    """Instructions of each function's loops, longest first; nothing without an nvdisasm."""
    try:
        text = subprocess.run([NVDISASM.value, "-c", binary], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {part.split(":")[0]: sorted(_loops(part), reverse=True) for part in text.split("\n.text.")[1:]}


def _loops(machine_code: str):
    """Instructions between a label and a branch back to it."""
    labels, count = {}, 0
    for line in machine_code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = count
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            count += 1
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if target and target.group(1) in labels:
                yield count - labels[target.group(1)]


def readable(name: str) -> str:
    """`FewTokens<bfloat16, 1, 2>` of a mangled name."""
    found = re.search(r"\d(FewTokens|Tiles|Transposed|MultiplyFew)I([ft])((?:L[bi]\d+E)+)E", name)
    if not found:
        return name
    parameters = re.findall(r"L[bi](\d+)E", found.group(3))
    return f"{found.group(1)}<{', '.join([{'f': 'float32', 't': 'bfloat16'}[found.group(2)], *parameters])}>"


def main(_):
    report = {"nvcc": subprocess.run([cuda.shared.find_nvcc(), "--version"], capture_output=True, text=True).stdout}
    report["nvcc"] = report["nvcc"].strip().splitlines()[-1]
    report["kernels"] = {}
    with tempfile.TemporaryDirectory() as folder:
        binary = pathlib.Path(folder, "kernels.cubin")
        for architecture in ARCHITECTURES.value:
            for name, found in kernels(architecture, binary).items():
                report["kernels"].setdefault(readable(name), {})[f"sm_{architecture}"] = found
            if architecture == COUNTED.value:
                for name, lengths in loops(binary).items():
                    report["kernels"].setdefault(readable(name), {})["loops"] = lengths
    for name, found in sorted(report["kernels"].items()):
        registers = " ".join(f"{a}: {v['registers']}" for a, v in found.items() if a != "loops")
        spilled = sum(v["spilled_bytes"] for a, v in found.items() if a != "loops")
        print(f"{name:32} {registers}; {spilled} bytes spilled; loops {found.get('loops', [])[:4]}")
    if OUTPUT.value:
        files.write_json(OUTPUT.value, report)


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
