import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import configfile
from shards.condition import parse_condition
from shards.errors import ConfigError
from shards.filter import FilterConfig, Judge
from shards.index import adopt
from shards.manifest import read_manifest
from shards.sample import Sample
from shards.verify import verify
from shards.versions.filter import FilterVersionConfig, drawn, filter_data_set
from tests.shards.tars import jpeg, make_data_set, write_tar
from tests.shards.versions import config, content, keys


def judge(*words: str) -> Judge:
    settings = configfile.load(FilterConfig, None, words)
    settings.check()
    return Judge(settings)


@pytest.mark.parametrize(
    ("words", "sample", "reason"),
    [
        (["min_side=20"], (30, 19, [], {}), "min_side"),
        (["min_side=20"], (30, 20, [], {}), None),
        (["max_side=30"], (31, 20, [], {}), "max_side"),
        (["min_pixels=600"], (30, 19, [], {}), "min_pixels"),
        (["max_pixels=600"], (30, 21, [], {}), "max_pixels"),
        (["max_aspect=2"], (20, 41, [], {}), "max_aspect"),
        (["max_aspect=2"], (41, 21, [], {}), None),
        (["min_side=20", "max_aspect=2"], (None, None, ["text alone"], {}), None),
        (["require_image=true"], (None, None, ["text alone"], {}), "require_image"),
        (["require_caption=true"], (1, 1, [], {}), "require_caption"),
        (["min_chars=5"], (1, 1, [], {}), None),
        (["min_chars=5"], (1, 1, ["long enough", "tiny"], {}), "min_chars"),
        (["max_chars=5"], (1, 1, ["longer"], {}), "max_chars"),
        (["min_words=2"], (1, 1, ["it's"], {}), None),
        (["min_words=2"], (1, 1, ["one"], {}), "min_words"),
        (["max_words=2"], (1, 1, ["a b c"], {}), "max_words"),
        (["scripts=[latin]"], (1, 1, ["Ein Gruß, naïve"], {}), None),
        (["scripts=[LATIN]"], (1, 1, ["Привет, мир"], {}), "scripts"),
        (["scripts=[LATIN]"], (1, 1, ["1234 !?"], {}), "scripts"),
        (["scripts=[LATIN]", "min_script_fraction=0.5"], (1, 1, ["abc Мир"], {}), None),
        (["scripts=[CJK, HIRAGANA]"], (1, 1, ["日本の山"], {}), None),
        (["deny=[stock photo, ad]"], (1, 1, ["A Stock  PHOTO of a cat"], {}), "deny"),
        (["deny=[stock photo, ad]"], (1, 1, ["stock of photos, a lad"], {}), None),
        (["deny=[広告]"], (1, 1, ["これは広告です"], {}), "deny"),
        (["deny=[straße]"], (1, 1, ["HAUPT STRASSE"], {}), "deny"),
        (["where=[score>=0.5]"], (1, 1, [], {"score": 0.5}), None),
        (["where=[score>=0.5]"], (1, 1, [], {"score": 0.4}), "where"),
        (["where=[score>=0.5]"], (1, 1, [], {}), "where"),
    ],
)
def test_each_rule(words, sample, reason):
    assert judge(*words)(*sample) == reason


def test_rules_that_read_no_text_say_so():
    assert not judge("min_side=3", "max_aspect=2").reads_text
    assert judge("deny=[x]").reads_text
    assert judge("where=[a=1]").reads_text


