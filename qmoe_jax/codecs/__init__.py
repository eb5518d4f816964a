"""Codecs: how the symbols of a layer's experts become bytes, and back.

Symbols are uint8 [experts, out, in]; rows are outputs. 0 is zero, k = 1..L is the row's level k - 1. `levels` are
bfloat16 [experts, out, L] in rising order: L = 2 (ternary: minimum and maximum), 3 (2 bits) or more.

A codec is one module and one line in `CODECS`. It owns what is resident, `data`, a dict of arrays that kernels take,
each of which concatenates over experts along its first axis; and what is stored, a dict of arrays too. With `shape` =
(experts, out, in), the module has

    LEVELS
        The numbers L that it can hold.
    encode_experts(symbols, L) -> data
        Outside `jit`, as sizes depend on the values. Raises ValueError for what is not symbols, or an L it can't hold.
    pack(data, levels, shape) -> stored
        As NumPy arrays, levels included.
    stored_nbytes(data, levels, shape) -> int
        Bytes of what `pack` returns.
    unpack(stored, shape) -> data, levels
        Inverse of `pack`. Raises ValueError that names the expert and row (or block) of what is malformed, so that
        kernels need not check.
    take(data, start, stop) -> data
        Of experts start:stop alone. Outside `jit`, as sizes depend on the values.
    static_bound(data) -> int
        What `decode_expert` has to know at compile time about the sizes in `data`; the largest of several
        groups of experts holds for all of them together.
    decode_expert(data, shape, L, bound, expert) -> symbols uint8 [out, in]
        Inside `jit`, with a traced `expert`. Reads nothing out of bounds, whatever `data` holds.

`CompressedExperts` puts data and levels together.
"""

from types import ModuleType

from qmoe_jax.codecs import dictionary, gap, nibbles

CODECS: dict[str, ModuleType] = {
    "dictionary": dictionary,
    "gap": gap,
    "nibbles": nibbles,
}


def get(name: str) -> ModuleType:
    """The codec of that name. Raises ValueError that lists the names there are."""
    if name not in CODECS:
        raise ValueError(f"Unknown codec {name!r}. Known codecs: {', '.join(CODECS)}.")
    return CODECS[name]
