from collections.abc import Mapping

import pytest

from shards.errors import ConfigError
from shards.part import Part, choose_part


@pytest.mark.parametrize(("total", "count"), [(0, 3), (2, 5), (10, 3), (97, 8), (8, 8)])
def test_parts_cover_every_shard_once(total: int, count: int) -> None:
    ranges = [Part(number, count).shards(total) for number in range(1, count + 1)]
    assert [shard for part in ranges for shard in part] == list(range(total))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, "1/1"),
        ("3/7", ARRAY, "3/7"),
        ("all", ARRAY, "1/1"),
        (None, ARRAY, "3/4"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_STEP": "10", "SLURM_ARRAY_TASK_ID": "25", "SLURM_ARRAY_TASK_MAX": "35"}, "3/4"),
        (None, {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, "3/4"),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "1/1"),  # a batch script: one process whatever it has reserved
        (None, {**ARRAY, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "6/8"),
    ],
)
def test_which_part(text: str | None, environment: Mapping[str, str], expected: str) -> None:
    assert str(choose_part(text, environment)) == expected


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "", "1/0", "-1/4"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`part` must be i/n with i from 1 to n, such as 1/4 to 4/4, or `all`; got '"):
        choose_part(text, {})


@pytest.mark.parametrize("changed", [{"SLURM_ARRAY_TASK_ID": "9"}, {"SLURM_ARRAY_TASK_MAX": "20"}, {"SLURM_ARRAY_TASK_ID": "1"}])
def test_an_uneven_array(changed: Mapping[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"The 4 tasks of this SLURM array are not numbered evenly from 5 on: .* Submit the array as 0-N"):
        choose_part(None, {**ARRAY, **changed})
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID is set without SLURM_ARRAY_TASK_COUNT"):
        choose_part(None, {"SLURM_ARRAY_TASK_ID": "1"})
