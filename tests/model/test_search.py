"""How tokens are chosen: prompts of any lengths, drawing, given texts; on one device and under ZeRO 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.model import MMScaleModel
from mmscale.model.generate import generate
from mmscale.model.search import Prompts, Sampling, Trie, search
from shards.errors import ConfigError
from tests.model.tiny import END, VOCAB, Row, make_batch, random_rows, tiny_model
from tests.objectives.ranks import run_ranks

PROMPTS = [[5, 6, 7], [], [9], [5, 6, 7, 8, 9, 10]]
TEXTS = [[5, 6, END], [5, END], [7, 8, 9, END], [10, END]]


def spread_model(**settings: Any) -> MMScaleModel:
    """Weights spread so widely that samples get different texts."""
    model = tiny_model(**settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def one_by_one(model: MMScaleModel, rows: list[Row], prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """Each sample in a batch of its own, at its own position."""
    alone = [make_batch([row], first=i) for i, row in enumerate(rows)]
    return [generate(model, batch, prompts=[prompt], **settings)[0] for batch, prompt in zip(alone, prompts, strict=True)]


@pytest.mark.parametrize("settings", [{"beams": 1}, {"beams": 3}, {"sampling": Sampling(temperature=2.0, seed=3)}])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_ragged_prompts_in_one_batch_equal_one_by_one(settings: dict[str, Any], positions: str) -> None:
    model, rows = spread_model(positions=positions), random_rows(4)
    together = generate(model, make_batch(rows), max_new_tokens=6, prompts=PROMPTS, **settings)
    assert together == one_by_one(model, rows, PROMPTS, max_new_tokens=6, **settings)
    assert all(len(ids) <= 6 for ids in together)
    assert len({tuple(ids) for ids in together}) > 1


def test_a_prompt_of_what_would_be_written_goes_on_as_it_would() -> None:
    model, batch = spread_model(), make_batch(random_rows(3))
    whole = generate(model, batch, max_new_tokens=8)
    started = [ids[: len(ids) // 2] for ids in whole]
    rest = generate(model, batch, max_new_tokens=8, prompts=started)
    longest = [ids[len(start) :][:8] for ids, start in zip(whole, started, strict=True)]
    assert [ids[: len(expected)] for ids, expected in zip(rest, longest, strict=True)] == longest
    assert any(started)


def test_drawing_from_one_token_is_greedy() -> None:
    model, batch = spread_model(), make_batch(random_rows(4))
    greedy = generate(model, batch, max_new_tokens=6)
    assert generate(model, batch, max_new_tokens=6, sampling=Sampling(top_k=1, temperature=5.0)) == greedy
    assert generate(model, batch, max_new_tokens=6, sampling=Sampling(top_p=1e-6, temperature=5.0)) == greedy
    drawn = [generate(model, batch, max_new_tokens=6, sampling=Sampling(seed=seed, temperature=2.0)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities, count = torch.tensor([0.5, 0.3, 0.15, 0.05]), 20000
    logits = probabilities.log().expand(count, -1)

    def frequencies(sampling: Sampling) -> torch.Tensor:
        tokens = sampling.choose(logits, sampling.draws(torch.arange(count), 3)[:, 1])
        return torch.bincount(tokens, minlength=4) / count

    torch.testing.assert_close(frequencies(Sampling()), probabilities, atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(Sampling(top_k=2)), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(Sampling(top_p=0.79)), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    cooler = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(Sampling(temperature=0.5)), cooler, atol=0.015, rtol=0)


@pytest.mark.parametrize("settings", [{"beams": 1}, {"beams": 4}, {"beams": 7}, {"sampling": Sampling(temperature=3.0)}])
def test_only_given_texts_are_written(settings: dict[str, Any]) -> None:
    model, batch = spread_model(), make_batch(random_rows(6))
    found = generate(model, batch, max_new_tokens=1, prompts=[[4] * (i % 3) for i in range(6)], texts=Trie(TEXTS), **settings)
    assert {(*ids, END) for ids in found} <= {tuple(text) for text in TEXTS}
    if "sampling" in settings:
        assert len({tuple(ids) for ids in found}) > 1


def test_with_a_beam_a_text_the_likeliest_a_token_is_found() -> None:
    torch.manual_seed(0)
    table = torch.randn(VOCAB, VOCAB).log_softmax(-1)
    found = search(lambda ids, origin: table[ids], torch.tensor([3]), END, 4, 4, texts=Trie(TEXTS))
    scores = [sum(table[a, b] for a, b in zip([3, *text], text, strict=False)) / len(text) for text in TEXTS]
    assert [*found[0], END] == TEXTS[int(torch.stack(scores).argmax())]


def test_prompts_and_texts_must_fit() -> None:
    model, batch = tiny_model(), make_batch(random_rows(1))
    room = model.config.max_text_tokens - 1
    with pytest.raises(ConfigError, match=rf"^The longest prompt has {room} tokens and what follows needs 1; the model's"):
        generate(model, batch, max_new_tokens=1, prompts=[[5] * room])
    assert len(generate(model, batch, max_new_tokens=9, prompts=[[5] * (room - 1)])[0]) <= 1
    with pytest.raises(ConfigError, match=r"^`temperature` draws tokens, `beams` = 2 looks for the likeliest ones\."):
        generate(model, batch, max_new_tokens=1, beams=2, sampling=Sampling())


def test_prompts_of_no_length() -> None:
    prompts = Prompts.of([], torch.device("cpu"))
    assert prompts.at(0)[0].shape == (0,)


def written_under_zero_3(rank: int, ranks: int) -> list[list[list[int]]]:
    """Rank 0 has images, rank 1 has fewer or none; texts of several lengths."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for minutes
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    model = spread_model()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config)
    return list(cases(engine.module, rank).values())


def cases(model: MMScaleModel, rank: int) -> dict[str, list[list[int]]]:
    """What each rank writes."""
    rows, prompts = random_rows(4), PROMPTS
    none = make_batch([Row(image=False, caption=None, text=None)])
    batches = {"some": (make_batch(rows), prompts) if rank == 0 else (make_batch(random_rows(2, seed=5), first=4), [[4], []])}
    batches["nothing"] = (make_batch(rows), prompts) if rank == 1 else (none, [])
    found = {}
    for name, (batch, starts) in batches.items():
        for settings in ({"beams": 1}, {"beams": 3}, {"sampling": Sampling(temperature=2.0)}, {"texts": Trie(TEXTS)}):
            found[f"{name} {settings}"] = generate(model, batch, max_new_tokens=3 + 4 * rank, prompts=starts, **settings)
    return found


@pytest.mark.slow
def test_zero_3_writes_what_one_device_writes(tmp_path: Path) -> None:
    expected = [list(cases(spread_model(), rank).values()) for rank in range(2)]
    assert run_ranks(written_under_zero_3, 2, tmp_path) == expected
