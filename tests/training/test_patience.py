import pytest

from mmscale.config import load_run_config
from mmscale.patience import Best, best_of, is_out
from shards.errors import ConfigError


def test_the_first_of_equals_is_the_best_and_undefined_is_no_better() -> None:
    lines = [{"step": s, "map": v} for s, v in [(1, None), (2, 0.5), (3, 0.7), (4, 0.7), (5, None), (6, 0.6)]]
    assert best_of(lines, "map") == Best(3, 0.7, 3)
    assert best_of(lines[:1], "map") is None
    assert best_of([*lines, {"step": 7, "map": 0.8}], "map") == Best(7, 0.8, 0)
    assert [is_out(Best(3, 0.7, since), 2) for since in (0, 1, 2, 3)] == [False, False, True, True]
    assert not is_out(Best(3, 0.7, 100), 0)
    assert not is_out(None, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate.patience=2"], r"^`evaluate\.patience` = 2 counts evaluations without a higher `checkpoint\.best`, which is null\."),
        (["evaluate.patience=-1"], r"^`evaluate\.patience` must be at least 1, or 0 for never; got -1\."),
    ],
)
def test_patience_needs_a_metric(tmp_path, words, said) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text("run: x\ndata: {shards: y}\ntask: {name: classification}\n")
    with pytest.raises(ConfigError, match=said):
        load_run_config(path, words)
