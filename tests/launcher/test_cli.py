"""The `mmscale` command: what it offers, and that a mistake is one paragraph and an exit code, never a traceback."""

import subprocess
from pathlib import Path

import pytest
from transformers import BertConfig, ViTConfig

from launcher.cli import split_words
from mmscale.config import load_run_config
from tests.launcher.launching import MMSCALE, REPO, write_stage
from tests.shards.tars import make_data_set


def mmscale(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MMSCALE, *map(str, words)], cwd=REPO, capture_output=True, text=True, check=False)


def test_dry_run_prints_the_command_and_starts_nothing(tmp_path: Path) -> None:
    done = mmscale("launch", write_stage(tmp_path), "train.seed=3", "--ranks-per-node", "2", "--master-port", "29999", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "ranks    2 (localhost x 2)" in done.stdout
    assert "deepspeed --num_accelerators 2 --master_port 29999 " in done.stdout
    assert done.stdout.rstrip().endswith("train.seed=3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("launch", "nowhere.yaml"), 2, "There is no configuration file 'nowhere.yaml'"),
        (("launch", "{stage}", "train.step=3"), 2, "train.step"),
        (("launch", "{stage}", "train.steps=many"), 2, "train.steps"),
        (("launch", "{stage}", "--ranks-per-node", "3"), 2, "`train.global_batch` must divide by the ranks, 3; got 8. Use 6 or 9."),
        (("launch", "{stage}", "--hostfile", "nowhere"), 2, "The hostfile 'nowhere' cannot be read"),
        (("plan", "{stage}", "--gpus", "0"), 2, "`--gpus 0` must be 1 to 16,384"),
        (("model-config", "nowhere"), 2, "must be a local transformers folder with a config.json; 'nowhere' is not."),
        (("runs", "show", "{folder}"), 1, "is not a run folder"),
        (("checkpoints", "verify", "{folder}"), 1, "has no committed checkpoint"),
        (("shards", "write", "source=folder"), 2, "`out` is required"),
        (("shards", "filter", "{folder}", "min_side=3"), 2, "`out` is required"),
        (("shards", "filter", "{folder}", "out=x", "min_sid=3"), 2, "Key 'min_sid' not in 'FilterVersionConfig'. Did you mean"),
        (("shards", "filter", "{folder}", "out=x", "where=score"), 2, "`where`: 'score' is no condition"),
        (("shards", "dedup", "{folder}", "out=x", "near=99"), 2, "`near` must be 0 to 12 bits; got 99"),
        (("shards", "split", "{folder}", "out=x", "train=0.9", "val=0.2"), 2, "must add up to 1; got train=0.9, val=0.2"),
        (("shards", "merge", "out=x"), 2, "There is nothing to merge"),
        (("shards", "verify", "{folder}", "--repair"), 2, "--repair needs --full"),
        (("shards", "verify", "{folder}", "--full", "--repair"), 1, "There are no .tar files in"),
        (("shards", "write", "source=glyphs", "out={folder}/x", "--part", "0/3"), 2, "`part` must be i/n with i from 1 to n"),
    ],
)
def test_mistake_is_one_paragraph(tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    stage = write_stage(tmp_path)
    done = mmscale(*(word.format(stage=stage, folder=tmp_path) for word in words))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.startswith("mmscale: ")
    assert done.stderr.count("\n") == 1


def test_leading_configuration_file_is_told_from_words() -> None:
    assert split_words(["a.yaml", "b=1"]) == (Path("a.yaml"), ["b=1"])
    assert split_words(["a=1", "b=2"]) == (None, ["a=1", "b=2"])
    assert split_words([]) == (None, [])


def test_versions_of_a_data_set(tmp_path: Path) -> None:
    base = make_data_set(tmp_path / "base")
    done = mmscale("shards", "filter", str(base), f"out={tmp_path / 'f'}", "where=number>=3", "processes=1")
    assert done.stdout.startswith("  where                dropped 3\n9 of 12 samples kept; ")
    done = mmscale("shards", "split", str(tmp_path / "f"), f"out={tmp_path / 's'}", "train=0.5", "val=0.5", "processes=1")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["train", "val"]
    done = mmscale("shards", "merge", str(tmp_path / "s" / "train"), str(tmp_path / "s" / "val"), f"out={tmp_path / 'm'}", "rewrite=true")
    assert done.stdout.startswith("9 samples in 1 shards; ")
    done = mmscale("shards", "dedup", str(tmp_path / "m"), f"out={tmp_path / 'd'}", f"against={base}", "processes=1")
    assert done.stdout.startswith("0 of 9 samples kept, 9 exact and 0 near duplicates dropped; ")
    assert done.returncode == 0


def test_repair_says_what_it_did_and_fails_where_it_could_not(tmp_path: Path) -> None:
    base = make_data_set(tmp_path / "base")
    (base / "s-000.index.arrow").unlink()
    done = mmscale("shards", "verify", str(base), "--full", "--repair")
    assert done.stdout.startswith("repaired  s-000.tar: indexed again; its sidecar was missing.\n1 repaired, 0 could not be; 12 samples, ")
    assert done.returncode == 0
    (base / "s-000.tar").rename(tmp_path / "s-000.tar")
    done = mmscale("shards", "verify", str(base), "--full", "--repair")
    assert done.stdout.startswith("FAILED    s-000.tar: the tar is missing. Copy it here or give --from;")
    assert done.returncode == 1
    done = mmscale("shards", "verify", str(base), "--full", "--repair", "--from", str(tmp_path))
    assert done.stdout.startswith(f"repaired  s-000.tar: fetched again from {tmp_path}; the tar was missing.")
    assert done.returncode == 0


def test_model_config_prints_a_part_that_can_be_used(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 3}
    BertConfig(**shape, vocab_size=40, max_position_embeddings=16).save_pretrained(tmp_path / "bert")
    ViTConfig(**shape | {"hidden_size": 64}, image_size=16, patch_size=8).save_pretrained(tmp_path / "vit")
    done = mmscale("model-config", tmp_path / "bert", tmp_path / "vit")
    assert done.returncode == 0, done.stderr
    (tmp_path / "part.yaml").write_text(done.stdout)
    stage = write_stage(tmp_path)
    model = load_run_config(stage, [f"model={tmp_path / 'part.yaml'}", "data.max_text_tokens=16"]).model
    assert (model.hidden_size, model.text.hidden_size, model.unimodal_layers, model.mlp_ratio) == (64, 32, 3, 1.5)
    assert (model.text.norm, model.text.mlp_ratio, model.layer_norm_eps, model.qk_norm) == ("post", 3.0, 1e-12, False)
    assert (model.init_text_from, model.init_image_from) == (str(tmp_path / "bert"), str(tmp_path / "vit"))
    assert f"data.tokenizer={tmp_path / 'bert'}" in done.stdout
    assert "the captioning objective needs causal" in done.stdout
