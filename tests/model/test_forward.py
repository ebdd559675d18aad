"""The forward: gradients for every parameter whatever the batch holds, and packed equal to one by one."""

from __future__ import annotations

import pytest
import torch

from mmscale.model import MMScaleModel
from mmscale.model.sequences import Wanted
from tests.model.tiny import Row, all_objectives, make_batch, random_rows, tiny_model

MIXES = {
    "pairs": random_rows(4),
    "image-only": [Row(caption=None, text=None, label=1)] * 3,
    "text-only": [Row(image=False, label=2), Row(image=False, text=(5,), caption=(6, 7))],
    "caption-only": [Row(image=False, text=None, label=0)] * 2,
    "nothing": [Row(image=False, caption=None, text=None)] * 2,
    "no samples": [],
    "mixed": [*random_rows(3), Row(caption=None, text=None), Row(image=False), Row(caption=None), Row(False, None, None)],
}


def total(model: MMScaleModel, batch, objectives) -> torch.Tensor:
    return sum(term.sum for term in model(batch, objectives).values())


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("target", "pooling"), [("pixels", "first"), ("features", "concat")])
def test_every_parameter_gets_a_finite_gradient_whatever_the_batch_holds(mix: str, target: str, pooling: str) -> None:
    model = tiny_model(dropout=0.1, head_pooling=pooling)
    terms = model(make_batch(MIXES[mix]), all_objectives(target=target))
    for term in terms.values():
        assert term.sum.dtype == torch.float32
        assert term.sum.shape == ()
        assert term.sum.requires_grad
    sum(term.sum for term in terms.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("layers", [(0, 2), (2, 0), (1, 1)])
def test_each_single_objective_reaches_every_parameter_of_every_layout(layers: tuple[int, int]) -> None:
    for objective in all_objectives():
        model = tiny_model(unimodal_layers=layers[0], fusion_layers=layers[1])
        total(model, make_batch(MIXES["mixed"]), [objective]).backward()
        assert all(p.grad is not None for p in model.parameters()), objective.name


@pytest.mark.parametrize("pooling", ["first", "concat"])
@pytest.mark.parametrize("layers", [(0, 2), (2, 0), (2, 2)])
def test_packed_equals_one_by_one_in_values_and_gradients(layers: tuple[int, int], pooling: str) -> None:
    rows = [*random_rows(5), Row(caption=None, text=None, label=1), Row(image=False, label=0), Row(caption=None, label=2)]
    alone = [o for o in all_objectives() if o.name not in ("contrastive", "matching")]
    packed, single = (tiny_model(unimodal_layers=layers[0], fusion_layers=layers[1], head_pooling=pooling) for _ in range(2))
    terms = packed(make_batch(rows), alone)
    sum(t.sum for t in terms.values()).backward()
    sums = dict.fromkeys(terms, 0.0)
    for i, row in enumerate(rows):
        one = single(make_batch([row], first=i), alone)
        sum(t.sum for t in one.values()).backward()
        sums = {name: sums[name] + one[name].sum.item() for name in sums}
    for name, value in sums.items():
        assert terms[name].sum.item() == pytest.approx(value, rel=1e-5), name
    for (name, a), b in zip(packed.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_head_of_all_tokens_by_hand() -> None:
    """First, mean and largest of normed states; of a caption alone its end thrice; without fusion layers a head reads the lower ones."""
    rows = [Row(False, caption=None, text=(5, 6, 7, 8)), Row(caption=None, text=None), Row(False, caption=(5, 6), text=None)]
    model, batch = tiny_model(fusion_layers=0, head_pooling="concat").eval(), make_batch(rows, mask_images=False)
    with torch.no_grad():
        logits_MC, lower = model.classify(batch), model.lower(batch, model.lay_out(batch))
        head = model.task_heads["label"]
        texts_UD = lower.text_UD[len(batch.caption.ids_T) :]
        for row, states_LD in ((0, texts_UD), (1, lower.parts[0])):
            normed_LD = torch.nn.functional.layer_norm(states_LD, (32,), eps=model.config.layer_norm_eps)
            expected = head(torch.cat([normed_LD[0], normed_LD.mean(0), normed_LD.amax(0)])[None])[0]
            torch.testing.assert_close(logits_MC[row], expected, rtol=1e-5, atol=1e-5)
        end = torch.nn.functional.layer_norm(lower.caption_SD, (32,), eps=model.config.layer_norm_eps)
        torch.testing.assert_close(logits_MC[2], head(end.repeat(1, 3))[0], rtol=1e-5, atol=1e-5)


def test_embeddings_packed_equal_one_by_one() -> None:
    model, rows = tiny_model().eval(), random_rows(5)
    batch = make_batch(rows)
    images, captions = model.embed_images(batch), model.embed_captions(batch)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(5))
    for i, row in enumerate(rows):
        one = make_batch([row], first=i)
        torch.testing.assert_close(images[i], model.embed_images(one)[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(captions[i], model.embed_captions(one)[0], rtol=1e-5, atol=1e-5)


def test_embedding_api_gives_what_training_sees() -> None:
    model, batch = tiny_model().eval(), make_batch(random_rows(4))
    state = model.run(batch, Wanted(contrastive=True))
    torch.testing.assert_close(state.image_embedding_NE, model.embed_images(batch))
    torch.testing.assert_close(state.caption_embedding_SE, model.embed_captions(batch))


def caption_losses(model: MMScaleModel, caption: tuple[int, ...], image: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = make_batch([Row(caption=caption, text=None)], first=image)
    state = model.run(batch, Wanted(captioning=True))
    return state.caption_loss_R, state.image_embedding_NE


def test_caption_stream_is_causal_and_sees_its_image() -> None:
    model = tiny_model().eval()
    before, _ = caption_losses(model, (10, 11, 12, 13, 14), image=0)
    after, _ = caption_losses(model, (10, 11, 12, 30, 31), image=0)
    torch.testing.assert_close(before[:3], after[:3], rtol=0, atol=0)
    assert not torch.allclose(before[3:], after[3:])
    other_image, _ = caption_losses(model, (10, 11, 12, 13, 14), image=7)
    assert (before != other_image).all()


def test_the_image_of_a_caption_sequence_sees_no_text() -> None:
    model = tiny_model(fusion_layers=3).eval()
    seen: list[torch.Tensor] = []
    hook = model.fusion_layers[1].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    caption_losses(model, (10, 11, 12), image=0)
    caption_losses(model, (20, 21, 22), image=0)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-6)


def test_bidirectional_text_sees_all_of_its_sample_and_nothing_else() -> None:
    model = tiny_model().eval()
    rows = random_rows(3)
    first = model.classify(make_batch(rows))
    rows[1] = Row(text=(30, 31), caption=rows[1].caption)
    second = model.classify(make_batch(rows))
    assert first.shape == (3, 3)
    torch.testing.assert_close(first[[0, 2]], second[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[1], second[1])


def test_every_module_runs_once_whatever_the_batch_holds() -> None:
    model, calls = tiny_model(), []
    owners = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(recurse=False))]
    for name in owners:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    orders = []
    for mix in MIXES.values():
        model(make_batch(mix), all_objectives())
        orders.append(list(calls))
        calls.clear()
    assert sorted(orders[0]) == sorted(owners)
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("pooling", ["first", "concat"])
@pytest.mark.parametrize("mix", ["mixed", "nothing"])
def test_half_precision_weights_give_fp32_terms_near_the_full_ones(mix: str, pooling: str) -> None:
    batch, objectives = make_batch(MIXES[mix]), all_objectives()
    full, half = (tiny_model(spread=0.05, head_pooling=pooling).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    expected, got = full(batch, objectives), half(batch, objectives)
    for name, term in got.items():
        assert term.sum.dtype == torch.float32
        torch.testing.assert_close(term.sum, expected[name].sum, rtol=0.05, atol=0.05, msg=lambda m, name=name: f"{name}: {m}")
    total(half, batch, objectives).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
