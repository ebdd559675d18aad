from pathlib import Path
from typing import Any

import numpy as np

from mmscale.unfinished import Unfinished


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True))


def batch(number: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(number)
    arrays = {"image": generator.random(3, np.float32), "target": generator.random((2, 2)) > 0.5, "one": np.float32(generator.random())}
    return [{"position": number, "key": "k\u00e9y\u2028", "confidence": 0.1 + 1e-17 * number, "answers": ["a", "b"], **arrays}]


def test_records_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "unfinished.jsonl"
    first = Unfinished(path, {"data": "x"})
    assert first.done == {}
    for number in (0, 2):
        first.add(number, batch(number))
    with path.open("ab") as file:
        file.write(b'{"batch": 3, "rec')  # what a kill leaves
    again = Unfinished(path, {"data": "x"})
    assert sorted(again.done) == [0, 2]
    assert all(same(again.done[number], batch(number)) for number in (0, 2))
    assert again.done[0][0]["image"].dtype == np.float32
    again.add(3, batch(3))
    assert sorted(Unfinished(path, {"data": "x"}).done) == [0, 2, 3]


def test_another_evaluation_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "unfinished.jsonl"
    Unfinished(path, {"data": "x"}).add(0, batch(0))
    assert Unfinished(path, {"data": "y"}).done == {}
    assert Unfinished(path, {"data": "x"}).done == {}
    own = Unfinished(path, {"data": "x"})
    Unfinished(path, {"data": "y"}).add(0, batch(0))  # into the same folder at the same time
    own.add(1, batch(1))
    assert sorted(Unfinished(path, {"data": "y"}).done) == [0]
    path.write_bytes(b"\xff\x00 nothing of ours")
    assert Unfinished(path, {"data": "x"}).done == {}
    Unfinished(path, {"data": "x"}).remove()
    assert not path.exists()
