from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mmscale.arithmetic import plan_batch
from mmscale.assemble import find_tokenizer
from mmscale.config import RunConfig, load_run_config
from mmscale.data.tokenize import TextTokenizer
from shards import configfile
from shards.errors import ConfigError

STAGE = "run: r\ndata: {shards: d}\nobjectives: {contrastive: {weight: 1}}\n"


def load(tmp_path: Path, *words: str, text: str = STAGE) -> RunConfig:
    path = tmp_path / "stage.yaml"
    path.write_text(text)
    return load_run_config(path, words)


def test_command_line_goes_over_file_goes_over_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "train.steps=7", "optimizer.betas=[0.8,0.9]", text=STAGE + "train: {steps: 5, seed: 3}\n")
    assert (config.train.steps, config.train.seed, config.train.global_batch) == (7, 3, 256)
    assert config.optimizer.betas == (0.8, 0.9)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load(tmp_path, "task.name=vqa", "data.label=answer", "train.ema_decay=0.9")
    path = tmp_path / "again.yaml"
    path.write_text(configfile.to_yaml(config))
    assert load_run_config(path) == config


def test_model_part_by_name_path_and_override(tmp_path: Path) -> None:
    part = tmp_path / "mine.yaml"
    part.write_text("hidden_size: 96\nnum_heads: 3\n")
    assert load(tmp_path, f"model={part}", "model.num_heads=6").model.num_heads == 6
    assert load(tmp_path, f"model={part}").model.hidden_size == 96
    with pytest.raises(ConfigError, match=r"`model=huge` names no part: known parts are .*Use one of them or the path of a .yaml file"):
        load(tmp_path, "model=huge")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.stesp=4", r"`train.stesp`: Key 'stesp' not in 'TrainConfig'. Did you mean: 'steps'.* \(in the command line\)\.$"),
        ("train.steps=many", r"`train.steps`: Value 'many' of type 'str' could not be converted to Integer \(in the command line\)\.$"),
        ("train.precision=fp8", r"`train.precision`: Invalid value 'fp8', expected one of \['auto', 'fp32', 'bf16'\]"),
        ("train", r"'train' is not of the form key=value, such as train.steps=100\."),
        ("model.num_heads=7", r"`model.num_heads` must divide model.hidden_size = 128; got 7\."),
        ("model.patch_size=7", r"`model.patch_size` must divide model.image_size = 32; got 7\."),
        (
            "data.max_text_tokens=99",
            r"`data.max_text_tokens` = 99 is more than model.max_text_tokens = 64\. Lower the one or raise the other\.",
        ),
        ("model.image_std=[1,0,1]", r"`model.image_std` must be above 0; got \[1\.0, 0\.0, 1\.0\]\."),
        (
            "data.augment.colours=[red,Red,blue]",
            r"`data.augment.colours` must be 3 different phrases or null; got \['red', 'Red', 'blue'\]\.",
        ),
        ("data.augment.roll=0.7", r"`data\.augment\.roll` is a part, from 0 to 0\.5; got 0\.7\."),
        ("data.augment.gain=-3", r"`data\.augment\.gain` must be above 0, or 0 for none; got -3\."),
        ("data.augment.time_mask=0.2", r"`data\.augment\.time_mask` changes sound, and the model hears none\. Give it ears with "),
        ("store.retries=-1", r"`store\.retries` must be at least 0; got -1\."),
        ("guard.max_fraction=-0.1", r"`guard\.max_fraction` must be at least 0; got -0\.1\."),
        ("objectives.matching.negatives=global", r"`objectives\.matching\.negatives` must be micro: only contrastive takes negatives"),
        (
            "objectives.contrastive={negatives: global, group: 4}",
            r"`objectives\.contrastive\.negatives=global` takes .*`objectives\.contrastive\.group` = 4 .* group=null, or negatives=micro\.",
        ),
        ("train.steps=0", r"`train.steps` must be at least 1; got 0\."),
        ("objectives.contrastive.weight=0", r"Nothing to train: every `objectives.\*.weight` is 0 and no `task` is set\."),
    ],
)
def test_wrong_words_are_named(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, word)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.augment.word_mask=0.1", "objectives.masked_language.weight=1"],
            r"`data\.augment\.word_mask` and `objectives\.masked_language` both hide words of .* Use one of them in a stage\.",
        ),
        (["data.augment.mixup=0.4"], r"`data\.augment\.mixup` mixes labels, and task\.name = None has none .* classification and tagging"),
        (
            ["data.augment.mixup=0.4", "task.name=classification", "data.label=l", "data.text=null"],
            r"`data\.augment\.mixup` makes one sample of two, and objectives\.contrastive learns from single ones\.",
        ),
        (
            ["data.augment.cutmix=1", "task.name=tagging", "data.label=l", "objectives.contrastive.weight=0"],
            r"`data\.augment\.cutmix` mixes pictures and sound; texts cannot be mixed, and data\.text = caption is read\. .* cutmix=0\.",
        ),
    ],
)
def test_augmentation_that_makes_no_sense_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, *words)
    assert "\n" not in str(caught.value)


