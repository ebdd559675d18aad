"""Hard negatives: who may be one, who is drawn, that nothing is encoded again, and independence of the micro-batch."""

from __future__ import annotations

import pytest
import torch

from mmscale.model.pairs import draw_negatives, negative_candidates
from mmscale.model.sequences import Wanted
from mmscale.objectives.matching import Matching
from shards.errors import ConfigError
from tests.model.tiny import Row, all_objectives, make_batch, random_rows, tiny_model

ROWS = [*random_rows(6), Row(caption=None, text=None), Row(image=False)]


def test_candidates_are_other_pairs_of_the_group_with_another_text() -> None:
    five, six, seven = (Row(caption=(w,), text=(w,)) for w in (5, 6, 7))
    rows = [Row(), Row(), five, Row(caption=None, text=None), six, seven]
    allowed = negative_candidates(make_batch(rows), None)
    assert allowed[0].tolist() == [False, False, True, False, True, True]
    assert not allowed[3].any()
    grouped = negative_candidates(make_batch(rows, first=4, group=4), 4)
    assert grouped[0].tolist() == [False, False, True, False, False, False]
    assert grouped[4].tolist() == [False, False, False, False, False, True]


def test_a_text_that_is_read_twice_is_no_negative_whatever_the_captions() -> None:
    rows = [Row(caption=(i,), text=(20, 21)) for i in (5, 6, 7)] + [Row(caption=(8,), text=(20, 22))]
    assert negative_candidates(make_batch(rows), None).tolist() == [[False, False, False, True]] * 3 + [[True, True, True, False]]


def test_the_masked_text_is_recognised_when_there_is_no_caption() -> None:
    rows = [Row(caption=None, text=(10, 11, 12)), Row(caption=None, text=(10, 11, 12)), Row(caption=None, text=(10, 11, 13))]
    batch = make_batch(rows)
    assert not torch.equal(batch.text.ids_T[:5], batch.text.ids_T[5:10])  # other places are masked
    assert negative_candidates(batch, None).tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_negatives_follow_the_similarity_and_alternate_between_text_and_image() -> None:
    batch = make_batch(random_rows(4))
    similarity = torch.zeros(4, 4)
    similarity[0, 2] = similarity[3, 1] = 1000.0
    image_rows, text_rows, anchors = draw_negatives(batch, similarity, None)
    assert anchors.tolist() == [0, 1, 2, 3]
    assert (image_rows[0].item(), text_rows[0].item()) == (0, 2)  # even: a hard text for its image
    assert (image_rows[1].item(), text_rows[1].item()) == (3, 1)  # odd: a hard image for its text
    assert all(i != t for i, t in zip(image_rows.tolist(), text_rows.tolist(), strict=True))


def test_draws_are_distributed_as_the_softmax_of_the_similarity() -> None:
    torch.manual_seed(0)
    batch, hits = make_batch(random_rows(4)), torch.zeros(4)
    similarity = torch.tensor([0.0, 1.0, 2.0, 0.0]).expand(4, 4)
    for _ in range(2000):
        batch.gumbel_MG = -torch.rand(4, 4).log().neg().log()
        hits[draw_negatives(batch, similarity, None)[1][0]] += 1
    expected = torch.tensor([float("-inf"), 1.0, 2.0, 0.0]).softmax(0)
    torch.testing.assert_close(hits / 2000, expected, atol=0.04, rtol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_with_a_group_micro_batches_change_nothing(parts: int) -> None:
    objective, group = Matching(weight=1.0, group=2), 2
    whole = tiny_model()
    batch = make_batch(ROWS, group=group)
    term = whole(batch, [objective])["matching"]
    term.sum.backward()
    split, total, count = tiny_model(), 0.0, 0.0
    size = len(ROWS) // parts
    for i in range(parts):
        part = make_batch(ROWS[i * size : (i + 1) * size], first=i * size, group=group)
        one = split(part, [objective])["matching"]
        one.sum.backward()
        total, count = total + one.sum.item(), count + objective.count(part)
    assert total == pytest.approx(term.sum.item(), rel=1e-5)
    assert count == objective.count(batch) == term.logs["matching_accuracy"][1].item()
    for (name, a), b in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_hard_negatives_are_lower_states_used_again_not_encoded_again() -> None:
    model, batch, encoded = tiny_model(), make_batch(ROWS), []
    for name in ("image_embedding", "text_embedding"):
        getattr(model, name).register_forward_hook(lambda module, args, out: encoded.append(len(out)))
    for layer in (*model.image_layers, *model.text_layers):
        layer.register_forward_hook(lambda module, args, out: encoded.append(len(out)))
    fused: list[int] = []
    model.fusion_layers[0].register_forward_hook(lambda module, args, out: fused.append(len(args[0][0])))
    model(batch, [o for o in all_objectives(task=False) if o.name == "matching"])
    images, tokens = len(batch.image_rows_N), len(batch.caption.ids_T) + len(batch.text.ids_T)
    assert sorted(encoded) == sorted([images, tokens] + [images * 5] * 2 + [tokens] * 2)
    assert fused == [(6 + 6) * 5]  # six pairs and six negatives


def test_a_negative_is_what_encoding_the_wrong_pair_would_give() -> None:
    model, rows = tiny_model().eval(), random_rows(4)
    batch = make_batch(rows)
    percepts = model.lay_out(batch)
    lower = model.lower(batch, percepts)
    image_rows, text_rows = model._negatives(batch, Wanted(matching=True), lower, percepts)
    logits = model.run(batch, Wanted(matching=True)).match_logits_R
    for k in range(4):
        i, t = int(image_rows[k]), int(text_rows[k])
        wrong = make_batch([rows[t]], first=t)
        wrong.pixels_NCHW = batch.pixels_NCHW[i : i + 1]
        torch.testing.assert_close(model.match_logits(wrong)[0], logits[4 + k], rtol=1e-4, atol=1e-5)


def test_match_logits_of_pairs_are_those_of_training() -> None:
    model, batch = tiny_model().eval(), make_batch(random_rows(4))
    torch.testing.assert_close(model.match_logits(batch), model.run(batch, Wanted(matching=True)).match_logits_R[:4])


def test_a_group_that_crosses_micro_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`objectives.matching.group` must divide the micro-batch of 4 samples.*got 8"):
        Matching(weight=1.0, group=8).check(micro_batch=4, ranks=2)
