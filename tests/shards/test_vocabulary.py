import hashlib
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from shards import configfile
from shards.config import TokenizerConfig, WriteConfig
from shards.errors import ShardError
from shards.manifest import make_manifest
from shards.vocabulary import train_tokenizer, write_tokenizer
from shards.write import write_shards

TEXTS = [f"GREEK SMALL LETTER {name} WITH TONOS-{number}" for number in range(9) for name in ("ALPHA", "BETA", "GAMMA", "\u00c9TA")]


def glyphs(tmp_path, *words: str) -> WriteConfig:
    return configfile.load(WriteConfig, None, ["source=glyphs", f"out={tmp_path / 'out'}", "glyphs.every=400", "processes=1", *words])


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_transformers_loads_it(tmp_path, kind: str) -> None:
    words = [f"tokenizer.kind={kind}", "tokenizer.vocab_size=500", "tokenizer.fields=[script]"]
    summary = write_shards(glyphs(tmp_path, *words), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(summary.tokenizer)
    assert len(tokenizer) == tokenizer.vocab_size <= 500
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id] == [
        0,
        1,
        2,
        3,
        4,
    ]
    ids = tokenizer("LATIN SMALL LETTER A")["input_ids"]
    assert (ids[0], ids[-1]) == (2, 3)
    assert 1 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "LATIN SMALL LETTER A"
    assert len(tokenizer("OTHER")["input_ids"]) < 7


def test_bpe_gives_back_exactly_the_text() -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(kind="bpe", vocab_size=300))
    text = "Any  text\u00e9: \u4e2d\u6587, it's (here)!"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_lowercase() -> None:
    for kind in ("wordpiece", "bpe"):
        tokenizer = train_tokenizer(TEXTS, TokenizerConfig(kind=kind, vocab_size=300, lowercase=True))  # type: ignore[arg-type]
        assert tokenizer.encode("GREEK").ids == tokenizer.encode("greek").ids


def test_unknown_and_rare_characters() -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(kind="wordpiece", vocab_size=200))
    assert tokenizer.encode("\u4e2d").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    assert "[UNK]" not in tokenizer.encode("\u00c9TATA").tokens


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_same_bytes_in_every_process(kind: str) -> None:
    """The trainer's hash maps are seeded anew in each process."""
    program = (
        "import sys; from shards.vocabulary import train_tokenizer; from shards.config import TokenizerConfig; import hashlib;"
        f"texts = {TEXTS!r} + [f'w{{n * 7919 % 1000}} tie{{n}}' for n in range(500)];"
        f"print(hashlib.sha256(train_tokenizer(texts, TokenizerConfig(kind={kind!r}, vocab_size=400)).to_str().encode()).hexdigest())"
    )
    digests = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in range(4)}
    assert len(digests) == 1


def test_trained_again_only_for_other_settings(tmp_path) -> None:
    def digest_after(*words: str) -> tuple[str, int]:
        file = write_shards(glyphs(tmp_path, *words), progress=False).tokenizer / "tokenizer.json"
        return hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns

    first = digest_after("tokenizer.kind=bpe", "tokenizer.vocab_size=300")
    assert digest_after("tokenizer.kind=bpe", "tokenizer.vocab_size=300") == first
    assert digest_after("tokenizer.kind=bpe", "tokenizer.vocab_size=310")[0] != first[0]


def test_no_text_to_train_on(tmp_path) -> None:
    with pytest.raises(ShardError, match=r"hold no captions to train a tokenizer on. Name the fields that hold texts in tokenizer.fields"):
        write_tokenizer(tmp_path, make_manifest(tmp_path, []), TokenizerConfig(kind="bpe"))
