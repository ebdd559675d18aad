"""The parts of the published sets share nothing, and what is tuned on comes out of the training data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DATA = BENCHMARKS.parent.parent / "shared" / "data"


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, *words: int) -> dict[str, list[dict[str, str]]]:
    """Tables of a set, by the function of that name in benchmarks/tables."""
    folder, module = {
        "trec": ("textcls-kim2014", "sentences"),
        "mr": ("textcls-kim2014", "sentences"),
        "emojitwo": ("emojitwo", "pictograms"),
    }[name]
    if not (DATA / folder).is_dir():
        pytest.skip(f"the data set {folder!r} is not at hand ({DATA / folder})")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = getattr(__import__(f"tables.{module}", fromlist=[name]), name)(out, *words)
    return {part: rows(path) for part, path in made.items()}


def keys(table: list[dict[str, str]]) -> set[str]:
    assert len({row["key"] for row in table}) == len(table)
    return {row["key"] for row in table}


def are_fifths(found: dict[str, list[dict[str, str]]]) -> None:
    """Each fifth of the training part is measured once, by what the other four taught."""
    fifths = [keys(found[f"tuning-{fifth}-test"]) for fifth in range(5)]
    assert set().union(*fifths) == keys(found["train"])
    assert sum(map(len, fifths)) == len(found["train"])
    for fifth, measured in enumerate(fifths):
        assert keys(found[f"tuning-{fifth}-train"]) == keys(found["train"]) - measured


def test_trec_has_its_official_split_and_tuning_parts_of_its_training_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts("trec", tmp_path, monkeypatch)
    assert (len(found["train"]), len(found["test"])) == (5452, 500)
    are_fifths(found)
    assert len({row["label"] for row in found["test"]}) == 6


def test_the_folds_of_mr_hold_each_sentence_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folds = [parts("mr", tmp_path / str(fold), monkeypatch, fold) for fold in range(10)]
    tests = [keys(fold["test"]) for fold in folds]
    assert len(set().union(*tests)) == sum(map(len, tests)) == 10662
    assert {len(test) for test in tests} == {1066, 1067}
    for fold, test in zip(folds, tests, strict=True):
        assert keys(fold["train"]) == set().union(*tests) - test
        are_fifths(fold)


def test_no_skin_tone_of_a_held_out_emoji_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts("emojitwo", tmp_path, monkeypatch)
    tones = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}

    def drawn(table: list[dict[str, str]]) -> set[tuple[str, ...]]:
        return {tuple(point for point in row["key"].split("-") if point not in tones) for row in table}

    assert not drawn(found["train"]) & drawn(found["test"])
    assert not drawn(found["tuning-train"]) & drawn(found["tuning-test"])
    assert keys(found["tuning-train"]) | keys(found["tuning-test"]) <= keys(found["train"])
    assert 220 < len(found["test"]) == len(drawn(found["test"])) < 320
