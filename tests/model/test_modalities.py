"""Items of every modality: packed equals padded equals one by one, gradients everywhere, positions, cached decoding, operations."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmscale.counts import count
from mmscale.data.batch import Batch
from mmscale.flops import forward_flops
from mmscale.modalities.modality import Plane, build_modalities
from mmscale.model import MMScaleModel, attention, packed
from mmscale.model.attention import varlen_plan
from mmscale.model.embeddings import resize_positions
from mmscale.model.generate import generate
from mmscale.model.patch_stem import PatchStem
from mmscale.model.positions import rotation, stretched
from mmscale.model.search import search
from mmscale.model.sequences import Wanted
from shards.errors import ConfigError
from tests.model.checkpoints import started, vit
from tests.model.streams import GRIDS, MODALITIES, NATIVE, ROWS, WORDS, one, stream, stream_batch
from tests.model.test_attention import reference_varlen
from tests.model.test_flops import run
from tests.model.test_generate import UncachedDecoder
from tests.model.tiny import BEGIN, END, Row, all_objectives, make_batch, random_rows, tiny_config, tiny_model

SETS = {"squares": MODALITIES, "native": NATIVE}
APART = {name: {**entry, "expert": f"{name}s"} for name, entry in NATIVE.items()}
POSITIONS = ("learned", "rotary")
NARROW = {"hidden_size": 16, "num_heads": 1, "layers": 3, "norm": "post"}
TOWERS = {
    "two leading tokens beside sound": {"modalities": MODALITIES, "image": {"leading_tokens": 2, "embedding_norm": True}, "text": NARROW},
    "convolution": {"modalities": MODALITIES, "image": {"convolution": True}, "text": {"convolution": True}},
    "convolution in their own shape": {"modalities": NATIVE, "image": {"convolution": True}},
    "convolutions in patches": {"modalities": {**MODALITIES, "audio": {**MODALITIES["audio"], "stem": 2}}},
    "heads of all tokens": {"modalities": MODALITIES, "head_pooling": "concat"},
    "heads of all tokens, two experts": {"modalities": NATIVE, "head_pooling": "concat"},
    "heads of all patches": {"image": {"leading_tokens": 0, "pooling": "attention"}, "head_pooling": "concat"},
    "pooled": {"image": {"leading_tokens": 0, "pooling": "attention", "layers": 1}, "text": {"captions": "bidirectional"}},
}


def model_of(kind: str, positions: str = "learned", **changes) -> MMScaleModel:
    return tiny_model(modalities=SETS[kind], positions=positions, **changes)


def losses(model: MMScaleModel, batch: Batch, objectives) -> dict[str, torch.Tensor]:
    terms = model(batch, objectives)
    sum(t.sum for t in terms.values()).backward()
    return {name: term.sum.detach() for name, term in terms.items()}


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest number of each."""
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        assert (got[name] - value).abs().max().item() <= 1e-5 * scale, name


