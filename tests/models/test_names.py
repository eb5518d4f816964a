"""Tables of names, read both ways, and parameters that are stored as other families store them."""

import types

import jax
import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.checkpoints.checkpoint import StoredCheckpoint
from qmoe_jax.checkpoints.store import box_of, slices
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.families import FAMILIES, mismatches
from qmoe_jax.models.names import SAME, TRANSPOSED, Packed, Part, Row, Table, Tensors, in_short
from qmoe_jax.models.switch.config import PRESETS

E, D, F = 3, 4, 6  # experts, in, out


BLOCK = (4, 3)  # of `blocks`: rows and columns that share a scale, the last ones fewer


def blocks(values, scales):
    rows, columns = values.shape
    return values.astype(np.float32) * np.kron(scales, np.ones(BLOCK, np.float32))[:rows, :columns]


def nibbles(values, scales):
    """Two 4-bit numbers a byte, [..., out, in / 2], with a scale for each byte."""
    pairs = np.stack([values & 15, values >> 4], axis=-1) * scales[..., None]
    return pairs.reshape(*values.shape[:-1], 2 * values.shape[-1])


NIBBLES = Packed(("{layer}.down_scales",), lambda shape: (*shape[:-1], 2 * shape[-1]), nibbles, ((1, 2), (1, 2)))
BLOCKS = Packed(("{layer}.dense.weight_scale",), lambda shape: shape, blocks, ((1, 1), BLOCK))
TABLE = Table(
    [
        Row("embedding", "embed.weight"),
        Row("embedding", "tied.weight"),
        Row("layers_{layer}/{matrix}", "{layer}.{expert}.{matrix}.weight", TRANSPOSED),
        Row("layers_{layer}/gate", "{layer}.gate_up", SAME, Part(0, 2, interleaved=True)),
        Row("layers_{layer}/up", "{layer}.gate_up", SAME, Part(1, 2, interleaved=True)),
        Row("layers_{layer}/left", "{layer}.sides", TRANSPOSED, Part(0, 2)),
        Row("layers_{layer}/right", "{layer}.sides", TRANSPOSED, Part(1, 2)),
        Row("layers_{layer}/down", "{layer}.down_blocks", TRANSPOSED, None, NIBBLES),
        Row("layers_{layer}/dense", "{layer}.dense.weight", TRANSPOSED, None, BLOCKS),
    ],
    {"layer": r"\d+", "matrix": "w1|w2"},
)


class Memory:
    """A store of arrays in memory that counts what is read of them."""

    path, described = "memory", types.MappingProxyType({})

    def __init__(self, arrays):
        self.arrays, self.read_elements = arrays, 0
        self.specs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}

    def read(self, name, index=()):
        self.read_elements += self.arrays[name][index].size
        return self.arrays[name][index]

    def source(self, name):
        return None


