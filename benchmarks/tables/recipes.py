"""What the published tables are made of: parts of a set, the stages of a training, what is measured, and who is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tables.commands import shards
from tables.pictograms import emojitwo
from tables.sentences import FIFTHS, MR_FOLDS, mr, trec
from tables.sources import data_folder

TREC_PIECES, MR_PIECES = 2000, 8000
"""Word pieces of the vocabularies: of the words that MR has more than once, 2,000 hold one in twelve whole, 8,000 two in five."""
ESC10_FOLDS = (1, 2, 3, 4, 5)
UNSEEN_FOLD = 5
"""Of ESC-10: no recipe was tuned on it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one training learns from and is measured on."""

    name: str
    train: Path
    test: Path


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One `mmscale launch`; the second one starts from the first one's checkpoint."""

    name: str
    config: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a set is learned and measured."""

    parts: Callable[[Path, bool], list[Part]]
    """(place, tuning) to the parts; tuning holds out of the training data what is measured."""
    stages: tuple[Stage, ...]
    tasks: dict[str, tuple[str, ...]]
    """Task of `mmscale evaluate` -> the metrics that are reported; each reads the last stage of its name, else the last of all."""
    published: dict[str, float]
    """Accuracy by method."""
    note: str


def esc10_parts(place: Path, tuning: bool) -> list[Part]:
    """The official folds, versions of one data set; to tune, three of the first four folds and the fourth."""
    everything = shards(
        "write",
        place / "shards" / "all",
        *("source=folder", f"path={data_folder('esc10')}", r"folder.pattern=\d+ - (?P<class>[^/]+)/(?P<fold>[0-9])-.*"),
        *("caption.required=false", "audio.sample_rate=16000", "quarantine.max_fraction=0"),
    )
    parts = []
    for fold in ESC10_FOLDS:
        if tuning and fold == UNSEEN_FOLD:
            continue
        rules = f"where=[fold!={fold}, fold!={UNSEEN_FOLD}]" if tuning else f"where=[fold!={fold}]"
        train = shards("filter", place / "shards" / f"{'tuning-' if tuning else ''}train-{fold}", str(everything), rules)
        test = shards("filter", place / "shards" / f"test-{fold}", str(everything), f"where=[fold={fold}]")
        parts.append(Part(name=f"fold-{fold}", train=train, test=test))
    return parts


def _sentence_part(name: str, tables: dict[str, Path], out: Path, vocabulary: int, prefix: str = "") -> Part:
    """Both sides; the vocabulary, of so many word pieces, is that of the training side."""
    found = {}
    tokenizer = ("tokenizer.kind=wordpiece", f"tokenizer.vocab_size={vocabulary}", "tokenizer.lowercase=true")
    for side in ("train", "test"):
        words = ("source=table", f"path={tables[prefix + side]}", "columns.image=null", "columns.key=key", "image.required=false")
        more = ("quarantine.max_fraction=0", *(tokenizer if side == "train" else ()))
        found[side] = shards("write", out / (prefix + side), *words, *more)
    return Part(name=name, train=found["train"], test=found["test"])


def trec_parts(place: Path, tuning: bool) -> list[Part]:
    """The official split; to tune, the fifths of its training part."""
    tables, out = trec(place / "tables"), place / "shards"
    if not tuning:
        return [_sentence_part("official", tables, out, TREC_PIECES)]
    return [_sentence_part(f"fifth-{fifth}", tables, out, TREC_PIECES, f"tuning-{fifth}-") for fifth in range(FIFTHS)]


def mr_parts(place: Path, tuning: bool) -> list[Part]:
    """Ten folds; to tune, the fifths of the first one's training part."""
    if tuning:
        tables, out = mr(place / "tables" / "0", 0), place / "shards" / "0"
        return [_sentence_part(f"fifth-{fifth}", tables, out, MR_PIECES, f"tuning-{fifth}-") for fifth in range(FIFTHS)]
    folds = [(fold, mr(place / "tables" / str(fold), fold)) for fold in range(MR_FOLDS)]
    return [_sentence_part(f"fold-{fold}", tables, place / "shards" / str(fold), MR_PIECES) for fold, tables in folds]


