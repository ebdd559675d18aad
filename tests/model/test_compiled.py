"""Compiled layers: the same numbers, the same names, and nothing compiled again for ragged batches."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from mmscale.config import RunConfig, TrainConfig, ZeroConfig, _check_compile
from mmscale.model.compiled import compile_experts
from mmscale.model_config import ModelConfig
from shards.errors import ConfigError
from tests.model.streams import NATIVE, stream_batch
from tests.model.test_forward import MIXES, total
from tests.model.tiny import Row, all_objectives, make_batch, random_rows, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says to itself while it traces
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def mixed_rows(step: int) -> list[Row]:
    """Rows of random lengths; now and then without images, without texts, or of one sample."""
    rows = random_rows(1 + step % 7, seed=step, longest=4 + step % 16)
    if step % 5 == 3:
        rows = [Row(image=False, caption=r.caption, text=r.text) for r in rows]
    if step % 5 == 4:
        rows = [*rows, Row(caption=None, text=None)]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_compiled_after_the_third_of_two_hundred_ragged_batches(backend: str) -> None:
    model, objectives = tiny_model(unimodal_layers=1, fusion_layers=1), all_objectives()
    assert compile_experts(model, backend) == 4
    graphs = []
    for step in range(200):
        total(model, make_batch(mixed_rows(step)), objectives).backward()
        model.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] >= 2
    assert graphs[-1] == graphs[2]
    assert not counters["graph_break"]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients_are_those_of_the_plain_model(backend: str, recompute: str) -> None:
    plain, compiled = tiny_model(), tiny_model(activation_checkpointing=recompute)
    compile_experts(compiled, backend)
    for mix in ("pairs", "mixed", "nothing"):
        losses = []
        for model in (plain, compiled):
            loss = total(model, make_batch(MIXES[mix]), all_objectives())
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_items_of_every_modality_go_through_the_same_graphs(backend: str) -> None:
    plain, compiled = (tiny_model(modalities=NATIVE, positions="rotary") for _ in range(2))
    assert compile_experts(compiled, backend) == 12  # images, sound and text, in four layers
    graphs = []
    for first in (0, 8, 16):
        losses = [total(model, stream_batch(model, first=first), all_objectives()) for model in (plain, compiled)]
        torch.stack(losses).sum().backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[0]
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_the_names_of_weights_stay() -> None:
    model = tiny_model()
    before = list(model.state_dict())
    compile_experts(model, "aot_eager")
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunConfig(train=TrainConfig(compile=True), zero=ZeroConfig(stage=3)), "`train.compile` does not go with zero.stage = 3"),
        (
            RunConfig(train=TrainConfig(compile=True), model=ModelConfig(activation_checkpointing="selective")),
            "model.activation_checkpointing = selective does not go with it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(config: RunConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _check_compile(config)
    assert message in str(caught.value)