@pytest.mark.parametrize(
    ("text", "fields", "holds"),
    [
        ("language=en", {"language": "en"}, True),
        ("language != en", {"language": "de"}, True),
        ("language!=en", {}, False),
        ("licence.name==CC-BY", {"licence": {"name": "CC-BY"}}, True),
        ("licence.name==CC-BY", {"licence": "CC-BY"}, False),
        ("nsfw=false", {"nsfw": False}, True),
        ("nsfw=false", {"nsfw": 0}, False),
        ("score>0.5", {"score": "0.75"}, True),
        ("score>0.5", {"score": "high"}, False),
        ("score>0.5", {"score": None}, False),
        ("score<1", {"score": True}, False),
        ("date>=2020-01-01", {"date": "2021-05-05"}, True),
        ("count=3", {"count": 3.0}, True),
        ("gone=null", {"gone": None}, True),
    ],
)
def test_conditions(text, fields, holds):
    assert parse_condition(text, "where").holds(fields) is holds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["min_side=0"], "`min_side` must be at least 1; got 0"),
        (["min_chars=9", "max_chars=3"], "`min_chars`=9 is over `max_chars`=3: no sample would stay"),
        (["scripts=[LATN]"], "`scripts`: there is no script 'LATN'"),
        (["min_script_fraction=0"], "`min_script_fraction` must be over 0 and at most 1; got 0"),
        (["where=[score]"], "`where`: 'score' is no condition. Write FIELD, one of"),
        (["where=[import os; 1]"], "is no condition"),
        (["where=[ok>true]"], "compares by size with True, which has none"),
        (["deny_file=/nowhere"], "`deny_file`: '/nowhere' cannot be read as UTF-8 text"),
    ],
)
def test_settings_that_cannot_be(words, message):
    with pytest.raises(ConfigError, match=message):
        configfile.load(FilterConfig, None, words).check()


def test_a_filtered_version(tmp_path):
    base = make_data_set(tmp_path / "base")
    tars = content(base)
    (tmp_path / "words.txt").write_text("caption 7\n\nnothing\n")
    words = ["where=[number>=3]", f"deny_file={tmp_path / 'words.txt'}"]
    summary = filter_data_set(base, config(FilterVersionConfig, tmp_path / "new", *words), progress=False)
    assert (summary.kept, summary.rows, dict(summary.dropped)) == (8, 12, {"where": 3, "deny": 1})
    assert str(summary).startswith("  where                dropped 3\n  deny                 dropped 1\n8 of 12 samples kept")
    assert keys(tmp_path / "new") == [f"k{number:04d}" for number in (3, 4, 5, 6, 8, 9, 10, 11)]
    assert pq.read_table(tmp_path / "new" / "dropped.parquet").to_pylist()[-1] == {"shard": "s-001.tar", "key": "k0007", "reason": "deny"}
    assert verify(tmp_path / "new", full=True).sound
    assert content(base) == tars
    assert json.loads((tmp_path / "new" / "origin.json").read_text())["of"] == [
        {"folder": "../base", "version": read_manifest(base).digest}
    ]


def test_a_part_is_drawn_by_key_and_lies_within_a_larger_one(tmp_path):
    base = make_data_set(tmp_path / "base")
    kept = {}
    for name, words in (
        ("third", ["fraction=0.33"]),
        ("half", ["fraction=0.5"]),
        ("other", ["fraction=0.5", "seed=1"]),
        ("all", ["fraction=1"]),
    ):
        summary = filter_data_set(base, config(FilterVersionConfig, tmp_path / name, *words), progress=False)
        kept[name] = set(keys(tmp_path / name))
        assert dict(summary.dropped) == ({"fraction": 12 - len(kept[name])} if name != "all" else {})
    assert kept["third"] < kept["half"] < kept["all"]
    assert kept["other"] != kept["half"]
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "few", "where=[number>=5]"), progress=False)
    filter_data_set(tmp_path / "few", config(FilterVersionConfig, tmp_path / "half-of-few", "fraction=0.5"), progress=False)
    assert set(keys(tmp_path / "half-of-few")) == kept["half"] & set(keys(tmp_path / "few"))
    draws = np.array([drawn(f"key-{i}", seed=3) for i in range(20000)])
    assert np.quantile(draws, (0.1, 0.5, 0.9)) == pytest.approx((0.1, 0.5, 0.9), abs=0.01)
    for wrong in ("fraction=0", "fraction=1.5"):
        with pytest.raises(ConfigError, match=r"^`fraction` is a part of the samples, over 0 and at most 1; got"):
            filter_data_set(base, config(FilterVersionConfig, tmp_path / "wrong", wrong), progress=False)
    with pytest.raises(ConfigError, match=r"^`min_side` must be at least 1"):
        filter_data_set(base, config(FilterVersionConfig, tmp_path / "wrong", "min_side=0"), progress=False)


