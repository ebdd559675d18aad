"""What a launch refuses before it starts a rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.places import check_places
from mmscale.config import load_run_config
from shards.errors import MmscaleError
from tests.data.tiny import tokenizer_folder, write


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.shards={tmp}/nope"], r"There is no data set folder '.*nope'"),
        (["evaluate.every=2", "evaluate.shards={tmp}/nope"], r"There is no data set folder '.*nope'"),
        (["init_from={tmp}/nope"], r"`init_from`: '.*nope' does not exist\. .*init_from=null starts from random weights\."),
        (["init_from={tmp}/d"], r"'.*d' is not a checkpoint"),
        (["data.tokenizer={tmp}/nope"], r"There is no tokenizer folder '.*nope'\. Repeat .* tokenizer\.kind=wordpiece \(what is"),
        (["data.tokenizer={tmp}/nope", "data.text=question"], r"tokenizer\.kind=wordpiece tokenizer\.fields=\[question\] \(what is"),
    ],
)
def test_what_every_rank_would_stumble_over(tmp_path: Path, words: list[str], message: str) -> None:
    write(tmp_path / "d")
    shutil.copytree(tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "d" / "tokenizer")
    stage = tmp_path / "stage.yaml"
    stage.write_text(
        f"run: {tmp_path}/r\ndata: {{shards: {tmp_path}/d}}\nobjectives: {{contrastive: {{weight: 1}}, captioning: {{weight: 1}}}}\n"
    )
    check_places(load_run_config(stage, []))
    with pytest.raises(MmscaleError, match=message):
        check_places(load_run_config(stage, [word.format(tmp=tmp_path) for word in words]))
    assert not (tmp_path / "r").exists()


def test_without_words_no_tokenizer_is_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "d")
    stage = tmp_path / "stage.yaml"
    stage.write_text(f"run: r\ndata: {{shards: {tmp_path}/d, caption: null, text: null, label: answer}}\ntask: {{name: classification}}\n")
    check_places(load_run_config(stage, []))
