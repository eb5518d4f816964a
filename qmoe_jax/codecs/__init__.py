"""Codecs: how the trits of a layer's experts become bytes, and back.

A codec is one module and one line in `CODECS`. It stores a dict of arrays, `data`; every array concatenates
over experts along its first axis. With `shape` = (experts, out, in), the module has

    encode_experts(trits uint8 [experts, out, in]) -> data
        Outside `jit`, as sizes depend on the values. Raises ValueError for what is not trits.
    check(data, shape) -> None
        Raises ValueError that names expert and row of the first malformed stream.
    static_bound(data) -> int
        What `decode_expert` has to know at compile time about the sizes in `data`; the largest of several
        groups of experts holds for all of them together.
    decode_expert(data, shape, bound, expert) -> trits uint8 [out, in]
        Inside `jit`, with a traced `expert`. Reads nothing out of bounds, whatever `data` holds.

Trits: 0 is zero, 1 the row's minimum, 2 its maximum; rows are outputs. `CompressedExperts` adds the levels.
"""

from types import ModuleType

from qmoe_jax.codecs import dictionary

CODECS: dict[str, ModuleType] = {
    "dictionary": dictionary,
}


def get(name: str) -> ModuleType:
    """The codec of that name. Raises ValueError that lists the names there are."""
    if name not in CODECS:
        raise ValueError(f"Unknown codec {name!r}. Known codecs: {', '.join(CODECS)}.")
    return CODECS[name]
