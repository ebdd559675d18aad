import pickle

import pytest
from webdataset.tariterators import base_plus_ext

from shards.errors import SampleError
from shards.sample import Sample, check_key, split_name, validate


def test_image_prefers_the_plain_part_and_leaves_frames_alone():
    assert Sample("k", {"png": b"p", "jpg": b"j"}).image() == ("jpg", b"j")
    assert Sample("k", {"left.png": b"l", "txt": b"t"}).image() == ("png", b"l")
    assert Sample("k", {"000.jpg": b"0", "001.jpg": b"1"}).image() is None
    assert Sample("k", {"txt": b"t"}).image() is None


@pytest.mark.parametrize(
    ("parts", "captions"),
    [
        ({"txt": b" a cat \n", "json": b'{"caption": "b"}'}, ["a cat"]),
        ({"json": b'{"captions": ["a", " ", "b"]}'}, ["a", "b"]),
        ({"json": b'{"caption": "a"}'}, ["a"]),
        ({"json": b'{"caption": null}'}, []),
        ({"txt": b" \n"}, []),
        ({"jpg": b"x"}, []),
    ],
)
def test_captions(parts, captions):
    assert Sample("k", parts).captions() == captions


def test_fields_and_repr_and_pickle():
    sample = Sample("k", {"json": b'{"a": [1]}'})
    assert sample.fields() == {"a": [1]}
    assert Sample("k", {}).fields() == {}
    assert repr(sample) == "Sample('k', {json: 10 B})"
    assert pickle.loads(pickle.dumps(sample)) == sample


@pytest.mark.parametrize(
    ("sample", "reason", "text"),
    [
        (Sample("a/b", {"txt": b"x"}), "bad_key", "no '/'"),
        (Sample("a.b", {"txt": b"x"}), "bad_key", "got '.'"),
        (Sample("a\n", {"txt": b"x"}), "bad_key", "control character"),
        (Sample("a\ud800", {"txt": b"x"}), "bad_key", "surrogate"),
        (Sample("", {"txt": b"x"}), "bad_key", "must not be empty"),
        (Sample("__a", {"txt": b"x"}), "bad_key", "two underscores"),
        (Sample("a", {}), "no_parts", "holds nothing"),
        (Sample("a", {"JPG": b"x"}), "bad_extension", "lower-case"),
        (Sample("a", {"../x": b"x"}), "bad_extension", "lower-case"),
        (Sample("a" * 97, {"jpg": b"x"}), "name_too_long", "over 100 bytes"),
        (Sample("a", {"jpg": b""}), "empty_part", "no bytes"),
        (Sample("a", {"txt": "é".encode("latin-1")}), "not_utf8", "its txt part is not UTF-8: .* at byte 0"),
        (Sample("a", {"json": b"{"}), "bad_json", "cannot be parsed"),
        (Sample("a", {"json": b"[" * 100_000}), "bad_json", "cannot be parsed"),
        (Sample("a", {"json": b"[]"}), "bad_json", "must hold a mapping, not a list"),
        (Sample("a", {"json": b'{"captions": [1]}'}), "bad_captions", "must be strings"),
    ],
)
def test_validate_names_what_is_wrong(sample, reason, text):
    with pytest.raises(SampleError, match=text) as caught:
        validate(sample)
    assert caught.value.reason == reason


def test_validate_takes_any_script_and_compound_extensions():
    validate(Sample("кот-1_é", {"000.jpg": b"x", "txt": "подпись".encode()}))
    check_key("a b")


@pytest.mark.parametrize("name", ["k.jpg", "a/b/k.left.JPG", "./k.txt", "a.b/k.txt", "k", "a/k", "a.b/k", "k.", ".hidden", "a b.c d"])
def test_split_name_splits_as_webdataset_does(name):
    key, ext = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, ext.lower()))


def test_split_name_leaves_metadata_and_hidden_files_out():
    assert split_name("__meta__/x.json") is None
    assert split_name("folder/._k.jpg") is None
