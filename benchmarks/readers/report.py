"""What the read benchmark makes of its runs: medians, ranks, JSON, a table, a chart."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import statistics
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

NUMBERS = ("cpu_ms", "cpu_ms_with_start", "samples_per_s", "first_batch_s", "import_s", "start_s", "memory_mb")


def environment(rank: int, size: int) -> dict[str, str]:
    """Return the variables that a launcher would set, and one thread for every numeric library."""
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0, "NODE_RANK": 0}
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return dict(os.environ) | fixed | {name: str(value) for name, value in ranks.items()}


def medians(reader: str, workers: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a reader's epochs."""
    failed = next((run for run in runs if "error" in run), None)
    if failed:
        return {"reader": reader, "workers": workers, "error": failed["error"]}
    found: dict[str, Any] = {"reader": reader, "workers": workers, "samples": runs[0]["samples"]}
    found |= {name: statistics.median(run[name] for run in runs) for name in NUMBERS}
    return found | {"cpu_ms_runs": [round(run["cpu_ms"], 4) for run in runs]}


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by workers, then by CPU time, and add each reader's share of the limit with as many workers."""
    limits = {row["workers"]: row for row in rows if row["reader"] == "limit" and "error" not in row}
    for row in rows:
        if "error" not in row and row["workers"] in limits:
            limit = limits[row["workers"]]
            row["cpu_share_of_limit"] = limit["cpu_ms"] / row["cpu_ms"]
            row["rate_share_of_limit"] = row["samples_per_s"] / limit["samples_per_s"]
    return sorted(rows, key=lambda row: (row["workers"], row.get("cpu_ms", float("inf"))))


def table(rows: list[dict[str, Any]]) -> str:
    """Format the results of one data set as a Markdown table."""
    lines = [
        "| reader | workers | CPU ms a sample | with start | of the limit, CPU / rate | samples/s | first batch s | + imports s | PSS MB "
        "| shards in 64 / 1,000 | resume s | repeated / lost | on 2 ranks x 1 worker |",
        "|" + "---|" * 13,
    ]
    return "\n".join(lines + [_line(row) for row in rows]) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['reader']} | {row['workers']} | failed: {row['error']} |" + " |" * 10
    cells = [row["reader"], row["workers"], f"{row['cpu_ms']:.3f}", f"{row['cpu_ms_with_start']:.3f}"]
    cells += [f"{row.get('cpu_share_of_limit', 0):.0%} / {row.get('rate_share_of_limit', 0):.0%}", f"{row['samples_per_s']:,.0f}"]
    cells += [f"{row['first_batch_s']:.2f}", f"{row['start_s']:.2f}", f"{row['memory_mb']:.0f}"]
    spread, resume, other = (row.get(name, {}) for name in ("spread", "resume", "resume_other"))
    cells += [f"{spread['shards_in_64']} / {spread['shards_in_1000']}" if "shards_in_64" in spread else ""]
    cells += [f"{resume['first_batch_s']:.2f}" if resume.get("first_batch_s") is not None else "", _twice(resume), _twice(other)]
    return "| " + " | ".join(map(str, cells)) + " |"


def _twice(resume: dict[str, Any]) -> str:
    if "repeated" in resume:
        return f"{resume['repeated']} / {resume['lost']}"
    return "refused" if "refused" in resume else resume.get("error", "")


def chart(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the CPU time a sample of every reader, a panel a data set."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6.5 * len(results), 5), layout="constrained", squeeze=False)
    for axis, (kind, rows) in zip(axes[0], results.items(), strict=True):
        sound = [row for row in rows if "error" not in row][::-1]
        colours = ["#888888" if r["reader"] == "limit" else "#d95f02" if r["reader"].startswith("mmscale") else "#7fa8d1" for r in sound]
        bars = axis.barh([f"{r['reader']}, {r['workers']} workers" for r in sound], [r["cpu_ms"] for r in sound], color=colours)
        axis.bar_label(bars, fmt="%.3f", padding=3)
        axis.set(title=f"JPEG {kind}", xlabel="CPU milliseconds a sample, all processes")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def settings(readers: list[str]) -> dict[str, str]:
    """Return what each reader's file says of its settings, without importing the reader."""
    folder = Path(__file__).parent
    found = {reader: re.search(r'^SETTINGS = "(.*)"', (folder / f"{reader}.py").read_text(), re.MULTILINE) for reader in readers}
    return {reader: match[1] for reader, match in found.items() if match}


def write(out: Path, results: dict[str, list[dict[str, Any]]], versions: dict[str, str], **words: Any) -> None:
    """Write the JSON, and beside it the table (.md) and the chart (.png); print the table."""
    readers = sorted({row["reader"] for rows in results.values() for row in rows})
    ours = {name: version(name) for name in ("mmscale", "simplejpeg", "numpy", "pillow")}
    whole = {
        "benchmark": "read",
        "what": "one epoch, batches of 64 uint8 224 x 224, shuffled; medians of the rounds; CPU time of all processes",
        **words,
        "settings": settings(readers),
        "results": results,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions | ours | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=1) + "\n")
    text = "\n".join(f"## JPEG {kind}\n\n{table(rows)}" for kind, rows in results.items())
    out.with_suffix(".md").write_text(text)
    chart(results, out.with_suffix(".png"))
    print(text)


def cpu_name() -> str:
    """Name of the processor, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