def gradients(model: MMScaleModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", SETS)
def test_packed_equals_one_by_one(kind: str, positions: str) -> None:
    alone = [o for o in all_objectives() if o.name not in ("contrastive", "matching")]
    whole, single = model_of(kind, positions), model_of(kind, positions)
    together = losses(whole, stream_batch(whole), alone)
    apart = dict.fromkeys(together, torch.zeros(()))
    for row in range(len(ROWS)):
        found = losses(single, stream_batch(single, *one(row), first=row), alone)
        apart = {name: apart[name] + found[name] for name in apart}
    assert all(value > 0 for value in apart.values())
    assert_near(together, apart)
    assert_near(gradients(whole), gradients(single))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("towers", TOWERS)
def test_packed_equals_one_by_one_with_towers_of_other_shapes(towers: str, positions: str) -> None:
    alone = [o for o in all_objectives(target="features") if o.name not in ("contrastive", "matching")]
    whole, single = (tiny_model(positions=positions, **TOWERS[towers]) for _ in range(2))
    together, apart = losses(whole, stream_batch(whole), alone), dict.fromkeys([o.name for o in alone], torch.zeros(()))
    embedded, rows = whole.embed_images(stream_batch(whole)), stream_batch(whole).perception_rows_N.tolist()
    for row in range(len(ROWS)):
        batch = stream_batch(single, *one(row), first=row)
        found = losses(single, batch, alone)
        apart = {name: apart[name] + found[name] for name in apart}
        if row in rows:
            torch.testing.assert_close(single.embed_images(batch)[0], embedded[rows.index(row)], rtol=1e-5, atol=1e-5)
    assert all(value > 0 for value in apart.values())
    assert_near(together, apart)
    assert_near(gradients(whole), gradients(single))


@pytest.mark.parametrize("backend", ["one padded batch", "varlen"])
@pytest.mark.parametrize("kind", SETS)
def test_packed_equals_padded(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = model_of(kind, "rotary"), model_of(kind, "rotary")
    expected = losses(ours, stream_batch(ours), all_objectives())
    if backend == "varlen":
        monkeypatch.setattr(packed, "varlen", reference_varlen)
        monkeypatch.setattr(attention, "padded_plan", lambda lengths, prefix, rows, dtype: varlen_plan(lengths, prefix, rows))
    else:
        monkeypatch.setattr(attention, "SHORTEST_BUCKET", 1 << 20)
    assert_near(losses(other, stream_batch(other), all_objectives()), expected)
    assert_near(gradients(other), gradients(ours))


def as_stream(rows: list[Row], model: MMScaleModel) -> Batch:
    """The square images of `make_batch(rows)` as items of a stream."""
    squares, batch = make_batch(rows), make_batch([Row(False, r.caption, r.text, r.label) for r in rows])
    items = stream("image", model.modalities["image"], [(1, 2, 2)] * len(rows))
    items.values_TC = squares.pixels_NCHW.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(4 * len(rows), -1)
    items.mask_T = squares.patch_mask_NP.flatten()
    batch.streams, batch.gumbel_MG = {"image": items}, squares.gumbel_MG
    return batch


def test_square_items_of_a_stream_equal_square_images() -> None:
    """The stream computes what the dense path computes, with the weights of the same names."""
    dense, ragged = tiny_model(), tiny_model(modalities={"image": {"max_tokens": 4}})
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in ragged.named_parameters()]
    ragged.load_state_dict(dense.state_dict())
    squares, streams = make_batch(random_rows(4)), as_stream(random_rows(4), ragged)
    assert_near(losses(ragged, streams, all_objectives()), losses(dense, squares, all_objectives()))
    assert_near(gradients(ragged), gradients(dense))


@torch.no_grad()
def test_images_in_their_own_shape_may_start_from_a_vit(tmp_path: Path) -> None:
    folder = vit(tmp_path)
    squares, (report,) = started(image=folder)
    native, _ = started(image=folder, modalities={"image": {"max_tokens": 4}})
    assert "image_embedding.positions" in report.loaded
    rows = random_rows(3)
    expected = squares.embed_images(make_batch(rows))
    native.image_projection.load_state_dict(squares.image_projection.state_dict())  # whose map starts at random
    found = native.embed_images(as_stream(rows, native))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["pixels", "features"])
@pytest.mark.parametrize("kind", SETS)
def test_every_module_runs_once_and_gets_gradients_whatever_samples_hold(kind: str, target: str) -> None:
    model, calls, orders = model_of(kind), [], []
    owners = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(recurse=False))]
    for name in owners:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    nothing: dict = {name: [None] * len(ROWS) for name in GRIDS}
    mixes = [GRIDS, nothing, {**nothing, "audio": GRIDS["audio"]}, {**nothing, "video": GRIDS["video"]}]
    batches = [stream_batch(model, grids=mix) for mix in mixes] + [make_batch([Row(image=False)]), make_batch([])]
    for batch in batches:
        losses(model, batch, all_objectives(target=target))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        model.zero_grad(set_to_none=True)
        orders.append(list(calls))
        calls.clear()
    assert sorted(orders[0]) == sorted(owners)
    assert all(order == orders[0] for order in orders)


