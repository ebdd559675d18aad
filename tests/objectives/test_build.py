"""Objectives from the configuration, what they count, and that counts are those of the forward."""

from __future__ import annotations

import pytest
import torch

from mmscale.config import RunConfig
from mmscale.objectives import build_objectives
from mmscale.objectives.classify import Classify
from mmscale.objectives_config import ObjectiveConfig, ObjectivesConfig, TaskConfig
from tests.model.tiny import Row, all_objectives, make_batch, random_rows, tiny_model

ROWS = [*random_rows(5), Row(caption=None, text=None, label=1), Row(image=False), Row(caption=None), Row(False, None, None)]


def test_objectives_of_positive_weight_in_a_fixed_order() -> None:
    on = ObjectiveConfig(weight=0.5, group=4)
    config = RunConfig(
        run="r", objectives=ObjectivesConfig(captioning=on, contrastive=on, matching=on), task=TaskConfig(name="vqa", weight=2.0)
    )
    built = build_objectives(config)
    assert [(o.name, o.weight) for o in built] == [("contrastive", 0.5), ("matching", 0.5), ("captioning", 0.5), ("classify", 2.0)]
    assert built[0].group == built[1].group == 4


@pytest.mark.parametrize(("task", "name"), [("retrieval", "contrastive"), ("captioning", "captioning"), ("classification", "classify")])
def test_a_task_brings_its_objective_or_adds_to_its_weight(task: str, name: str) -> None:
    alone = build_objectives(RunConfig(run="r", task=TaskConfig(name=task, weight=2.0)))
    assert [(o.name, o.weight) for o in alone] == [(name, 2.0)]
    on = ObjectiveConfig(weight=0.5)
    both = RunConfig(run="r", objectives=ObjectivesConfig(contrastive=on, captioning=on), task=TaskConfig(name=task))
    assert {o.name: o.weight for o in build_objectives(both)} == {"contrastive": 0.5, "captioning": 0.5} | {
        name: 1.0 if name == "classify" else 1.5
    }


def test_counts_from_the_batch_are_the_items_of_the_forward() -> None:
    batch, objectives = make_batch(ROWS), all_objectives()
    terms = tiny_model()(batch, objectives)
    counts = {o.name: o.count(batch) for o in objectives}
    assert counts.pop("masked_image") == batch.patch_mask_NP.sum()
    counts["accuracy"] = counts.pop("classify")
    logged = {name.removesuffix("_accuracy"): pair[1].item() for term in terms.values() for name, pair in term.logs.items()}
    assert counts == logged
    assert all(0 <= pair[0] <= pair[1] for term in terms.values() for pair in term.logs.values())


def test_every_objective_can_be_learned() -> None:
    batch, objectives = make_batch(random_rows(6)), all_objectives()
    model = tiny_model(spread=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        terms = model(batch, objectives)
        losses.append({o.name: terms[o.name].sum.item() / o.count(batch) for o in objectives})
        optimizer.zero_grad()
        torch.stack([terms[o.name].sum / o.count(batch) for o in objectives]).sum().backward()
        optimizer.step()
    for name, last in losses[-1].items():
        assert last < 0.6 * losses[0][name], (name, losses[0][name], last)


def test_the_label_head_reads_the_text_else_the_image_else_the_caption() -> None:
    model = tiny_model().eval()
    rows = [Row(), Row(caption=None, text=None), Row(image=False, text=None)]
    logits = model.classify(make_batch(rows))
    for i, row in enumerate(rows):
        torch.testing.assert_close(model.classify(make_batch([row], first=i))[0], logits[i], rtol=1e-4, atol=1e-5)
    changed = model.classify(make_batch([Row(caption=(9,)), Row(caption=(9,), text=None), Row(image=False, text=None, caption=(9,))]))
    torch.testing.assert_close(changed[:2], logits[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed[2], logits[2])


def test_label_smoothing_is_that_of_torch() -> None:
    model, batch = tiny_model().eval(), make_batch(random_rows(4))
    term = model(batch, [Classify(weight=1.0, label_smoothing=0.1)])["classify"]
    expected = torch.nn.functional.cross_entropy(model.classify(batch), batch.targets["label"], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(term.sum, expected)
