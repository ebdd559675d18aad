"""Tiny shards of every kind of sample, and a tiny tokenizer."""

import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.collate import Collator
from mmscale.data.tokenize import TextTokenizer
from shards import configfile
from shards.index import adopt

WORDS = ("red", "green", "blue", "square", "circle", "small", "large", "left", "right", "of", "a", "above")
SIZE, PATCH = 16, 4


def image_bytes(index: int, size: int = SIZE, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def caption(index: int) -> str:
    generator = np.random.default_rng(1000 + index)
    return " ".join(generator.choice(WORDS, size=generator.integers(1, 9)))


def paired(index: int) -> dict[str, bytes]:
    fields = {"question": caption(index + 500), "answer": WORDS[index % 3], "number": index}
    return {"jpg": image_bytes(index), "txt": caption(index).encode(), "json": json.dumps(fields).encode()}


def mixed(index: int) -> dict[str, bytes]:
    """By turns: a pair, text alone, an image alone, a broken image, several captions, a PNG of another size."""
    pair = paired(index)
    return (
        pair,
        {"txt": pair["txt"]},
        {"jpg": pair["jpg"]},
        pair | {"jpg": pair["jpg"][:200]},
        {"jpg": pair["jpg"], "json": json.dumps({"captions": [caption(index + i) for i in range(3)], "answer": "red"}).encode()},
        {"png": image_bytes(index, 24, "PNG"), "txt": pair["txt"]},
    )[index % 6]


def write(folder: Path, make=paired, rows=(11, 7, 13)) -> Path:
    """Write a data set; sample i of it has the key `s<i>`."""
    folder.mkdir(parents=True)
    index = 0
    for shard, count in enumerate(rows):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for _ in range(count):
                tar.write({"__key__": f"s{index}", **make(index)})
                index += 1
    adopt(folder)
    return folder


def tokenizer_folder(folder: Path, mask: bool = True) -> Path:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(["[MASK]"] if mask else [])]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **names, **({"mask_token": "[MASK]"} if mask else {}))
    wrapped.save_pretrained(str(folder))
    return folder


EVERY_OBJECTIVE = {
    "contrastive": {"weight": 1.0},
    "matching": {"weight": 1.0, "group": 4},
    "masked_language": {"weight": 1.0, "fraction": 0.7, "mask": 0.4},
    "captioning": {"weight": 1.0, "fraction": 0.6},
    "masked_image": {"weight": 1.0, "mask": 0.5, "fraction": 0.5},
}
AUGMENT = {"shift": 2, "flip": 0.5, "brightness": 0.2, "scale": 0.1}


def config(shards: Path, **layers) -> RunConfig:
    base = {
        "run": "unused",
        "data": {"shards": str(shards), "augment": AUGMENT, "max_text_tokens": 8},
        "model": {"image_size": SIZE, "patch_size": PATCH},
        "objectives": EVERY_OBJECTIVE,
        "train": {"seed": 3},
    }
    return configfile.build(RunConfig, [("base", base), ("test", layers)])


def collator(folder: Path, shards: Path, training: bool = True, **layers) -> Collator:
    where = folder / "tokenizer"
    if not where.is_dir():
        tokenizer_folder(where)
    return Collator.from_config(config(shards, **layers), TextTokenizer(where), training=training)


def assert_equal(one: Batch, other: Batch) -> None:
    """Bit for bit, shapes, types and memory layout included."""

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and (not a.numel() or a.stride() == b.stride()) and torch.equal(a, b)
        return a == b

    for name in Batch.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        if name in ("caption", "text"):
            assert all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__), name
        elif name == "streams":
            assert list(a) == list(b)
            assert all(same(getattr(a[k], f), getattr(b[k], f)) for k in a for f in a[k].__dataclass_fields__)
        elif name == "mixing":
            assert (a is None) == (b is None)
            assert a is None or (same(a.rows_M, b.rows_M) and same(a.shares_M, b.shares_M))
        elif name == "targets":
            assert a.keys() == b.keys()
            assert all(same(a[k], b[k]) for k in a)
        else:
            assert same(a, b), name