class Names:
    """`TABLE` as a family has it; the config is of no interest."""

    def parameters(self, shapes, described):
        return TABLE.parameters(shapes)[0]

    def config(self, shapes, described, **overrides):
        return PRESETS["switch_base_8"]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    f32 = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "embed.weight": f32(5, D),
        **{f"0.{e}.w1.weight": f32(F, D) for e in range(E)},
        "0.gate_up": f32(E, D, 2 * F),
        "0.sides": f32(E, 2 * F, D),
        "0.down_blocks": rng.integers(0, 256, (E, F, D // 2), np.uint8),
        "0.down_scales": 2.0 ** rng.integers(-3, 3, (E, F, D // 2)).astype(np.float32),
        "0.dense.weight": f32(F, D).astype(ml_dtypes.float8_e4m3fn),
        "0.dense.weight_scale": f32(2, 2),
    }


def family(arrays):
    """A family of models that have what is expected of these arrays."""
    shapes = {name: value.shape for name, value in expected(arrays).items()}
    return types.SimpleNamespace(names={"some": Names()}, title="toy", param_shapes=lambda config: shapes)


def opened(arrays, family):
    """Of that family, which its config doesn't tell."""
    return type("Toy", (StoredCheckpoint,), {"family": family})(Memory(arrays), "some", family, {})


@pytest.fixture
def checkpoint(arrays):
    return opened(arrays, family(arrays))


def expected(arrays):
    down = arrays["0.down_blocks"]
    down = np.stack([down & 15, down >> 4], axis=-1).reshape(E, F, D) * np.repeat(arrays["0.down_scales"], 2, -1)
    scales = np.repeat(np.repeat(arrays["0.dense.weight_scale"], 4, 0)[:F], 3, 1)[:, :D]
    dense = arrays["0.dense.weight"].astype(np.float32) * scales
    return {
        "embedding": arrays["embed.weight"],
        "layers_0/w1": np.stack([arrays[f"0.{e}.w1.weight"].T for e in range(E)]),
        "layers_0/gate": arrays["0.gate_up"][..., ::2],
        "layers_0/up": arrays["0.gate_up"][..., 1::2],
        "layers_0/left": arrays["0.sides"][:, :F].swapaxes(1, 2),
        "layers_0/right": arrays["0.sides"][:, F:].swapaxes(1, 2),
        "layers_0/down": down.swapaxes(1, 2).astype(ml_dtypes.bfloat16),
        "layers_0/dense": dense.T.astype(ml_dtypes.bfloat16),
    }


INDICES = [
    (),
    (1,),
    (slice(1, 3),),
    (-1, slice(None), 2),
    (..., slice(1, None, 2)),
    (slice(None, None, -1), 0),
    (slice(0, 0),),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_any_slice_of_any_kind_of_parameter(index, arrays, checkpoint):
    assert set(checkpoint.specs) == set(expected(arrays))
    for name, value in expected(arrays).items():
        assert (checkpoint.specs[name].shape, checkpoint.specs[name].dtype) == (value.shape, value.dtype)
        if sum(entry is not Ellipsis for entry in index) <= value.ndim:
            found = checkpoint.read(name, index)
            assert found.dtype == value.dtype, name
            np.testing.assert_array_equal(found, value[index], err_msg=name)


@pytest.mark.parametrize("name", ["w1", "gate", "right"])
def test_no_more_is_read_than_asked_for(name, checkpoint):
    checkpoint.read(f"layers_0/{name}", (slice(1, 3), slice(0, 2), slice(2, 5)))
    assert checkpoint.store.read_elements == 2 * 2 * 3


@pytest.mark.parametrize(
    "name, index, entries",
    [
        ("down", (1,), F * D),
        ("down", (1, slice(1, 3), slice(2, 5)), 2 * 3 * 2),  # two bytes for each of three outputs, and their scales
        ("down", (1, 3, 0), 2),
        ("dense", (2, slice(0, 3)), 4 * 3 + 1),  # a block, [out, in] in the file, and its scale
        ("dense", (3, 5), 2 * 1 + 1),  # the last block, two by one
        ("dense", (slice(3, 0, -2), 5), 2 * 4 + 2),
    ],
)
def test_of_what_is_packed_no_more_is_read_than_its_blocks(name, index, entries, arrays, checkpoint):
    found = checkpoint.read(f"layers_0/{name}", index)
    np.testing.assert_array_equal(found, expected(arrays)[f"layers_0/{name}"][index])
    assert checkpoint.store.read_elements == entries


def test_a_table_is_read_both_ways():
    assert TABLE.tensors("layers_7/w1", 2) == Tensors(("7.0.w1.weight", "7.1.w1.weight"), TRANSPOSED, stacked=True)
    assert TABLE.tensors("embedding", 2) == Tensors(("embed.weight",))
    assert TABLE.tensors("layers_7/up", 2).part == Part(1, 2, interleaved=True)
    assert TABLE.tensors("layers_7/down", 2).packed[0].beside == ("7.down_scales",)
    with pytest.raises(KeyError):
        TABLE.tensors("layers_7/other", 2)
    found, foreign = TABLE.parameters(["tied.weight", "7.gate_up", "7.0.w1.weight", "7.1.w1.weight", "other"])
    assert foreign == ["other"]
    assert set(found) == {"embedding", "layers_7/gate", "layers_7/up", "layers_7/w1"}
    assert found["layers_7/w1"] == TABLE.tensors("layers_7/w1", 2)


def test_arrays_that_nobody_knows_are_refused(arrays):
    toy = family(arrays)
    toy.names["some"].why_left_out = lambda config, name: "spare" if name == "tied.weight" else None
    checkpoint = opened({**arrays, "tied.weight": arrays["embed.weight"]}, toy)
    assert checkpoint.left_out == checkpoint.provenance["left_out"] == {"spare": ["tied.weight"]}
    with pytest.raises(CheckpointError, match="1 arrays are part of no parameter:\n  other"):
        opened({**arrays, "other": arrays["embed.weight"]}, toy)


def test_names_in_short():
    names = [f"layers.{i}.experts.{e}.up" for i in (3,) for e in range(12)] + ["layers.3.norm", "layers.4.norm"]
    assert in_short(names) == ["layers.3.experts.0-11.up", "layers.3-4.norm"]


def test_scales_that_are_not_there():
    """A model that isn't packed has none; an experts' tensor without them is named."""
    found, foreign = TABLE.parameters(["0.dense.weight"])
    assert not found["layers_0/dense"].packed and not foreign
    with pytest.raises(CheckpointError, match="'0.gate_up' has 7 outputs"):
        TABLE.parameters(["0.gate_up"])[0]["layers_0/up"].shape({"0.gate_up": (E, D, 7)})
    shapes = {"0.dense.weight": (F, D), "0.dense.weight_scale": (3, 2)}
    with pytest.raises(CheckpointError, match=r"weight_scale' has shape \[3, 2\], expected \[2, 2\] at its end"):
        TABLE.parameters(shapes)[0]["layers_0/dense"].shape(shapes)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_boxes(index):
    value = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    box, rest = box_of(index, value.shape)
    np.testing.assert_array_equal(value[slices(box)][rest], value[index])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_knows_its_names(name):
    """There and back, for all parameters of published models that a layout can hold."""
    family, known = FAMILIES[name], 0
    for config in family.PRESETS.values():
        shapes = family.param_shapes(config)
        for layout, names in family.names.items():
            dtypes = dict.fromkeys(shapes, np.dtype(np.float32))
            try:
                described = names.describe(config, dtypes, None)
            except CheckpointError:
                continue
            if layout == "ista" or len(config.sparse_layers) * config.num_experts > 15_000:
                continue
            stored = {}
            for parameter, shape in shapes.items():
                found = names.tensors(parameter, config)
                shape = (*shape[:-1], shape[-1] * found.part.of) if found.part else shape
                shape = shape[1:] if found.stacked else shape
                shape = (*shape[:-2], *shape[:-3:-1]) if found.transposed else shape
                stored |= dict.fromkeys((*found.names, *found.copies), shape)
            back = names.parameters(stored, described)
            assert {n: t.shape(stored) for n, t in back.items()} == shapes
            assert mismatches(names.config(shapes, described), config) == []
            known += 1
    assert known