def test_the_first_item_stands_for_the_sample() -> None:
    """Image before video before sound: what comes later does not change the embedding."""
    model = model_of("native").eval()
    whole, without = stream_batch(model), stream_batch(model, grids={**GRIDS, "audio": [None] * 8, "other": [None] * 8})
    embedded = dict(zip(whole.perception_rows_N.tolist(), model.embed_images(whole), strict=True))
    assert sorted(embedded) == [0, 1, 2, 3, 4, 5]
    for row, vector in zip(without.perception_rows_N.tolist(), model.embed_images(without), strict=True):
        torch.testing.assert_close(vector, embedded[row], rtol=1e-5, atol=1e-5)
    heard = stream_batch(model, grids={**GRIDS, "image": [None] * 8, "video": [None] * 8, "other": [None] * 8})
    torch.testing.assert_close(model.embed_images(heard)[1], embedded[2], rtol=1e-5, atol=1e-5)


def test_an_expert_of_its_own_has_its_own_weights() -> None:
    shared, own = tiny_config(modalities=MODALITIES), tiny_config(modalities=NATIVE)
    names = {n for n, _ in MMScaleModel(own).named_parameters()} - {n for n, _ in MMScaleModel(shared).named_parameters()}
    assert {n.split(".")[0] for n in names} == {"expert_layers", "fusion_layers"}
    assert all(".ears." in n for n in names)


def test_the_shared_expert_may_have_nothing_to_do() -> None:
    model = tiny_model(modalities=APART)
    losses(model, stream_batch(model), all_objectives())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", [*SETS, "images", "narrow"])
def test_cached_decoding_equals_the_full_forward(kind: str, positions: str, beams: int) -> None:
    towers = {"text": NARROW, "image": {"leading_tokens": 2}, "modalities": MODALITIES} if kind == "narrow" else {}
    model = (model_of(kind, positions) if kind in SETS else tiny_model(positions=positions, **towers)).eval()
    grids = {name: [g for g, keep in zip(of, GRIDS["video"], strict=True) if keep] for name, of in GRIDS.items()}  # three with an item
    rows = [Row(image=True) for _ in range(3)]
    batch = make_batch(rows) if kind == "images" else stream_batch(model, rows, grids, masked=False)

    class Uncached(UncachedDecoder):
        def logits(self, whole: Batch) -> torch.Tensor:
            if kind != "images":
                spread = {name: [g for g in of for _ in range(beams)] for name, of in grids.items()}
                again = stream_batch(model, [Row(True)] * 3 * beams, spread, masked=False)
                for name, items in again.streams.items():
                    source = batch.streams[name]
                    parts = source.values_TC.split(source.cu_seqlens_S1.diff().tolist())
                    items.values_TC = torch.cat([p for p in parts for _ in range(beams)]) if parts else items.values_TC
                whole.streams, whole.image_rows_N = again.streams, again.image_rows_N
                whole.pixels_NCHW = batch.pixels_NCHW.repeat_interleave(beams, 0)
                whole.patch_mask_NP = again.patch_mask_NP
            return super().logits(whole)

    got = generate(model, batch, max_new_tokens=6, beams=beams)
    decoder = Uncached.__new__(Uncached)
    decoder.model, decoder.batch, decoder.beams, decoder.past = model, batch, beams, [[] for _ in range(3 * beams)]
    with torch.no_grad():
        expected = search(decoder.step, torch.full((3,), BEGIN), END, 6, beams)
    assert got == expected
    assert any(len(ids) for ids in got)


