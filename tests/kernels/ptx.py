"""From a jitted function to what ptxas says about its Pallas kernels, on a machine without a GPU.

Needs the package triton.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile

import jax
import pytest

CAPABILITY = 90


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for an H200.

    Attributes:
      registers: of a thread.
      spilled: bytes of registers that went to local memory, stores and loads, and of stack.
      loops: machine instructions of each loop, innermost and outer ones alike, longest first.
    """

    name: str
    ptx: str
    registers: int
    spilled: int
    loops: tuple[int, ...]

    def __str__(self):
        return f"{self.name}: {self.registers} registers, {self.spilled} bytes spilled, loops of {self.loops}"


def lower(function, *arguments) -> jax.stages.Lowered:
    """Lowers for CUDA at compute capability 9.0. Arguments: arrays or ShapeDtypeStructs."""
    device = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # before, 9.0 was what Pallas assumed without a GPU
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

        h200 = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
        device = use_abstract_mesh(AbstractMesh((), (), abstract_device=h200))
    with device:
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def kernels(lowered: jax.stages.Lowered) -> list[Kernel]:
    """All Triton kernels in a lowered function, compiled. Skips the test where triton is missing."""
    pytest.importorskip("triton", reason="PTX needs the package triton")
    return [_kernel(ptx) for call in _custom_calls(lowered) for ptx in _ptx(call)]


def _custom_calls(lowered):
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"]):
            found.append(op)
        return WalkResult.ADVANCE

    from jaxlib.mlir.ir import WalkResult

    lowered.compiler_ir("stablehlo").operation.walk(lambda op: visit(getattr(op, "operation", op)))
    return found


def _ptx(call):
    from jaxlib.mlir import ir

    config = call.attributes["mhlo.backend_config"]  # with Triton's intermediate language as bytecode
    options = {key: ir.IntegerAttr(config[key]).value for key in ("num_warps", "num_stages")}
    return [_compile(ir.StringAttr(config["ir"]).value_bytes, options)]


def _compile(bytecode, options):
    import triton
    from jax._src.interpreters import mlir
    from jax._src.lib import triton as dialect
    from jaxlib.mlir import ir
    from triton.backends.compiler import GPUTarget

    with mlir.make_ir_context() as context, tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        dialect.dialect.register_dialect(context)
        path = pathlib.Path(folder, "kernel.ttir")
        path.write_text(ir.Module.parse(bytecode).operation.get_asm())
        triton.knobs.cache.dir = folder
        return triton.compile(str(path), target=GPUTarget("cuda", CAPABILITY, 32), options=options).asm["ptx"]


def _kernel(ptx):
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source, binary = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(ptx)
        log = _run(knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{CAPABILITY}a", source, "-o", binary).stderr
        machine_code = _run(knobs.nvidia.nvdisasm.path, "-c", binary).stdout
    return Kernel(
        name=re.search(r"\.entry (\w+)", ptx).group(1),
        ptx=ptx,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spilled=sum(map(int, re.findall(r"(\d+) bytes (?:spill stores|spill loads|stack frame)", log))),
        loops=tuple(sorted(_loops(machine_code), reverse=True)),
    )


def _run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def _loops(machine_code):
    """Instructions between a label and a conditional branch back to it."""
    labels, count = {}, 0
    for line in machine_code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = count
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            count += 1
            target = re.search(r"@!?U?P\d BRA.*`\((\.L_x_\d+)\)", line)
            if target and target.group(1) in labels:
                yield count - labels[target.group(1)]
