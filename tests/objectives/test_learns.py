"""The core of benchmarks/learns.py at a small size: objectives learn what their controls cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.learns import OBJECTIVES, compare, draw, experiment, plan, stage_config, write_glyphs

STEPS = 120


@pytest.mark.slow
def test_held_out_losses_beat_an_untrained_model_and_the_control(tmp_path: Path) -> None:
    write_glyphs(tmp_path, 16)
    stage_config(tmp_path, OBJECTIVES, 1, 64)
    names = ("contrastive", "masked_image")
    settings = [(names, False, 0), (names, False, STEPS), (names[:1], True, STEPS)]
    untrained, trained, control = (experiment(tmp_path, *case, 64, 200) for case in settings)
    for name, floor in (("contrastive", control["losses"]["contrastive"]), ("masked_image", trained["losses"]["constant"])):
        assert trained["losses"][name] < 0.95 * min(untrained["losses"][name], floor), name
    assert trained["text_to_image_r1"] > 3 * max(untrained["text_to_image_r1"], control["text_to_image_r1"], 1 / 200)


def test_rows_and_picture(tmp_path: Path) -> None:
    results = []
    for objectives, control, steps in plan(9):
        loss = 3.0 if not steps else 2.0 if control else 1.0
        scores = dict.fromkeys(("image_to_text_r1", "text_to_image_r1", "exact_match"), 0.5)
        losses = dict.fromkeys(objectives, loss) | ({"constant": 0.9} if "masked_image" in objectives else {})
        results.append({"objectives": list(objectives), "control": control, "steps": steps, "losses": losses} | scores)
    rows = compare(results)
    assert [r["objective"] for r in rows] == list(OBJECTIVES)
    assert [r["won"] for r in rows] == [True] * 4 + [False]  # the best constant is better than masked image here
    draw(rows, results, tmp_path / "learns.png")
    assert (tmp_path / "learns.png").stat().st_size > 5000