def emojitwo_parts(place: Path, tuning: bool) -> list[Part]:
    """The held-out fifth; to tune, a fifth of the rest."""
    tables, prefix, found = emojitwo(place / "tables"), "tuning-" if tuning else "", {}
    for part in ("train", "test"):
        vocabulary = ("tokenizer.kind=wordpiece", "tokenizer.vocab_size=1000", "tokenizer.lowercase=true") if part == "train" else ()
        words = ("source=table", f"path={tables[prefix + part]}", "columns.key=key", "image.format=png", "quarantine.max_fraction=0")
        found[part] = shards("write", place / "shards" / (prefix + part), *words, *vocabulary)
    return [Part(name="held-out", train=found["train"], test=found["test"])]


def sentences(pretraining: int, finetuning: int, *words: str) -> tuple[Stage, Stage]:
    """Masked language, then classification with further words, for so many steps."""
    return (
        Stage(name="pretrain", config="configs/pretrain/sentences.yaml", words=(f"train.steps={pretraining}",)),
        Stage(name="classification", config="configs/finetune/sentences.yaml", words=(f"train.steps={finetuning}", *words)),
    )


RECIPES = {
    "esc-10": Recipe(
        parts=esc10_parts,
        stages=(Stage(name="classification", config="configs/finetune/sounds.yaml"),),
        tasks={"classification": ("accuracy",)},
        published={
            "human listeners (Piczak 2015)": 0.957,
            "SoundNet, pretrained on 2 million videos (Aytar et al. 2016)": 0.922,
            "CNN (Piczak 2015), as listed by Aytar et al.": 0.810,
            "convolutional autoencoder, as listed by Aytar et al.": 0.743,
            "random forest (Piczak 2015)": 0.727,
        },
        note="Mean of the official five folds; each training has the other four, and no other data. The recipe was tuned on folds 1 to 4, "
        "each held out from the other three; folds 1 and 2 were also seen by earlier recipes, trained on the other four. Fold 5 was not.",
    ),
    "trec": Recipe(
        parts=trec_parts,
        stages=sentences(4000, 900),
        tasks={"classification": ("accuracy",)},
        published={
            "CNN, word vectors of word2vec (Kim 2014)": 0.928,
            "CNN from scratch (Kim 2014)": 0.912,
            "CNN from scratch, its public reproduction": 0.882,
        },
        note="Official split, six classes. Vocabulary and masked-language pretraining from the training questions alone. Fine-tuning, "
        "the length of pretraining (1,200 or 4,000 steps) and concat pooling were tuned on a tenth of the training questions, convolutions "
        "over words and label smoothing on fifths of them. Three earlier recipes were also measured on the test questions; none was "
        "chosen by that.",
    ),
    "mr": Recipe(
        parts=mr_parts,
        stages=sentences(1500, 900, "model.dropout=0.4", "data.augment.word_mask=0.3"),
        tasks={"classification": ("accuracy",)},
        published={
            "CNN, word vectors of word2vec (Kim 2014)": 0.813,
            "CNN from scratch (Kim 2014)": 0.761,
            "CNN from scratch, its public reproduction": 0.759,
        },
        note="Mean of ten folds of a fixed shuffle; vocabulary and masked-language pretraining of each from its own training part. "
        "Vocabulary, dropout and word masking were tuned on the first two fifths of the first fold's training part, in which the test "
        "sentences of the other nine folds lie, with their labels; the first fold's test part was not seen.",
    ),
    "emojitwo": Recipe(
        parts=emojitwo_parts,
        stages=(
            Stage(name="retrieval", config="configs/pretrain/pictograms.yaml"),
            Stage(name="tagging", config="configs/finetune/tagging.yaml", words=("data.label=keywords", "train.steps=600")),
        ),
        tasks={
            "retrieval": ("image_to_text_r1", "image_to_text_r10", "text_to_image_r1", "text_to_image_r10"),
            "tagging": ("map",),
        },
        published={},
        note="A fifth of the pictures held out by the hash of their code points; skin tones stay with their picture and are not measured. "
        "Candidates of retrieval are all held-out pictures. Nobody has published on this split.",
    ),
}
