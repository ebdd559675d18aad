from pathlib import Path

import pytest

from shards import configfile
from shards.config import WriteConfig
from shards.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def loaded(*words: str) -> WriteConfig:
    config = configfile.load(WriteConfig, None, words)
    config.check()
    return config


def test_the_words_of_a_command_line() -> None:
    config = loaded("source=table", "path=pairs.parquet", "out=data/x", "image.short_side=256", "columns.image=file")
    assert (config.source, config.path, config.out) == ("table", "pairs.parquet", "data/x")
    assert (config.image.short_side, config.columns.image) == (256, "file")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("shards*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path: Path) -> None:
    configfile.load(WriteConfig, path, ["out=x"]).check()


def test_defaults_survive_yaml(tmp_path: Path) -> None:
    config = loaded("source=glyphs", "out=x")
    (tmp_path / "c.yaml").write_text(configfile.to_yaml(config))
    assert configfile.load(WriteConfig, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=x"], "`source` is required"),
        (["source=glyphs"], "`out` is required"),
        (["source=tabel", "out=x"], "`source`: Invalid value 'tabel', expected one of"),
        (["source=table", "out=x"], "`path` is required for source=table"),
        (["source=glyphs", "out=x", "imag.size=3"], "Did you mean: 'image'"),
        (["source=glyphs", "out=x", "image.size=big"], "`image.size`: Value 'big'"),
        (["source=glyphs", "out=x", "image.size=8", "image.short_side=8"], "`image.short_side` and `image.size` exclude each other"),
        (["source=glyphs", "out=x", "image.quality=101"], "`image.quality` must be 1 to 100; got 101"),
        (["source=glyphs", "out=x", "rows_per_shard=0"], "`rows_per_shard` must be at least 1; got 0"),
        (["source=glyphs", "out=x", "processes=0"], "`processes` must be at least 1; got 0"),
        (["source=glyphs", "out=x", "quarantine.max_fraction=2"], "`quarantine.max_fraction` must be 0 to 1; got 2.0"),
        (["source=glyphs", "out=x", "columns.caption_separator=|"], "A lone . is YAML syntax"),
        (["source=glyphs", "out=x", "caption.fallback_encoding=klingon"], "there is no encoding 'klingon'"),
    ],
)
def test_wrong_settings(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(*words)
