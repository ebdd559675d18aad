"""The same losses whatever the ZeRO stage, the number of ranks and the accumulation are: fp32, the same global batch, 20 steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import STAGE, losses, run_grid, write_stage

STEPS = 20
TOLERANCE = 1e-5


def variants(ranks: int, stages: tuple[int, ...], accumulations: tuple[int, ...]) -> list[str]:
    """One line a variant for `grid.py`: name and words."""
    lines = []
    for stage in stages:
        for accumulation in accumulations:
            micro = 16 // (ranks * accumulation)
            lines.append(f"zero{stage}-ranks{ranks}-acc{accumulation} zero.stage={stage} train.micro_batch={micro}")
    return lines


def difference(results: Path, name: str, other: str) -> float:
    """Largest relative difference of any loss of any step."""
    worst = 0.0
    pairs = zip(losses(results / name), losses(results / other), strict=True)
    for (step, mine), (same_step, theirs) in pairs:
        assert step == same_step
        for key in mine:
            if key != "grad_norm":
                worst = max(worst, abs(mine[key] - theirs[key]) / max(1.0, abs(mine[key])))
    return worst


def stage_file(tmp_path: Path, glyphs: Path, extra: tuple[str, ...]) -> Path:
    text = STAGE.replace("dropout: 0.1", "dropout: 0.0").replace("steps: 12", f"steps: {STEPS}")
    for name in extra:
        text = text.replace(f"{name}: {{weight: 1", f"{name}: {{group: 2, weight: 1")
    return write_stage(tmp_path, glyphs, text)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_the_topology(tmp_path: Path, glyphs: Path, full: bool) -> None:
    """With negatives from groups of two positions every objective is independent of how the batch is divided."""
    stage = stage_file(tmp_path, glyphs, ("contrastive", "matching"))
    lines = {
        1: variants(1, (0, 1, 2, 3), (1, 2, 4)) if full else variants(1, (0,), (1, 4)),
        2: variants(2, (0, 1, 2, 3), (1, 2, 4)) if full else [*variants(2, (1, 3), (1,)), *variants(2, (2, 3), (4,))],
    }
    for ranks, chosen in lines.items():
        run_grid(ranks, stage, tmp_path / "runs", chosen)
    names = [line.split()[0] for chosen in lines.values() for line in chosen]
    differences = {name: difference(tmp_path / "runs", names[0], name) for name in names[1:]}
    assert max(differences.values()) < TOLERANCE, differences
    first, last = losses(tmp_path / "runs" / names[0])[0][1]["loss"], losses(tmp_path / "runs" / names[0])[-1][1]["loss"]
    assert last < first - 1  # it does train


@pytest.mark.slow
def test_negatives_of_the_global_batch_make_the_contrastive_loss_independent_of_the_topology(tmp_path: Path, glyphs: Path) -> None:
    stage = stage_file(tmp_path, glyphs, ("matching",))
    stage.write_text(stage.read_text().replace("contrastive: {", "contrastive: {negatives: global, "))
    lines = {1: variants(1, (0,), (1, 4)), 2: [*variants(2, (1,), (2,)), *variants(2, (3,), (4,))]}
    for ranks, chosen in lines.items():
        run_grid(ranks, stage, tmp_path / "runs", chosen)
    names = [line.split()[0] for chosen in lines.values() for line in chosen]
    differences = {name: difference(tmp_path / "runs", names[0], name) for name in names[1:]}
    assert max(differences.values()) < TOLERANCE, differences
    log = (tmp_path / "runs" / names[1] / "logs" / "rank-0.log").read_text()
    assert "negatives   contrastive, from all 16 samples of a step, by one more forward of the lower layers" in log


@pytest.mark.slow
def test_what_depends_on_the_topology_is_what_the_documentation_says(tmp_path: Path, glyphs: Path) -> None:
    """Without groups: contrastive negatives come from micro_batch x ranks samples, matching negatives from micro_batch samples."""
    stage = stage_file(tmp_path, glyphs, ())
    run_grid(1, stage, tmp_path / "runs", variants(1, (0,), (1, 2)))
    run_grid(2, stage, tmp_path / "runs", variants(2, (0,), (1,)))
    first = {name: losses(tmp_path / "runs" / name)[0][1] for name in ("zero0-ranks1-acc1", "zero0-ranks1-acc2", "zero0-ranks2-acc1")}
    whole, halves, ranks = first.values()
    for same in ("loss/masked_language", "loss/captioning", "loss/masked_image"):
        assert halves[same] == pytest.approx(whole[same], abs=TOLERANCE)
        assert ranks[same] == pytest.approx(whole[same], abs=TOLERANCE)
    assert ranks["loss/contrastive"] == pytest.approx(whole["loss/contrastive"], abs=TOLERANCE)
    assert abs(halves["loss/contrastive"] - whole["loss/contrastive"]) > 1e-3
    assert abs(ranks["loss/matching"] - whole["loss/matching"]) > 1e-6