def test_missing_file_bad_yaml_and_required_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no configuration file '.*none.yaml'\. Give the path of a YAML file\."):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"is not valid YAML"):
        load(tmp_path, text="run: [1")
    with pytest.raises(ConfigError, match=r"must hold `key: value` lines, not a list"):
        load(tmp_path, text="- 1\n")
    with pytest.raises(
        ConfigError, match=r"`data.shards` is required and not set\. Add it to the configuration file or give data.shards=\.\.\. \."
    ):
        load(tmp_path, text="run: r\n")


def test_batch_divides_over_ranks_and_accumulation(tmp_path: Path) -> None:
    plan = plan_batch(load(tmp_path, "train.global_batch=64", "train.micro_batch=8"), ranks=2)
    assert (plan.micro_batch, plan.ranks, plan.accumulation) == (8, 2, 4)
    assert plan_batch(load(tmp_path, "train.global_batch=64"), ranks=4).micro_batch == 16


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (["train.global_batch=100"], 3, r"`train.global_batch` must divide by the ranks, 3; got 100\. Use 99 or 102\."),
        (
            ["train.global_batch=100", "train.micro_batch=4"],
            8,
            r"`train.global_batch` must divide by the ranks, 8; got 100\. Use 96 or 104\.",
        ),
        (
            ["train.global_batch=96", "train.micro_batch=5"],
            4,
            r"`train.global_batch` must divide by micro_batch x ranks = 5 x 4 = 20; got 96\. Use 80 or 100\.",
        ),
        (
            ["train.global_batch=16", "objectives.contrastive.group=5"],
            2,
            r"`objectives.contrastive.group` must divide micro_batch x ranks = 16; got 5\.",
        ),
    ],
)
def test_batch_that_does_not_divide(tmp_path: Path, words: list[str], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_batch(load(tmp_path, *words), ranks)


def test_the_tokenizer_of_a_url_must_be_local(tmp_path: Path) -> None:
    config = load(tmp_path, "data.shards=s3://bucket/pairs", f"store.cache={tmp_path}")
    assert config.store.cache == str(tmp_path)
    with pytest.raises(ConfigError, match=r"`data\.tokenizer` must name a local folder when `data\.shards` is a URL\."):
        find_tokenizer(config, None)
    (tmp_path / "t").mkdir()
    assert find_tokenizer(load(tmp_path, "data.shards=s3://bucket/pairs", f"data.tokenizer={tmp_path}/t"), None) == tmp_path / "t"


def test_who_reads_no_words_needs_no_tokenizer(tmp_path: Path) -> None:
    wordless = ("data.caption=null", "data.text=null")
    for place in ("s3://bucket/clips", str(tmp_path)):
        folder = find_tokenizer(load(tmp_path, f"data.shards={place}", *wordless), None)
        tokenizer = TextTokenizer(folder)
        assert (tokenizer.vocab_size, tokenizer.pad, tokenizer.begin, tokenizer.end, tokenizer.mask) == (5, 0, 2, 3, 4)
    with pytest.raises(ConfigError, match="There is no tokenizer folder"):
        find_tokenizer(load(tmp_path, f"data.shards={tmp_path}", "data.text=null"), None)
    (tmp_path / "tokenizer").mkdir()
    assert find_tokenizer(load(tmp_path, f"data.shards={tmp_path}", "data.text=null"), None) == tmp_path / "tokenizer"
    assert find_tokenizer(load(tmp_path, f"data.shards={tmp_path}", *wordless), None) == tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.num_heads=0", r"`model\.num_heads` must be at least 1; got 0\.$"),
        ("model.patch_size=-1", r"`model\.patch_size` must be at least 1; got -1\.$"),
        ("model.mlp_ratio=-1", r"`model\.mlp_ratio` must be above 0; got -1\.0\.$"),
        ("model.fusion_layers=-1", r"`model\.fusion_layers` must be at least 0; got -1\.$"),
        ("model.dropout=1", r"`model\.dropout` must be below 1; got 1\.0\.$"),
        (
            "model.hidden_size=1028",
            r"`model\.num_heads` gives heads of width 257, and attention kernels take at most 256\.",
        ),
        ("objectives.contrastive.group=0", r"`objectives\.contrastive\.group` must be at least 1; got 0\.$"),
        ("objectives.masked_language={weight: 1, mask: 15}", r"`objectives\.masked_language\.mask` must be at most 1; got 15\.0\.$"),
        ("objectives.matching.fraction=-2", r"`objectives\.matching\.fraction` must be at least 0; got -2\.0\.$"),
        ("objectives.captioning.weight=-1", r"`objectives\.captioning\.weight` must be at least 0; got -1\.0\.$"),
        ("train.ema_decay=1.5", r"`train\.ema_decay` must be below 1; got 1\.5\.$"),
        ("train.clip_norm=-1", r"`train\.clip_norm` must be at least 0; got -1\.0\.$"),
        ("optimizer.lr=-1", r"`optimizer\.lr` must be at least 0; got -1\.0\.$"),
        ("optimizer.layer_decay=0", r"`optimizer\.layer_decay` must be above 0; got 0\.0\.$"),
        ("data.augment.scale=1.2", r"`data\.augment\.scale` must be at least 0 and below 1; got 1\.2\.$"),
        ("data.augment.flip=1.5", r"`data\.augment\.flip` is a part, from 0 to 1; got 1\.5\.$"),
        ("data.augment.shift=-2", r"`data\.augment\.shift` must be above 0, or 0 for none; got -2\.$"),
        ("evaluate.batch=0", r"`evaluate\.batch` must be at least 1; got 0\.$"),
        ("model.modalities={items: {kind: audio}}", r"`model\.modalities\.items`: the name must be a word .* such as `items`\.$"),
    ],
)
def test_numbers_and_names_out_of_range(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        load(tmp_path, word)


@pytest.mark.parametrize("labels", ["[yes, no]", "[true, false]", "['a', off]"])
def test_truth_values_in_a_list_of_texts_are_refused(tmp_path: Path, labels: str) -> None:
    with pytest.raises(ConfigError, match=r"^`data\.labels` is a list of texts, and YAML reads yes, no, true and false as truth values"):
        load(tmp_path, text=STAGE.replace("shards: d", f"shards: d, labels: {labels}"))
    quoted = load(tmp_path, text=STAGE.replace("shards: d", "shards: d, labels: ['true', 'no', 7]"))
    assert quoted.data.labels == ["true", "no", "7"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["objectives.matching.weight=1"], "objectives.matching"),
        (["objectives.captioning.weight=1"], "objectives.captioning"),
        (["task.name=vqa", "data.label=answer"], "task.name=vqa"),
        (["task.name=answering", "data.text=null"], "task.name=answering"),
    ],
)
def test_what_fuses_needs_fusion_layers(tmp_path: Path, words: list[str], what: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^`model\.fusion_layers` is 0, so that no text sees an image, which {what} is there for\. Set "
    ):
        load(tmp_path, "model.fusion_layers=0", *words)
    load(tmp_path, "model.fusion_layers=0", "data.image=false", *words)


