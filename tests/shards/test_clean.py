import json

import pytest

from shards.clean import clean_sample
from shards.clean_text import clean_text
from shards.config import CaptionConfig, ColumnsConfig, ImageConfig, WriteConfig
from shards.errors import SampleError
from shards.sources.record import RawSample, Record
from tests.shards.pictures import encoded, gradient

RECORD = Record("k", "a/k.jpg")


def config(**changes: object) -> WriteConfig:
    return WriteConfig(source="folder", path="x", out="y", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("  two \t words\r\n here ", "two words here"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("nul\x00bell\x07", "nul bell"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("\u00e9".encode("utf-16"), "\u00e9"),
        ("\u4e2d\u6587".encode(), "\u4e2d\u6587"),
        (" \n ", ""),
    ],
)
def test_clean_text(raw: str | bytes, text: str) -> None:
    assert clean_text("k", raw, CaptionConfig()) == text


@pytest.mark.parametrize("raw", [b"caf\xe9", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_latin_1(raw: str | bytes) -> None:
    with pytest.raises(SampleError, match=r"bad_encoding: The text is not UTF-8 at byte 3; caption.fallback_encoding=latin-1"):
        clean_text("k", raw, CaptionConfig())
    assert clean_text("k", raw, CaptionConfig(fallback_encoding="latin-1")) == "caf\u00e9"


def test_neither_encoding() -> None:
    with pytest.raises(SampleError, match="neither UTF-8 nor ascii"):
        clean_text("k", b"caf\xe9", CaptionConfig(fallback_encoding="ascii"))
    with pytest.raises(SampleError, match="half a surrogate pair"):
        clean_text("k", "x\ud800", CaptionConfig())


def test_long_caption() -> None:
    with pytest.raises(SampleError, match=r"caption_too_long: The caption has 1000000 characters; caption.max_chars is 8192"):
        clean_text("k", "x" * 1_000_000, CaptionConfig())
    assert clean_text("k", "ab cd", CaptionConfig(max_chars=3, too_long="cut")) == "ab"


def test_one_caption_is_a_txt_and_several_are_in_the_json() -> None:
    image = encoded(gradient())
    one = clean_sample(RECORD, RawSample(image=image, captions=(" a  cat ", "")), config())
    assert one.parts["txt"] == b"a cat"
    assert one.caption_length == 5
    two = clean_sample(RECORD, RawSample(image=image, captions=("a cat", "felis catus", "a cat")), config())
    assert "txt" not in two.parts
    assert json.loads(two.parts["json"])["captions"] == ["a cat", "felis catus"]
    assert two.caption_length == len("felis catus")


def test_fields() -> None:
    fields = {"b": 1, "a": float("nan"), "width": "old", "list": [1, None], "nested": {"x": b"\x01"}}
    clean = clean_sample(RECORD, RawSample(image=encoded(gradient()), captions=("c",), fields=fields), config())
    found = json.loads(clean.parts["json"])
    assert list(found) == sorted(found)
    assert found["width"] == 48
    assert found["height"] == 32
    assert found["input_width"] == "old"
    assert found["source"] == "a/k.jpg"
    assert len(found["sha256"]) == 64
    assert found["a"] is None
    assert found["nested"] == {"x": "01"}


def test_undecodable_field() -> None:
    raw = RawSample(image=encoded(gradient()), captions=("c",), fields={"question": ["caf\udce9"]})
    with pytest.raises(SampleError, match="bad_encoding"):
        clean_sample(RECORD, raw, config())
    clean = clean_sample(RECORD, raw, config(caption=CaptionConfig(fallback_encoding="latin-1")))
    assert json.loads(clean.parts["json"])["question"] == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (RawSample(captions=("c",)), "no_image"),
        (RawSample(image=b"x", captions=()), "no_caption"),
        (RawSample(image=b"x", captions=(" ",)), "empty_caption"),
        (RawSample(image=encoded(gradient()), captions=("c",), extra={"jpg": b"x"}), "duplicate_part"),
    ],
)
def test_refused(raw: RawSample, reason: str) -> None:
    with pytest.raises(SampleError, match=f"^k: {reason}: "):
        clean_sample(RECORD, raw, config())


def test_text_only_and_image_only() -> None:
    text = clean_sample(RECORD, RawSample(captions=("c",)), config(image=ImageConfig(required=False)))
    assert set(text.parts) == {"txt", "json"}
    assert (text.width, text.height) == (None, None)
    image = clean_sample(RECORD, RawSample(image=encoded(gradient())), config(caption=CaptionConfig(required=False)))
    assert set(image.parts) == {"jpg", "json"}
    assert image.caption_length is None


def test_a_table_without_captions_requires_none() -> None:
    table = WriteConfig(source="table", path="x", out="y", columns=ColumnsConfig(caption=None))
    assert not table.caption_required()
