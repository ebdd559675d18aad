"""Training only a part: frozen parameters, adapters, rates by depth; under every ZeRO stage, with exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint.export import export_model
from mmscale.checkpoint.model_folder import model_weights, open_model
from mmscale.checkpoint.reader import StateReader
from mmscale.config import LoraConfig, load_run_config
from mmscale.lora import adapter_of, add_adapters, merged, merged_name
from mmscale.model import MMScaleModel
from shards.errors import ConfigError
from tests.model.tiny import all_objectives, make_batch, random_rows, tiny_model
from tests.training.alone import Alone
from tests.training.runs import losses, records
from tests.training.test_parity import TOLERANCE, difference, run_grid, stage_file, variants

STEPS = ("train.steps=4", "checkpoint.every=2", "checkpoint.keep=0", "audit.samples=false")
LORA = ("lora.rank=4", "lora.dropout=0.1", "lora.train=[_projection,contrastive_scale]")


def checkpoint(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def weights(run: Path, step: int) -> dict[str, Tensor]:
    """The plain weights of a checkpoint."""
    return dict(model_weights(StateReader(checkpoint(run, step)), average=False))


def optimizer_numbers(run: Path, step: int) -> int:
    """Numbers of AdamW's first moment in a checkpoint."""
    return sum(entry.numel for entry in StateReader(checkpoint(run, step)).index.tensors["exp_avg"].values())


@pytest.mark.parametrize("stage_of_zero", [0, 1, 2, 3])
def test_frozen_parameters_stay_as_they_are_and_have_no_moments(tmp_path: Path, stage: Path, alone: Alone, stage_of_zero: int) -> None:
    run = tmp_path / "run"
    words = (*STEPS, f"zero.stage={stage_of_zero}", r"optimizer.freeze=['^image_(embedding|layers)\.']", "optimizer.layer_decay=0.8")
    code, out, err = alone(stage, f"run={run}", *words)
    assert code == 0, out + err
    before, after = weights(run, 2), weights(run, 4)
    frozen = {n for n in before if n.startswith(("image_embedding.", "image_layers."))}
    assert all(torch.equal(before[n], after[n]) for n in frozen)
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert not set(moved) & frozen
    assert "text_layers.0.expert.qkv.weight" in moved
    if stage_of_zero == 1:
        code, _, err = alone(stage, f"run={run}", *words, "optimizer.layer_decay=1", "train.steps=5")
        assert code == 1
        assert "of another model (optimizer.layer_decay was 0.8, now not set)" in err
    trained = sum(v.numel() for n, v in after.items() if n not in frozen)
    assert optimizer_numbers(run, 4) == trained


@pytest.mark.parametrize("stage_of_zero", [1, 3])
def test_adapters_train_resume_exactly_and_are_merged_in_the_model_folder(
    tmp_path: Path, stage: Path, alone: Alone, stage_of_zero: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    words = (*STEPS, f"zero.stage={stage_of_zero}", *LORA, "optimizer.layer_decay=0.9", "train.ema_decay=0.9")
    code, out, err = alone(stage, f"run={whole}", *words)
    assert code == 0, out + err
    assert "lora        rank 4 in 16 layers" in out
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    code, out, err = alone(stage, f"run={resumed}", *words)
    assert code == 0, out + err
    assert losses(resumed) == losses(whole)
    a, b = weights(whole, 4), weights(resumed, 4)
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    before = weights(whole, 2)
    changed = {n for n in a if not torch.equal(a[n], before[n])}
    assert "fusion_layers.0.text.up.weight" in changed
    assert not any(n.endswith((".up.bias", "norm.weight")) and "projection" not in n for n in changed)
    export_model(checkpoint(whole, 4), tmp_path / "plain", average=False)
    model = MMScaleModel.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in a.items())
    averaged = dict(open_model(checkpoint(whole, 4)).named_parameters())
    assert not torch.equal(averaged["fusion_layers.0.text.up.weight"], a["fusion_layers.0.text.up.weight"])
    if stage_of_zero == 3:
        code, _, err = alone(stage, f"run={resumed}", *words, "lora.rank=2", "train.steps=5")
        assert code == 1
        assert "of another model (lora was" in err


@pytest.mark.parametrize("stage_of_zero", [1, 3])
def test_towers_of_other_kinds_train_and_are_loaded_again(tmp_path: Path, stage: Path, alone: Alone, stage_of_zero: int) -> None:
    text = "model.text={hidden_size: 16, num_heads: 1, norm: post, layers: 2, embedding_norm: false, projection_bias: true}"
    words = (text, "model.image={leading_tokens: 0, pooling: attention, embedding_norm: true}", f"zero.stage={stage_of_zero}")
    code, out, err = alone(stage, f"run={tmp_path}", *STEPS, *words)
    assert code == 0, out + err
    before, after = weights(tmp_path, 2), weights(tmp_path, 4)
    still = [n for n in after if torch.equal(before[n], after[n])]
    assert all(n.startswith(("feature_head.", "task_heads.")) for n in still)  # no objective of the run has them
    model = open_model(checkpoint(tmp_path, 4))
    assert {name for name, _ in model.named_parameters()} == set(after)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["lora.rank=4 lora.train=[_projection]", "optimizer.freeze=['^image_'] optimizer.head_lr_ratio=2"])