def test_the_same_bytes_for_any_number_of_processes_and_when_repeated(tmp_path):
    base = make_data_set(tmp_path / "base")
    for name, processes in (("one", 1), ("two", 2), ("two", 1)):
        filter_data_set(base, config(FilterVersionConfig, tmp_path / name, "deny=['3', '6']", f"processes={processes}"), progress=False)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_version_of_a_version(tmp_path):
    base = make_data_set(tmp_path / "base")
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "a", "where=[number>=4]", "processes=1"), progress=False)
    deeper = tmp_path / "below" / "b"
    summary = filter_data_set(tmp_path / "a", config(FilterVersionConfig, deeper, "where=[number<9]", "processes=1"), progress=False)
    assert summary.rows == 8
    assert keys(deeper) == [f"k{number:04d}" for number in range(4, 9)]
    assert {info.location for info in read_manifest(deeper).shards} == {"../../base"}


def test_shards_of_which_nothing_stays_are_no_part_of_the_version(tmp_path):
    base = make_data_set(tmp_path / "base")
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "new", "where=[number>=5]", "processes=1"), progress=False)
    assert [info.shard for info in read_manifest(tmp_path / "new").shards] == ["s-001.tar", "s-002.tar"]
    summary = filter_data_set(base, config(FilterVersionConfig, tmp_path / "none", "min_side=999", "processes=1"), progress=False)
    assert summary.kept == 0
    assert read_manifest(tmp_path / "none").rows == 0


def test_keys_from_a_file(tmp_path):
    base = make_data_set(tmp_path / "base")
    (tmp_path / "keys.txt").write_text("k0001\ns-001.tar:k0006\ns-000.tar:k0007\n")
    words = [f"keep_keys={tmp_path / 'keys.txt'}", "processes=1"]
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "kept", *words), progress=False)
    assert keys(tmp_path / "kept") == ["k0001", "k0006"]
    dropped = tmp_path / "kept" / "dropped.parquet"
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "rest", f"drop_keys={dropped}", "processes=1"), progress=False)
    assert keys(tmp_path / "rest") == ["k0001", "k0006"]
    pq.write_table(pa.table({"name": ["k"]}), tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match=r"`drop_keys`: .*other\.parquet' cannot be read as keys"):
        filter_data_set(
            base, config(FilterVersionConfig, tmp_path / "x", f"drop_keys={tmp_path / 'other.parquet'}", "processes=1"), progress=False
        )
    with pytest.raises(ConfigError, match="`keep_keys`: there is no file '/nowhere'"):
        filter_data_set(base, config(FilterVersionConfig, tmp_path / "y", "keep_keys=/nowhere"), progress=False)


def test_samples_whose_text_cannot_be_read_are_dropped_with_their_reason(tmp_path):
    write_tar(tmp_path / "a.tar", [Sample("bad", {"jpg": jpeg(0), "json": b"{"}), Sample("good", {"jpg": jpeg(1), "json": b'{"a": 1}'})])
    adopt(tmp_path)
    summary = filter_data_set(tmp_path, config(FilterVersionConfig, tmp_path / "new", "where=[a=1]", "processes=1"), progress=False)
    assert dict(summary.dropped) == {"bad_json": 1}


def test_folders_that_hold_something_else(tmp_path):
    base = make_data_set(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"`out`: .* is the data set itself"):
        filter_data_set(base, config(FilterVersionConfig, base, "min_side=1"), progress=False)
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "new", "min_side=1", "processes=1"), progress=False)
    with pytest.raises(ConfigError, match=r"holds another version than this one, or one of older data: .*origin\.json' says which"):
        filter_data_set(base, config(FilterVersionConfig, tmp_path / "new", "min_side=2"), progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"is not empty and holds no version of a data set but 'notes\.txt'"):
        filter_data_set(base, config(FilterVersionConfig, tmp_path / "full", "min_side=1"), progress=False)
    with pytest.raises(ConfigError, match="`processes` must be at least 1; got 0"):
        filter_data_set(base, config(FilterVersionConfig, tmp_path / "z", "processes=0"), progress=False)


def test_the_tokenizer_comes_along(tmp_path):
    base = make_data_set(tmp_path / "base")
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "tokenizer.json").write_text("{}")
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "new", "min_side=1", "processes=1"), progress=False)
    assert (tmp_path / "new" / "tokenizer" / "tokenizer.json").read_text() == "{}"
