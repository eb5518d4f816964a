"""What processes tell each other arrives, to the bit."""

import distributed
import numpy as np
import pytest

from qmoe_jax.processes import Processes, share

CODE = """
import ml_dtypes
import numpy as np
from qmoe_jax import processes
processes.ROUND_BYTES = 256  # several rounds
p = processes.Processes()
assert p.gather({"x": 0.1 + 0.2, "i": p.index}) == [{"x": 0.1 + 0.2, "i": i} for i in range(p.count)]
assert p.from_first(f"from {p.index}") == "from 0"

def rows(a, b):  # from a to b
    rng = np.random.default_rng(10 * a + b)
    n = 0 if a == b == 0 else 17 * a + 5 * b
    h = rng.normal(size=(n, 3)).astype(ml_dtypes.bfloat16)
    return {"h": h, "i": rng.integers(-(2**62), 2**62, n), "e": rng.integers(0, 9, (n, 2)).astype(np.int32)}

for b, found in enumerate(p.exchange([rows(p.index, b) for b in range(p.count)])):
    for name, expected in rows(b, p.index).items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)
p.wait()
"""


def test_rows_and_values_arrive_to_the_bit():
    distributed.run(3, CODE, devices=1)


def test_one_process_tells_itself():
    p = Processes()
    assert (p.count, p.index, p.first) == (1, 0, True)
    assert p.gather([1]) == [[1]] and p.from_first(2) == 2
    outgoing = [{"h": np.ones((2, 3))}]
    assert p.exchange(outgoing)[0]["h"] is outgoing[0]["h"]


class Told(Processes):
    """A process that hears what others were given."""

    def __init__(self, *others):
        self.count, self.index, self.others = 1 + len(others), 0, others

    def gather(self, value):
        return [value, *self.others]


def test_what_differs_is_named_with_what_each_process_has():
    given = {"damping": 0.1, "seed": 0, "documents": "3f" * 32, "codec": "gap", "shards": None, "save": True}
    Told(given, dict(given)).agree(given)
    for name, other in (("damping", 0.2), ("codec", "dictionary"), ("shards", 2), ("save", False), ("seed", 1)):
        said = rf"{name}: process 0 has {given[name]}, process 1 has {given[name]}, process 2 has {other}\."
        with pytest.raises(ValueError, match=rf"not given the same\. {said} Give all of them one command"):
            Told(given, given | {name: other}).agree(given)
    with pytest.raises(
        ValueError, match=r"documents: process 0 has 3f3f3f3f3f3f\.\.\., process 1 has aaaaaaaaaaaa\.\.\."
    ):
        Told(given | {"documents": "a" * 64}).agree(given)
    with pytest.raises(ValueError, match="seed: process 0 has 0, process 1 has None; steps: process 0 has None"):
        Told({n: v for n, v in given.items() if n != "seed"} | {"steps": 3}).agree(given)


def test_shares_are_consecutive_and_equal():
    for items, count in ((8, 2), (7, 3), (2, 5)):
        shares = [share(items, count, i) for i in range(count)]
        assert [i for s in shares for i in s] == list(range(items))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