def test_shifting_an_axis_leaves_rotary_attention_unchanged() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 9, 2, 24)
    place = torch.randint(0, 20, (9, 3))

    def scores(coordinates: torch.Tensor) -> torch.Tensor:
        turn = rotation(coordinates, 24, 10000.0)
        return torch.einsum("qhk,nhk->hqn", turn.turn(q), turn.turn(k))

    for axis in range(3):
        shift = torch.zeros(3, dtype=torch.int64)
        shift[axis] = 57
        torch.testing.assert_close(scores(place + shift), scores(place), rtol=1e-4, atol=1e-4)
        moved = place.clone()
        moved[4, axis] += 3
        assert not torch.allclose(scores(moved), scores(place), atol=1e-2)  # each axis matters
    turn = rotation(torch.arange(9)[:, None].expand(-1, 3), 24, 10000.0)  # text: the one-dimensional embedding
    angle = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(12) / 12)
    torch.testing.assert_close(turn.cos_T1F[:, 0], angle.cos())


def test_rotary_models_have_no_position_tables_and_see_order() -> None:
    model = tiny_model(positions="rotary").eval()
    assert not [name for name, _ in model.named_parameters() if "positions" in name]
    first = model.embed_captions(make_batch([Row(caption=(10, 11, 12))]))
    assert not torch.allclose(first, model.embed_captions(make_batch([Row(caption=(11, 10, 12))])), atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 4), (2, 7), (9, 3), (1, 1)])
