"""Decoding over a cache gives what the uncached forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmscale.data.batch import IGNORE, Batch
from mmscale.model import MMScaleModel
from mmscale.model.generate import generate
from mmscale.model.search import search
from mmscale.model.sequences import Wanted, arrange, entries, readout
from shards.errors import ConfigError
from tests.model.tiny import BEGIN, END, Row, causal_stream, make_batch, random_rows, tiny_model


class UncachedDecoder:
    """Runs the whole training forward over every hypothesis for each token."""

    def __init__(self, model: MMScaleModel, batch: Batch, beams: int) -> None:
        self.model, self.batch, self.beams = model, batch, beams
        self.past: list[list[int]] = [[] for _ in range(len(batch.image_rows_N) * beams)]

    def step(self, ids_B: torch.Tensor, origin_B: torch.Tensor) -> torch.Tensor:
        self.past = [[*self.past[o], i] for i, o in zip(ids_B.tolist(), origin_B.tolist(), strict=True)]
        rows = [Row(caption=tuple(ids), text=None) for ids in self.past]
        whole = make_batch(rows, mask_images=False)
        whole.pixels_NCHW = self.batch.pixels_NCHW.repeat_interleave(self.beams, 0)
        ends = whole.caption.cu_seqlens_S1[1:].long() - 1
        keep = torch.ones(len(whole.caption.ids_T), dtype=torch.bool)
        keep[ends] = False
        keep[whole.caption.cu_seqlens_S1[:-1].long()] = False  # the words already hold the begin token
        stream = causal_stream([tuple(ids) for ids in self.past])
        stream.ids_T, stream.labels_T = whole.caption.ids_T[keep], torch.full((int(keep.sum()),), IGNORE)
        lengths = torch.tensor([0, *(len(ids) for ids in self.past)])
        stream.cu_seqlens_S1 = lengths.cumsum(0).int()
        stream.labels_T[stream.cu_seqlens_S1[1:].long() - 1] = 0
        whole.caption = stream
        return self.logits(whole).log_softmax(-1)

    def logits(self, batch: Batch) -> torch.Tensor:
        model, none, wanted = self.model, torch.zeros(0, dtype=torch.int64), Wanted(captioning=True)
        percepts = model.lay_out(batch)
        lower = model.lower(batch, percepts)
        seqs = arrange(entries(batch, wanted, (none, none), percepts), lower.text_offsets, percepts, model.config, torch.float32)
        rows = readout(seqs, batch.caption.labels_T, percepts, wanted)
        return model.language_head(model.upper(lower, percepts, seqs, rows)[1])[0]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("text", [{}, {"hidden_size": 16, "num_heads": 1, "layers": 3, "norm": "post"}])
@pytest.mark.parametrize("layers", [(2, 2), (0, 2), (2, 0)])
def test_cached_decoding_equals_the_uncached_forward(beams: int, layers: tuple[int, int], text: dict[str, Any]) -> None:
    convolution = {"convolution": beams > 1}
    model = tiny_model(unimodal_layers=layers[0], fusion_layers=layers[1], text=text | convolution, image=convolution).eval()
    batch = make_batch([*random_rows(3), Row(image=False), Row(caption=None, text=None)])
    got = generate(model, batch, max_new_tokens=8, beams=beams)
    with torch.no_grad():
        expected = search(UncachedDecoder(model, batch, beams).step, torch.full((4,), BEGIN), END, 8, beams)
    assert got == expected
    assert len(got) == 4
    assert any(len(ids) for ids in got)


def test_more_beams_find_a_likelier_caption_than_greedy() -> None:
    table = torch.log(torch.tensor([[0.0, 0.5, 0.4, 0.1], [0.4, 0.3, 0.2, 0.1], [0.01, 0.01, 0.01, 0.97], [0, 0, 0, 1.0]]))

    def step(ids: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
        return table[ids]

    assert search(step, torch.tensor([0]), end=3, longest=2, beams=1) == [[1, 0]]
    assert search(step, torch.tensor([0]), end=3, longest=2, beams=2) == [[2]]


def test_a_caption_ends_at_the_longest_length_and_no_image_gives_none() -> None:
    model = tiny_model()
    batch = make_batch(random_rows(2))
    assert all(len(ids) <= 3 for ids in generate(model, batch, max_new_tokens=3))
    assert all(len(ids) <= 23 for ids in generate(model, batch, max_new_tokens=1000))
    assert generate(model, make_batch([Row(image=False)]), max_new_tokens=3) == []
    assert model.training


def test_a_tokenizer_without_end_token_is_refused() -> None:
    model = tiny_model()
    model.config.eos_token_id = None
    with pytest.raises(ConfigError, match="no begin or no end token"):
        generate(model, make_batch(random_rows(1)), max_new_tokens=3)


def test_captions_that_see_their_future_are_not_generated() -> None:
    with pytest.raises(ConfigError, match=r"with `model\.text\.captions=bidirectional` a token sees what comes after it"):
        generate(tiny_model(text={"captions": "bidirectional"}), make_batch(random_rows(1)), max_new_tokens=3)