def test_what_sees_one_side_needs_none(tmp_path: Path) -> None:
    load(tmp_path, "model.fusion_layers=0", "objectives.masked_language.weight=1")
    load(tmp_path, "model.fusion_layers=0", "task.name=classification", "data.label=answer", "data.text=null")
    load(tmp_path, "model.fusion_layers=0", "task.name=retrieval")


TEXTS = ["0123", "1e4", "12:00", "2026-11-01", "no", ".5"]


@dataclass(frozen=True, kw_only=True)
class Inner:
    kept: dict[str, Any] = field(default_factory=dict)
    by_place: dict[int, list[float]] = field(default_factory=dict)
    any: Any = None
    time: str = "1"
    number: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("text", "word", "name", "value"),
    [
        ("inner: {kept: {image: 0.5}}", "inner.kept={}", "kept", {}),
        ("inner: {kept: {image: 0.5}}", "inner.kept={sound: 1}", "kept", {"image": 0.5, "sound": 1}),
        ("inner: {kept: {image: 0.5}}", "inner={}", "kept", {"image": 0.5}),
        ("inner: {any: {768: [0.1, 0.2]}}", "inner.any=[0.3,0.4]", "any", [0.3, 0.4]),
        ("inner: {any: [1]}", "inner.any={path: a}", "any", {"path": "a"}),
        ("inner: {by_place: {100: [1, 2]}}", "inner.number=1e-4", "by_place", {100: [1.0, 2.0]}),
        ("inner: {by_place: {'100': [1, 2]}}", "inner.number=1e-4", "by_place", {100: [1.0, 2.0]}),
        ("inner: {time: 12:00:00}", "inner.number=1e-4", "time", "12:00:00"),
        ("inner: {}", "inner.time=12:00:00", "time", "12:00:00"),
        ("inner: {}", "inner.time=012345", "time", "012345"),
        ("inner: {}", "inner.any=1e-4", "any", 1e-4),
        ("inner: {number: 1e-4}", "inner.time=2026-11-01", "number", 1e-4),
        ("inner: {time: 1e4}", "inner.number=2", "time", "1e4"),
        ("inner: {any: [1e4, 0x1F, 1_000, -0.5, 0, no, null]}", "inner.number=2", "any", ["1e4", 31, 1000, -0.5, 0, False, None]),
        ("inner: {any: ['0123', '1e4', '12:00', '2026-11-01', 'no', '.5']}", "inner.number=2", "any", TEXTS),
        ("inner: {}", "inner.any=-3", "any", -3),
    ],
)
def test_layers_are_laid_over_each_other(tmp_path: Path, text: str, word: str, name: str, value: Any) -> None:
    (tmp_path / "a.yaml").write_text(text)
    inner = configfile.load(Outer, tmp_path / "a.yaml", [word]).inner
    assert getattr(inner, name) == value
    (tmp_path / "b.yaml").write_text(configfile.to_yaml(Outer(inner=inner)))
    assert configfile.load(Outer, tmp_path / "b.yaml").inner == inner


@pytest.mark.parametrize("word", ["inner.time=${HOME}", "inner.kept=[1]", "inner.any=${oc.env:HOME"])
def test_what_cannot_be_a_value_is_one_paragraph(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configfile.load(Outer, None, [word])
    assert "\n" not in str(refused.value)
