"""What the experiments share: the configuration's fields and defaults, and how they become the library's settings."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_dict, config_flags

from qmoe_jax import codecs, finetuning, reports, resources, streaming
from qmoe_jax.checkpoints import Checkpoint, open_checkpoint
from qmoe_jax.checkpoints.compressed import PARTS, PROGRESS
from qmoe_jax.checkpoints.samples import digest, samples
from qmoe_jax.compression import choosing, planning, rehearsal
from qmoe_jax.compression.compress import check_uncompressed
from qmoe_jax.compression.progress import fingerprint
from qmoe_jax.kernels.compressed_ragged_dot import api
from qmoe_jax.models import families
from qmoe_jax.models.expert_parallel import check_mesh, expert_mesh
from qmoe_jax.models.family import Example
from qmoe_jax.processes import Processes
from qmoe_jax.quantization import settings as quantization_fields
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.version import __version__

flags.disclaim_key_flags()  # What is defined here is listed by --help of the experiment that asks for it.

# Fields of the config that may differ from process to process.
OWN_TO_A_HOST = {
    "data": ("vocabulary", "calibration", "validation"),
    "memory": ("weights_bytes", "scratch", "activations"),
    "model": ("checkpoint",),
}
PROBED_EXPERTS, PROBED_TOKENS = 4, 4_096
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def default_config() -> config_dict.ConfigDict:
    """Every field of a compression experiment, with the paper's settings where the paper has them."""
    # What isn't set is as the method wants it.
    quantization = {
        name: config_dict.placeholder(kind) if default is None else default
        for name, (kind, default) in quantization_fields.fields().items()
    }
    return config_dict.create(
        data=dict(
            vocabulary=config_dict.placeholder(str),  # the model's vocabulary file
            calibration=config_dict.placeholder(str),  # JSON lines or plain text; globs and comma lists too
            validation=config_dict.placeholder(str),
            num_calibration=10_000,
            candidates=config_dict.placeholder(int),  # more documents, of which num_calibration are chosen
            choose_by="routers",  # so that all experts get tokens, by routers alone or by the whole model, 'routing'
            num_validation=128,
            max_length=568,  # tokens; longer documents are skipped
            append_eos=True,  # documents end with an end of sequence
            window=config_dict.placeholder(int),  # join documents and cut them into windows of so many tokens
            seed=0,
        ),
        model=dict(
            checkpoint=config_dict.placeholder(str),  # unless --checkpoint says another
            preset="",  # published size to check the checkpoint against, such as switch_base_128; MaxText's may need it
            dtype="float32",  # of activations
            implementation=config_dict.placeholder(str),  # of products on compressed experts; None: the best that works
            codec=config_dict.placeholder(str),  # of compressed experts in memory, when generating; None: as stored
            # What checkpoints may not tell, such as top_k.
            **{field: config_dict.placeholder(kind) for field, (kind, _) in families.untold().items()},
        ),
        quantization=quantization,
        codec=dict(
            name="gap",
            num_shards=config_dict.placeholder(int),  # of each layer's experts, for as many readers; None: by size
        ),
        finetune={  # see `finetuning.Settings`
            field.name: ",".join(field.default) if field.name == "parts" else field.default
            for field in dataclasses.fields(finetuning.Settings)
        }
        | {"layerwise": config_dict.placeholder(str)},  # a layer at a time, towards one of `finetuning.TARGETS`
        save=config_dict.placeholder(bool),  # None: if the codec holds them (2-bit experts: gap)
        compare=True,  # also measure bfloat16 and round-to-nearest on the validation documents
        mesh=dict(experts=1),  # devices that a layer's experts are spread over, in evaluation and generation
        memory=dict(
            tokens_per_batch=8_192,
            tokens_per_expert_call=16_384,
            experts_per_group=16,
            weights_bytes=config_dict.placeholder(int),  # for experts that are read; None: half of the host's memory
            scratch=config_dict.placeholder(str),  # folder for those that don't fit; None: beside the output
            activations=config_dict.placeholder(str),  # folder for the activations of all tokens; None: in memory
            commit_share=0.03,  # of the time, at most, for committing layers; 1: each layer is committed
        ),
        generation=dict(
            prompt="def __init__(self, name, value):",  # unless --prompt says another
            max_length=64,
            temperature=0.0,
            top_p=1.0,
            seed=0,
        ),
    )


