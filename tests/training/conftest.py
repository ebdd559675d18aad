"""Tiny glyph shards and a tiny run, made once for all tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shards import configfile
from shards.config import WriteConfig
from shards.write import write_shards
from tests.training.alone import Alone
from tests.training.runs import write_stage


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 420 glyph pairs of 16 x 16 pixels in 7 shards, with a tokenizer."""
    out = tmp_path_factory.mktemp("glyphs") / "shards"
    words = ["source=glyphs", f"out={out}", "glyphs.every=100", "glyphs.size=16", "rows_per_shard=64", "processes=1"]
    write_shards(configfile.load(WriteConfig, None, [*words, "tokenizer.kind=wordpiece", "tokenizer.vocab_size=300"]), progress=False)
    return out


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """Runs the per-rank entry point on one rank: `alone(STAGE, "key=value", ...)`."""
    runner = Alone(tmp_path_factory.mktemp("alone"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, glyphs: Path) -> Path:
    """A stage file of every objective over `glyphs`; `run` is to be given."""
    return write_stage(tmp_path_factory.mktemp("stage"), glyphs)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, stage: Path, alone: Alone) -> Path:
    """A finished run of 12 steps with its checkpoints of steps 4, 8 and 12. Not to be changed: copy it."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    code, out, err = alone(stage, f"run={run}", "checkpoint.every=4", "checkpoint.keep=0")
    assert code == 0, out + err
    return run
