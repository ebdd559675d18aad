import pickle
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmscale.data.tokenize import TextTokenizer
from shards.errors import ConfigError
from tests.data.tiny import WORDS, tokenizer_folder


def test_ids_lie_between_begin_and_end(tmp_path):
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path))
    assert (tokenizer.pad, tokenizer.begin, tokenizer.end, tokenizer.mask) == (0, 2, 3, 4)
    assert tokenizer.vocab_size == 5 + len(WORDS)
    assert tokenizer.encode("RED square nonsense", 10) == [2, 5, 8, 1, 3]
    assert tokenizer.decode([2, 5, 8, 3, 0]) == "red square"
    assert tokenizer.ordinary_ids.tolist() == list(range(5, 5 + len(WORDS)))


def test_long_text_is_cut_and_keeps_its_end(tmp_path):
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path))
    assert tokenizer.encode("red " * 100, 5) == [2, 5, 5, 5, 3]
    assert tokenizer.encode("", 5) == [2, 3]
    assert tokenizer.encode("blue " * 1_000_000, 4) == [2, 7, 7, 3]


def test_texts_may_start_without_a_begin_token(tmp_path):
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path), begin=False)
    assert tokenizer.begin is None
    assert tokenizer.encode("red " * 100, 4) == [5, 5, 5, 3]
    assert tokenizer.digest != TextTokenizer(tmp_path).digest


def test_a_gpt_like_tokenizer_uses_its_end_of_text(tmp_path):
    backend = Tokenizer(models.WordLevel({"<end>": 0, "red": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>").save_pretrained(str(tmp_path))
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.encode("red red", 8) == [0, 1, 1, 0]
    assert (tokenizer.pad, tokenizer.mask) == (0, None)


def test_pickled_it_is_the_same_and_needs_no_transformers(tmp_path):
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path / "t"))
    (tmp_path / "pickle").write_bytes(pickle.dumps(tokenizer))
    code = (
        "import pickle, sys; t = pickle.load(open(sys.argv[1], 'rb')); print(t.encode('red a', 8), t.digest, 'transformers' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "pickle")], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [*str(tokenizer.encode("red a", 8)).split(), tokenizer.digest, "False"]


def test_the_digest_tells_tokenizers_apart(tmp_path):
    one, other = TextTokenizer(tokenizer_folder(tmp_path / "a")), TextTokenizer(tokenizer_folder(tmp_path / "b", mask=False))
    assert one.digest == TextTokenizer(tmp_path / "a").digest
    assert one.digest != other.digest


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no tokenizer folder '.*nowhere'.*tokenizer.kind=wordpiece"):
        TextTokenizer(tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ConfigError, match="holds no tokenizer that transformers can load"):
        TextTokenizer(tmp_path)


def test_a_tokenizer_without_a_beginning_is_said(tmp_path):
    backend = Tokenizer(models.WordLevel({"red": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no token for the beginning \(cls or bos\) of a text"):
        TextTokenizer(tmp_path)