def test_stretched_positions_are_antialiased_bilinear_and_exact_for_the_square(shape: tuple[int, int]) -> None:
    table = torch.randn(16, 6)
    rows, columns = shape
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    got = stretched(table, 4, place, torch.tensor(shape).expand(len(place), -1))
    grid = F.interpolate(table.T.reshape(1, 6, 4, 4), size=shape, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(got, grid.flatten(2)[0].T, rtol=1e-5, atol=1e-5)
    if shape == (4, 4):
        assert torch.equal(got, table)
        assert torch.equal(got, resize_positions(torch.cat([table[:1], table]), 16)[1:])


def test_kept_patches_of_square_images_are_a_smaller_dense_batch() -> None:
    """Keeping all patches, in order, changes nothing; keeping some is as if the others were not there."""
    for positions, image in itertools.product(POSITIONS, ({}, {"leading_tokens": 2}, {"leading_tokens": 0, "pooling": "attention"})):
        model, batch = tiny_model(positions=positions, image=image).eval(), make_batch(random_rows(3), mask_images=False)
        expected = model.embed_images(batch)
        batch.kept_NK = torch.arange(4).expand(3, -1)
        torch.testing.assert_close(model.embed_images(batch), expected, rtol=1e-5, atol=1e-6)
        batch.kept_NK, batch.patch_mask_NP = torch.tensor([[0, 3], [1, 2], [0, 1]]), batch.patch_mask_NP[:, :2]
        kept = model.embed_images(batch)
        batch.pixels_NCHW[0, :, :8, 8:] = 0  # a patch that is not seen
        torch.testing.assert_close(model.embed_images(batch), kept, rtol=0, atol=0)
        assert not torch.allclose(kept, expected, atol=1e-3)
        batch.patch_mask_NP = torch.tensor([[True, False], [False, False], [True, True]])
        hidden = model.run(batch, Wanted(masked_image=True)).patches[0][1]  # targets are of the patches that are kept
        pixels = torch.stack([batch.pixels_NCHW[i, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].flatten() for i, y, x in KEPT_HIDDEN])
        torch.testing.assert_close(hidden, F.layer_norm(pixels.float(), (192,)))
        model.train()
        found = losses(model, batch, all_objectives())
        assert all(value.isfinite() for value in found.values())
        counted_near(model, batch, [o for o in all_objectives() if o.name != "matching"])


KEPT_HIDDEN = [(0, 0, 0), (2, 0, 0), (2, 0, 1)]
"""(image, row, column) of the hidden ones among the kept patches of the test above."""


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", SETS)
def test_counted_operations_are_those_that_run(kind: str, positions: str) -> None:
    model = model_of(kind, positions, hidden_size=64)
    rows = [Row(row.image, WORDS if row.caption else None, WORDS if row.text else None, row.label) for row in ROWS]
    batch = stream_batch(model, rows)
    objectives = [o for o in all_objectives() if o.name != "matching"]  # which draws other samples' items
    counted_near(model, batch, objectives)


@pytest.mark.parametrize("towers", TOWERS)
def test_operations_of_towers_of_other_shapes_are_counted(towers: str) -> None:
    model = tiny_model(positions="rotary", hidden_size=64, **TOWERS[towers])
    counted_near(model, stream_batch(model), [o for o in all_objectives(target="features") if o.name != "matching"])


def counted_near(model: MMScaleModel, batch: Batch, objectives) -> None:
    """Within 2 % of what torch counts, but for a metric: the nearest caption of each image."""
    mine = forward_flops(model.config, count(model.config, batch, Wanted.of(objectives)))
    with torch.no_grad():
        theirs, _ = run(model, batch, objectives)
    assert mine == pytest.approx(theirs - 2 * model.config.projection_size * batch.size**2, rel=0.02)


def test_a_stem_has_weights_and_gradients_though_nobody_sounds() -> None:
    model = tiny_model(**TOWERS["convolutions in patches"])
    rows = [Row(), Row(text=None)]
    sum(losses(model, make_batch(rows), all_objectives()).values())
    stem = {name: p for name, p in model.named_parameters() if ".stem." in name}
    assert len(stem) == 12
    for name, parameter in stem.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    audio = build_modalities(model.config)["audio"]
    assert audio.stem_plane is not None
    assert model.patch_embeddings["audio"].patch_weight.shape == (32, audio.stem_plane.values) == (32, 2 * 2 * 1 * 2)


def test_a_stem_by_hand() -> None:
    """What it keeps, multiplies and gives is what its layers do; a patch is bands by frames."""
    plane = Plane(16, 8, 3)
    stem = PatchStem(plane)
    seen: list[torch.Tensor] = []
    for module in (*stem.convolutions, *stem.norms):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    patches = torch.randn(5, 16 * 8)
    with FlopCounterMode(display=False) as counter:
        out = stem(patches)
    assert out.shape == (5, plane.values)
    assert counter.get_total_flops() == 2 * 5 * plane.products
    assert sum(x.numel() for x in seen) + out.numel() == 5 * plane.kept
    convolution = stem.convolutions[0]
    first = F.conv2d(patches.view(5, 1, 16, 8), convolution.weight, convolution.bias, stride=2, padding=(2, 1))
    torch.testing.assert_close(seen[0], first)


@pytest.mark.parametrize(
    ("words", "got"), [({"stem": 4, "patch": 4}, "got 4 and 4"), ({"stem": 4, "patch": 8, "patch_frames": 6}, "8 and 6")]
)
def test_a_stem_needs_patches_that_can_be_halved(words: dict, got: str) -> None:
    with pytest.raises(ConfigError, match=rf"^`model\.modalities\.audio\.stem` halves the bands of a patch three times .* {got}\.$"):
        tiny_model(modalities={"audio": {"mels": 16, "max_seconds": 0.4, **words}})


def test_wanted_nothing_still_lays_out_items() -> None:
    model = model_of("native").eval()
    state = model.run(stream_batch(model), Wanted(contrastive=True))
    assert state.image_embedding_NE.shape == (6, 16)
    assert [len(prediction) for prediction, _ in state.patches] == [0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", SETS)
def test_items_on_a_gpu_in_half_precision_give_near_the_same_losses(kind: str) -> None:
    ours, theirs = model_of(kind, "rotary", spread=0.05), model_of(kind, "rotary", spread=0.05).cuda().to(torch.bfloat16)
    objectives = [o for o in all_objectives() if o.name != "matching"]  # whose draws rounding may change
    batch = stream_batch(ours)
    expected, got = losses(ours, batch, objectives), losses(theirs, batch.to(torch.device("cuda")), objectives)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=0.05, atol=0.05, msg=lambda m, name=name: f"{name}: {m}")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in theirs.parameters())
