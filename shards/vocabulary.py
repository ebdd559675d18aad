"""Train a tokenizer on the texts of written shards; the folder it makes is one of transformers'."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shards.commit import commit_bytes
from shards.config import TokenizerConfig
from shards.configfile import to_plain
from shards.errors import ShardError
from shards.manifest import Manifest, sidecar_path
from shards.sample import Sample
from shards.sidecar import read_index

TOKENIZER_FOLDER = "tokenizer"
PAD, UNKNOWN, BEGIN, END, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROLES = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": BEGIN, "sep_token": END, "mask_token": MASK}
_TRAINED_NAME = "trained_on.json"
ALPHABET = 1000
"""Most characters that a wordpiece vocabulary begins with."""


def write_tokenizer(out: Path, manifest: Manifest, config: TokenizerConfig) -> Path | None:
    """Train and commit `out/tokenizer`, unless it is there for these very shards and settings.

    Returns:
        The tokenizer's folder, or None for `tokenizer.kind=none`.

    Raises:
        ShardError: the shards hold no text to train on.
    """
    if config.kind == "none":
        return None
    folder = out / TOKENIZER_FOLDER
    trained_on = json.dumps({"shards": manifest.digest, "tokenizer": to_plain(config)}, indent=1, sort_keys=True) + "\n"
    mark = folder / _TRAINED_NAME
    if mark.exists() and mark.read_text(encoding="utf-8") == trained_on:
        return folder
    texts = list(texts_of(manifest, config))
    if not texts:
        raise ShardError(
            f"The shards in {str(out)!r} hold no captions to train a tokenizer on. "
            "Name the fields that hold texts in tokenizer.fields, or set tokenizer.kind=none."
        )
    _save(train_tokenizer(texts, config), folder)
    commit_bytes(mark, trained_on.encode())
    return folder


def train_tokenizer(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """Train a tokenizer; the same texts give the same tokenizer.

    Texts are encoded as [CLS] tokens [SEP].
    """
    tokenizer = _wordpiece(texts, config) if config.kind == "wordpiece" else _byte_level_bpe(texts, config)
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B:1 {END}:1", special_tokens=ids
    )
    return tokenizer


def texts_of(manifest: Manifest, config: TokenizerConfig) -> Iterator[str]:
    """Yield captions and named fields in the order of the shards; of a large data set evenly spread samples. Images are not read."""
    every = -(-max(manifest.rows, 1) // config.max_texts)
    row = 0
    for shard in manifest.shards:
        tar = manifest.folder / shard.shard
        all_parts = read_index(sidecar_path(tar))["parts"]
        descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for parts in all_parts:
                if row % every == 0:
                    yield from _sample_texts(descriptor, parts.as_py(), config.fields)
                row += 1
        finally:
            os.close(descriptor)


def _sample_texts(descriptor: int, parts: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    read = {part["ext"]: os.pread(descriptor, part["size"], part["offset"]) for part in parts if part["ext"] in ("txt", "json")}
    sample = Sample("", read)
    yield from sample.captions()
    if not names:
        return
    fields = sample.fields()
    for name in names:
        value = fields.get(name)
        yield from (str(text) for text in (value if isinstance(value, list) else [value]) if text is not None)


def _wordpiece(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """BERT's scheme: words and punctuation, then greedy pieces.

    The trainer numbers the continuing characters (`##a`) in the order of a hash map that is seeded anew in every process, and breaks
    ties by these numbers. Given as special tokens they are numbered in our order; the vocabulary then moves to a model without these.
    """
    tokenizer = _empty_wordpiece(models.WordPiece(unk_token=UNKNOWN), config)
    first, continuing = _alphabets(tokenizer, texts)
    numbered = [*SPECIAL_TOKENS, *(f"##{char}" for char in continuing)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        special_tokens=numbered,
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _empty_wordpiece(models.WordPiece(tokenizer.get_vocab(), unk_token=UNKNOWN), config)


def _empty_wordpiece(model: models.WordPiece, config: TokenizerConfig) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabets(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The most frequent characters of all words, and those of them that continue a word; both sorted."""
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for word, times in Counter(word for text in texts for word in text.split()).items():
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(word)):
            for char in piece:
                counts[char] += times
            continuing.update(piece[1:])
    kept = sorted(counts, key=lambda char: (-counts[char], char))[:ALPHABET]
    return sorted(kept), sorted(continuing.intersection(kept))


def _byte_level_bpe(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """GPT-2's scheme: merges of bytes, spaces included, so that decoding gives back exactly the text."""
    tokenizer = Tokenizer(models.BPE())
    if config.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write transformers' files; the mark that the caller commits after them says that they are complete."""
    folder.mkdir(exist_ok=True)
    (folder / _TRAINED_NAME).unlink(missing_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **_ROLES}
    commit_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode("utf-8"))
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", _ROLES)):
        commit_bytes(folder / name, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
