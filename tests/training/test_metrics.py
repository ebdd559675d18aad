"""What a line of metrics.jsonl says about reading."""

from pathlib import Path

from tests.training.runs import records


def test_a_line_says_what_reading_took(tiny_run: Path) -> None:
    lines = records(tiny_run / "metrics.jsonl")
    assert all(line["decode_ms"] > 0 and line["read_ms"] > 0 and line["bytes_per_s"] > 0 for line in lines)
    assert all(isinstance(line["batches_ready"], int) and 0 <= line["batches_ready"] <= 4 for line in lines)
    assert all(0 <= line["data_wait_s"] <= line["step_s"] for line in lines)
    assert lines[0]["step"] == 1
    assert lines[0]["data_wait_s"] == 0  # the first batch was waited for before the clock of the first step started
    assert not any(name.startswith("store/") for line in lines for name in line)  # a local folder asks nobody