def untold(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Fields of the architecture that checkpoints may not tell, and the config gives."""
    given = {field: config.model[field] for field in families.untold()}
    return {field: value for field, value in given.items() if value is not None}


def define_checkpoint(help_text: str) -> flags.FlagHolder:
    """The flag --checkpoint, for `checkpoint_path`."""
    return flags.DEFINE_string("checkpoint", None, f"{help_text} Default: the config's.")


def checkpoint_path(flag: flags.FlagHolder, config: config_dict.ConfigDict) -> str:
    """What --checkpoint says, or else the config. Raises ValueError if neither does."""
    path = flag.value or config.model.checkpoint
    if not path:
        raise ValueError("No checkpoint is given: give --checkpoint=DIR.")
    return path


def say_left_out(checkpoint: Checkpoint) -> None:
    """Prints what its files have and the model doesn't."""
    for why, names in checkpoint.provenance.get("left_out", {}).items():
        reports.say(f"{checkpoint.path}: left out: {why}: {', '.join(names)}")


def open_model(path: str, config: config_dict.ConfigDict) -> tuple[Checkpoint, Any]:
    """The checkpoint, checked against the config's preset, and the vocabulary, checked against the checkpoint."""
    choose_implementation(config)
    checkpoint = open_checkpoint(path, preset=config.model.preset or None, **untold(config))
    say_left_out(checkpoint)
    if config.model.preset:
        families.check_preset(checkpoint.config, config.model.preset)
    vocabulary = checkpoint.family.task.vocabulary(_given(config, "vocabulary"))
    vocabulary.check(checkpoint.config.vocab_size)
    return checkpoint, vocabulary


def choose_implementation(config: config_dict.ConfigDict) -> None:
    """Has products on compressed experts take the implementation that the config names, if it does."""
    name = config.model.implementation
    if name is None:
        return
    if name not in api.IMPLEMENTATIONS:
        known = ", ".join(api.IMPLEMENTATIONS)
        raise ValueError(f"config.model.implementation: found {name!r}, expected one of {known}.")
    os.environ[api.ENVIRONMENT] = name


def codec_in_memory(config: config_dict.ConfigDict) -> str | None:
    """What the config names for compressed experts in memory. Raises ValueError for an unknown codec."""
    name = config.model.codec
    if name is not None and name not in codecs.CODECS:
        known = ", ".join(codecs.CODECS)
        raise ValueError(f"config.model.codec: found {name!r}, expected one of {known}.")
    return name


def examples(
    config: config_dict.ConfigDict, which: str, checkpoint: Checkpoint, vocabulary: Any, number: int | None = None
) -> Any:
    """The 'calibration' or 'validation' documents, as the model's task has them; another number of them if given."""
    if config.data[f"num_{which}"] < 1:
        raise ValueError(f"config.data.num_{which}: found {config.data[f'num_{which}']}, expected at least 1.")
    return checkpoint.family.task.load(
        _given(config, which),
        vocabulary,
        number or config.data[f"num_{which}"],
        max_length=config.data.max_length,
        seed=config.data.seed,
        append_eos=config.data.append_eos,
        window=config.data.window,
    )


def chosen(
    config: config_dict.ConfigDict, candidates: Sequence[Example], checkpoint: Checkpoint, memory: streaming.Settings
) -> list[Example]:
    """Of candidates, as many as the config says."""
    data = config.data
    return choosing.choose_examples(checkpoint, candidates, data.num_calibration, data.choose_by, memory)


def without_folders(config: config_dict.ConfigDict) -> dict[str, Any]:
    """The config as JSON values, its files by name only: for reports that others are to read."""
    fields = config.to_dict()
    files = ("vocabulary", "calibration", "validation")
    fields["data"] |= {f: re.sub(r"[^,]*/", "", fields["data"][f] or "") or None for f in files}
    fields["model"]["checkpoint"] = pathlib.Path(fields["model"]["checkpoint"] or "").name or None
    return fields


def _given(config: config_dict.ConfigDict, field: str) -> str:
    if not config.data[field]:
        raise ValueError(f"config.data.{field} is not set: give --config.data.{field}=FILE.")
    return config.data[field]


def quantization_settings(config: config_dict.ConfigDict) -> QuantizationSettings:
    return QuantizationSettings(**config.quantization)


def finetuning_settings(config: config_dict.ConfigDict) -> finetuning.Settings:
    """What the config says; names of parts are joined by commas there. Raises ValueError that names the field."""
    fields = config.finetune.to_dict()
    target = fields.pop("layerwise")
    if target is not None and target not in finetuning.TARGETS:
        raise ValueError(
            f"config.finetune.layerwise: found {target!r}, expected one of {', '.join(finetuning.TARGETS)}, or nothing "
            "for the whole model at once."
        )
    try:
        parts = tuple(filter(None, re.split(r"[\s,]+", fields["parts"])))
        return finetuning.Settings(**fields | {"parts": parts})
    except ValueError as e:
        raise ValueError(f"config.finetune.{e}") from e


def activation_dtype(config: config_dict.ConfigDict) -> Any:
    if config.model.dtype not in DTYPES:
        raise ValueError(f"config.model.dtype: found {config.model.dtype!r}, expected one of {', '.join(DTYPES)}.")
    return DTYPES[config.model.dtype]


def memory_settings(config: config_dict.ConfigDict) -> streaming.Settings:
    for field, value in config.memory.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"config.memory.{field}: found {value}, expected at least 1.")
    if not 0 <= config.memory.commit_share <= 1:
        raise ValueError(f"config.memory.commit_share: found {config.memory.commit_share}, expected 0 to 1.")
    return streaming.Settings(dtype=activation_dtype(config), **config.memory)