def test_a_part_trains_equally_on_every_topology(tmp_path: Path, glyphs: Path, part: str) -> None:
    """Losses and merged weights after 20 steps, of towers of other kinds, with rates by depth."""
    stage, runs = stage_file(tmp_path, glyphs, ("contrastive", "matching")), tmp_path / "runs"
    words = (
        "model.text.hidden_size=16 model.text.num_heads=1 model.text.norm=post model.image.leading_tokens=0 model.image.pooling=attention"
    )
    lines = {ranks: variants(ranks, stages, (1,)) for ranks, stages in ((1, (0,)), (2, (1, 2, 3)))}
    for ranks, chosen in lines.items():
        run_grid(ranks, stage, runs, [f"{line} {words} {part} optimizer.layer_decay=0.8" for line in chosen])
    first, *others = [line.split()[0] for chosen in lines.values() for line in chosen]
    for name in others:
        assert difference(runs, first, name) < TOLERANCE
        mine, theirs = weights(runs / first, 20), weights(runs / name, 20)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if key.endswith("kv.bias"):
                continue  # a key's bias changes no attention: its gradient is rounding, which AdamW makes large
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5, msg=lambda m, at=(name, key): f"{at}: {m}")


def test_merged_weights_compute_what_the_adapters_compute() -> None:
    config = LoraConfig(rank=3, alpha=6.0, train=["^matching_head"])
    model, batch = tiny_model(), make_batch(random_rows(4))
    plain = tiny_model(seed=1)
    objectives = all_objectives()
    before = {name: term.sum.detach() for name, term in model(batch, objectives).items()}
    report = add_adapters(model, config)
    assert report == f"lora        rank 3 in 32 layers, {sum(p.numel() for n, p in model.named_parameters() if '.lora_' in n):,} parameters"
    after = {name: term.sum.detach() for name, term in model(batch, objectives).items()}
    assert all(torch.equal(before[name], after[name]) for name in before)  # an adapter starts as zero
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n or n.startswith(("task_heads.", "matching_head."))}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted_weights = {n: p.detach() for n, p in model.named_parameters()}
    for stored, value in adapted_weights.items():
        if (name := merged_name(stored)) is not None:
            both = [adapted_weights[part] for part in adapter_of(stored) or ()]
            plain.get_parameter(name).data.copy_(merged(value, *both, config.alpha / config.rank) if both else value)
    adapted, found = model(batch, objectives), plain(batch, objectives)
    for name in before:
        torch.testing.assert_close(found[name].sum, adapted[name].sum, rtol=1e-5, atol=1e-5)
        assert not torch.equal(before[name], adapted[name].sum)


def test_a_run_with_rates_by_depth_logs_the_rate_of_the_schedule(tmp_path: Path, stage: Path, alone: Alone) -> None:
    rates = {}
    for name, words in {"plain": (), "decayed": ("optimizer.layer_decay=0.5", "optimizer.head_lr_ratio=3")}.items():
        code, out, err = alone(stage, f"run={tmp_path / name}", "train.steps=2", "audit.samples=false", *words)
        assert code == 0, out + err
        rates[name] = [r["lr"] for r in records(tmp_path / name / "metrics.jsonl")]
    assert rates["decayed"] == pytest.approx(rates["plain"])
    plain, decayed = (weights(tmp_path / name, 2) for name in rates)
    moved = (plain["text_embedding.words.weight"] - decayed["text_embedding.words.weight"]).abs().max()
    assert 1e-4 < moved < 4e-3  # its first steps are of the rate times 1 and times 1/8


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.rank=-1", r"`lora.rank` must be at least 0; got -1"),
        ("lora.dropout=1", r"`lora.dropout` must be below 1; got 1.0"),
        ("optimizer.layer_decay=0", r"`optimizer.layer_decay` must be above 0; got 0.0"),
        ("optimizer.head_lr_ratio=0", r"`optimizer.head_lr_ratio` must be above 0"),
        ("model.text.captions=bidirectional", r"from those before it, which needs model\.text\.captions=causal"),
        ("data.begin=false", r"from those before it, which needs data\.begin=true"),
        ("data.pad_captions=8", r"from those before it, which needs data\.pad_captions=0"),
        ("data.pad_captions=99", r"`data.pad_captions` must be at most data.max_text_tokens = 16"),
        ("model.text.num_heads=5", r"`model.text.num_heads` must divide the text's width 32"),
        ("model.image.leading_tokens=0", r"`model.image.pooling=cls` reads the first leading token"),
    ],
)
def test_keys_are_checked(stage: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(stage, ["run=unused", word])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(rank=1, targets="nothing"), r"`lora.targets`: 'nothing' names no linear layers"),
        (
            LoraConfig(rank=1, targets=r"text_embedding\.words|text_layers\.0\.expert\.qkv"),
            "matches text_embedding.words, which is no linear",
        ),
        (LoraConfig(rank=1, targets="(qkv"), r"`lora.targets`: '\(qkv' is not a regular expression: "),
        (LoraConfig(rank=1, train=["nothing"]), r"`lora.train`: 'nothing' matches no parameter"),
    ],
)
def test_adapters_that_match_nothing_are_refused(config: LoraConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters(tiny_model(), config)