def mesh(
    config: config_dict.ConfigDict, checkpoint: Checkpoint, among: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """The devices, of all or of those given, that experts are spread over; None: one."""
    devices = config.mesh.experts
    if devices == 1:
        return None
    try:
        found = expert_mesh(devices, among)
        check_mesh(found, checkpoint.config.num_experts)
    except ValueError as e:
        raise ValueError(f"config.mesh.experts: {e}") from e
    return found


# --- Plans ------------------------------------------------------------------------------------------------------------


def streamed_examples(
    config: config_dict.ConfigDict, quantization: QuantizationSettings, checkpoint: Checkpoint, vocabulary: Any
) -> tuple[list[Example], int]:
    """All examples that stream through a compression, and how many of them, the first, calibrate."""
    calibration = list(examples(config, "calibration", checkpoint, vocabulary)) if quantization.calibrated else []
    return [*calibration, *examples(config, "validation", checkpoint, vocabulary)], len(calibration)


def plan(
    checkpoint: Checkpoint,
    streamed: Sequence[Example],
    num_calibration: int,
    quantization: QuantizationSettings,
    memory: streaming.Settings,
    codec: str | None,
) -> dict:
    """See `planning.plan`."""
    check_uncompressed(checkpoint)
    work = planning.workload(checkpoint.family.task, streamed, num_calibration)
    grids = checkpoint.grids(checkpoint.config.sparse_layers[0])
    return _plan(checkpoint.config, work, grids, quantization, memory, codec)


def expected_seconds(
    checkpoint: Checkpoint,
    streamed: Sequence[Example],
    num_calibration: int,
    quantization: QuantizationSettings,
    memory: streaming.Settings,
    codec: str | None,
) -> dict[str, float]:
    """Seconds of each stage, from a few experts of the first sparse layer; see `rehearsal`."""
    model, work = checkpoint.config, planning.workload(checkpoint.family.task, streamed, num_calibration)
    experts = min(PROBED_EXPERTS, memory.experts_per_group, model.num_experts)
    kernels, per_byte = rehearsal.read_experts(checkpoint, model.sparse_layers[0], experts, memory)
    measured = rehearsal.measure(
        model,
        work,
        memory,
        quantization,
        codec,
        experts=experts,
        most_tokens=PROBED_TOKENS,
        kernels=kernels,
        reading_seconds=per_byte,
        say=lambda what: reports.say(f"trying: {what}"),
    )
    stored = max(grid.itemsize for grid in checkpoint.grids(model.sparse_layers[0]).values())
    return rehearsal.project(model, work, quantization, measured, stored_itemsize=stored)


def check_room(plan: dict, memory: streaming.Settings, output: str | os.PathLike) -> None:
    """Raises ValueError where a disk has less room than the plan's files on it need."""
    # An interrupted run's: kept, or removed first.
    parts = [pathlib.Path(output) / part for part in (*PARTS, PROGRESS)]
    there_already = sum(p.stat().st_blocks * 512 for part in parts for p in part.rglob("*") if p.is_file())
    wanted = (
        (output, "--output", plan["write_bytes"] + plan["progress_file_bytes"] - there_already),
        (memory.scratch, "config.memory.scratch", plan["scratch_bytes"]),
        (memory.activations, "config.memory.activations", plan["activation_file_bytes"]),
    )
    disks: dict[int, list] = {}
    for folder, flag, needed in wanted:
        if folder and needed > 0:
            path = pathlib.Path(folder).absolute()
            there = next(p for p in (path, *path.parents) if p.exists())
            disks.setdefault(there.stat().st_dev, []).append((there, flag, needed))
    for files in disks.values():
        free, needed = shutil.disk_usage(files[0][0]).free, sum(n for *_, n in files)
        if free < needed:
            raise ValueError(
                f"{files[0][0]} has {resources.gigabytes(free)} free, {resources.gigabytes(needed)} are needed for "
                f"{', '.join(f'{flag} ({resources.gigabytes(n)})' for _, flag, n in files)}. Choose a larger disk."
            )


def plan_of_preset(
    config: config_dict.ConfigDict, quantization: QuantizationSettings, memory: streaming.Settings, codec: str | None
) -> dict:
    """The same for a published model, from nothing but its name; every document as long as may be."""
    model, data = families.preset(config.model.preset), config.data
    calibration = data.num_calibration if quantization.calibrated else 0
    work = planning.greatest_workload(
        families.family_of(model).task, calibration, data.num_validation, data.window or data.max_length
    )
    return _plan(model, work, planning.grids_of(model), quantization, memory, codec)


def _plan(model, work, grids, quantization, memory, codec) -> dict:
    return planning.plan(
        model,
        work,
        memory,
        quantization,
        grids=grids,
        is_cpu=jax.local_devices()[0].platform == "cpu",
        resident_bytes=resources.rss_bytes(),
        codec=codec,
    )


# --- Output -----------------------------------------------------------------------------------------------------------


def agree(processes: Processes, config: config_dict.ConfigDict, **flag_values: Any) -> None:
    """Sees to it that all processes of a run were started alike, before any work.

    Where files lie may differ from host to host, and how much memory there is.

    Raises ValueError that names what differs.
    """
    fields = config.to_dict()
    for group, names in OWN_TO_A_HOST.items():
        fields[group] = {name: value for name, value in fields[group].items() if name not in names}
    said = {f"config.{name}": value for name, value in _flat(fields).items()}
    said |= {f"--{name}": value for name, value in flag_values.items()}
    processes.agree(said | {"version of qmoe_jax": __version__, "version of jax": jax.__version__})


def agree_on_model(processes: Processes, checkpoint: Checkpoint, documents: Sequence[Example] = ()) -> None:
    """Sees to it that all processes have read the same model and documents, wherever those lie.

    Raises ValueError that names what differs.
    """
    if processes.count > 1:
        told = fingerprint(checkpoint, (), documents, {})
        manifest = getattr(checkpoint, "manifest", None)  # It has the checksums of all weights.
        told["weights"] = manifest["sha256"] if manifest else digest(samples(checkpoint))
        processes.agree(told)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def prepare_output(path: str, overwrite: bool, *inputs: str) -> pathlib.Path:
    """The directory to write to, not made yet; refused where writing would destroy something.

    Raises:
      FileExistsError: it is a file, or isn't empty and `overwrite` is not set; or it is, or holds, or lies in one of
        `inputs`.
    """
    output = pathlib.Path(path)
    for source in inputs:
        if "://" in source:
            continue
        a, b = output.resolve(), pathlib.Path(source).resolve()
        if a == b or b in a.parents or a in b.parents:
            raise FileExistsError(f"--output={path} and the checkpoint {source} overlap; write somewhere else.")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output={path} is a file, expected a directory. Choose another.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(f"--output={path} exists and is not empty. Choose another, or give --overwrite.")
    return output


def check_file(path: str | None, flag: str) -> None:
    """Raises OSError where a file that a command writes at its end, if it is asked for, can't be written.

    Args:
      path: None: it isn't asked for.
      flag: that names it, for the message.
    """
    if path is None:
        return
    file = pathlib.Path(path).absolute()
    if file.is_dir():
        raise IsADirectoryError(f"--{flag}={path} is a directory, expected a file.")
    there = next(p for p in file.parents if p.exists() or p.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as e:
        raise OSError(f"--{flag}={path} can't be written: {there}: {os.strerror(e.errno or 0)}.") from e


def environment() -> dict[str, Any]:
    """What a report was made with: versions and devices, as JSON values."""
    devices = jax.local_devices()
    return {
        "qmoe_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


# --- Flags ------------------------------------------------------------------------------------------------------------


def define_config(name: str, default: str, help_text: str) -> flags.FlagHolder:
    """`config_flags.DEFINE_config_file`, but a field that the config doesn't have is told in one line, and exit 1.

    It raises where the flag is defined, before `without_traceback` is there to catch it.
    """
    try:
        return config_flags.DEFINE_config_file(name, default, help_text)
    except (AttributeError, KeyError, TypeError) as e:  # TypeError: a field of what isn't a group of fields.
        error = e if isinstance(e, KeyError) else e.args[0]
        unknown, *guess = str(error.args[0]).splitlines() if isinstance(error, KeyError) else [""]
        field = unknown.strip("'\"")
        given = [a.partition("=")[0] for a in sys.argv[1:] if a.startswith(f"--{name}.")]
        flag = next((g for g in given if field in g.split(".")), "" if field else ", ".join(given))
        if not flag:  # The config file itself is wrong.
            raise
        sys.exit(f"error: {flag}: no such field in the config. {' '.join(guess)}".rstrip())
