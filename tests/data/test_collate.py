from itertools import pairwise

import numpy as np
import pytest
import torch

from mmscale.data.batch import IGNORE
from mmscale.data.dataset import ShardDataset
from mmscale.data.example import Example
from shards.errors import ConfigError
from tests.data.tiny import AUGMENT, EVERY_OBJECTIVE, PATCH, SIZE, assert_equal, caption, collator, mixed, tokenizer_folder, write
from tests.data.tiny import collator as build


NOTHING = {name: {"weight": 0.0} for name in EVERY_OBJECTIVE}


def sequences(stream):
    cu = stream.cu_seqlens_S1.tolist()
    return {int(row): stream.ids_T[a:b].tolist() for row, a, b in zip(stream.rows_S, cu[:-1], cu[1:], strict=True)}


def examples(count=200):
    """Text-only, image-only, paired and quarantined samples."""
    made = []
    for position in range(count):
        image = np.full((SIZE, SIZE, 3), position % 256, np.uint8) if position % 3 != 1 else None
        captions = [caption(position)] if position % 3 != 2 else []
        broken = position % 10 == 9
        made.append(
            Example(position, f"s{position}", 0.0, error="undecodable")
            if broken
            else Example(position, f"s{position}", 1.0, image, captions, {"answer": ["red", "blue"][position % 2]})
        )
    return made


def test_mixed_samples_fill_the_right_streams(tmp_path):
    batch = build(
        tmp_path,
        tmp_path,
        data={"augment": dict.fromkeys(AUGMENT, 0)},
        objectives={"masked_language": {"fraction": 1.0}, "matching": {"fraction": 1.0}},
    )(examples())
    good = [p for p in range(200) if p % 10 != 9]
    assert batch.positions_M.tolist() == list(range(200))
    assert batch.weights_M.tolist() == [float(p % 10 != 9) for p in range(200)]
    assert batch.image_rows_N.tolist() == [p for p in good if p % 3 != 1]
    assert batch.caption.rows_S.tolist() == batch.text.rows_S.tolist() == [p for p in good if p % 3 != 2]
    assert batch.pixels_NCHW.shape == (len(batch.image_rows_N), 3, SIZE, SIZE)
    assert (batch.pixels_NCHW == batch.image_rows_N[:, None, None, None] % 256).all()


def test_the_causal_stream_predicts_the_next_token(tmp_path):
    made = build(tmp_path, tmp_path)
    batch = made(examples())
    for row, ids in sequences(batch.caption).items():
        assert ids == made.tokenizer.encode(caption(row), 8)
    cu = batch.caption.cu_seqlens_S1.tolist()
    for start, end in pairwise(cu):
        assert batch.caption.labels_T[start : end - 1].tolist() == batch.caption.ids_T[start + 1 : end].tolist()
        assert batch.caption.labels_T[end - 1] == IGNORE
    assert 0.5 < batch.caption.fuse_S.float().mean() < 0.7


def test_captions_are_filled_up_with_padding_that_counts_as_text(tmp_path):
    plain, padded = (build(tmp_path, tmp_path, data={"pad_captions": n})(examples()) for n in (0, 8))
    assert padded.caption.cu_seqlens_S1.diff().tolist() == [8] * len(plain.caption.rows_S)
    whole = sequences(padded.caption)
    for row, ids in sequences(plain.caption).items():
        assert whole[row] == ids + [0] * (8 - len(ids))
    assert torch.equal(padded.text.ids_T, plain.text.ids_T)


def test_masking_is_berts_and_spares_the_special_tokens(tmp_path):
    made = build(tmp_path, tmp_path, objectives={"masked_language": {"fraction": 1.0}})
    many = [Example(p, f"s{p}", captions=[" ".join(["red"] * 30)]) for p in range(2000)]
    batch = made(many)
    red = made.tokenizer.encode("red", 8)[1]
    hidden = batch.text.labels_T != IGNORE
    assert (batch.text.labels_T[hidden] == red).all()
    cu = batch.text.cu_seqlens_S1.long()
    assert not hidden[cu[:-1]].any()
    assert not hidden[cu[1:] - 1].any()
    inner = len(batch.text.ids_T) - 2 * 2000
    assert hidden.sum() / inner == pytest.approx(0.4, abs=0.02)
    values = batch.text.ids_T[hidden]
    assert (values == made.tokenizer.mask).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (values == red).float().mean() == pytest.approx(0.1 + 0.1 / 12, abs=0.02)
    assert set(values.tolist()) <= {made.tokenizer.mask, *made.tokenizer.ordinary_ids.tolist()}
    assert (batch.text.ids_T[~hidden] == torch.cat([batch.caption.ids_T])[~hidden]).all()
    assert batch.text.fuse_S.all()


def test_fractions_choose_samples_by_position(tmp_path):
    batch = build(tmp_path, tmp_path, objectives={"matching": {"fraction": 0.3}, "masked_language": {"fraction": 0.1}})(
        [Example(p, "k", captions=["red blue green small"]) for p in range(2000)]
    )
    assert len(batch.text.rows_S) == pytest.approx(600, abs=60)
    cu = batch.text.cu_seqlens_S1.tolist()
    touched = sum(bool((batch.text.labels_T[a:b] != IGNORE).any()) for a, b in pairwise(cu))
    assert touched == pytest.approx(200 * (1 - 0.6**4), abs=40)


def test_patches_are_hidden_in_the_chosen_images(tmp_path):
    batch = build(tmp_path, tmp_path)([Example(p, "k", image=np.zeros((SIZE, SIZE, 3), np.uint8)) for p in range(400)])
    counts = batch.patch_mask_NP.sum(1)
    assert batch.patch_mask_NP.shape == (400, (SIZE // PATCH) ** 2)
    assert set(counts.tolist()) == {0, 8}
    assert (counts > 0).float().mean() == pytest.approx(0.5, abs=0.08)
    assert batch.patch_mask_NP.float().mean(0).std() < 0.05


def test_a_row_does_not_depend_on_its_batch(tmp_path):
    made = build(tmp_path, tmp_path)
    whole = made(examples(40))
    for start in (0, 13, 26):
        part = made(examples(40)[start : start + 13])
        rows = {r - start: ids for r, ids in sequences(whole.text).items() if start <= r < start + 13}
        assert sequences(part.text) == rows
        assert torch.equal(part.gumbel_MG, whole.gumbel_MG[start : start + 13])
        inside = (whole.image_rows_N >= start) & (whole.image_rows_N < start + 13)
        assert torch.equal(part.pixels_NCHW, whole.pixels_NCHW[inside])
        assert torch.equal(part.patch_mask_NP, whole.patch_mask_NP[inside])


def test_evaluation_hides_nothing_and_takes_all(tmp_path):
    made = build(tmp_path, tmp_path, training=False)
    batch = made(examples(60))
    assert (batch.text.labels_T == IGNORE).all()
    assert sequences(batch.text) == sequences(batch.caption)
    assert batch.caption.fuse_S.all()
    assert not batch.patch_mask_NP.any()
    assert (batch.pixels_NCHW == batch.image_rows_N[:, None, None, None] % 256).all()
    assert batch.fields[0] == {"answer": "red", "captions": [caption(0)]}
    assert batch.fields[9] == {"captions": []}


def test_one_of_several_captions_is_drawn_and_both_streams_take_the_same(tmp_path):
    many = [Example(p, "k", captions=["red", "green", "blue"]) for p in range(300)]
    drawn = sequences(build(tmp_path, tmp_path, objectives={"masked_language": {"weight": 0.0}})(many).caption)
    assert [sum(ids[1] == first for ids in drawn.values()) for first in (5, 6, 7)] == pytest.approx([100] * 3, abs=30)
    plain = build(tmp_path, tmp_path, objectives={"masked_language": {"weight": 0.0}})(many)
    assert sequences(plain.text) == drawn
    assert {tuple(ids) for ids in sequences(build(tmp_path, tmp_path, training=False)(many).caption).values()} == {(2, 5, 3)}


def test_a_label_task_has_targets_and_the_question_as_text(tmp_path):
    off = {name: {"weight": 0.0} for name in ("contrastive", "matching", "masked_language", "captioning", "masked_image")}
    task = {"task": {"name": "vqa"}, "data": {"text": "question", "label": "answer", "labels": ["blue", "red"]}, "objectives": off}
    made = build(tmp_path, tmp_path, **task)
    fields = [{"question": "a red circle", "answer": "red"}, {"question": "a square", "answer": "other"}, {}]
    batch = made([Example(i, "k", captions=["blue"], fields=f) for i, f in enumerate(fields)])
    assert batch.targets["label"].tolist() == [1, IGNORE, IGNORE]
    assert sequences(batch.text) == {0: made.tokenizer.encode("a red circle", 8), 1: made.tokenizer.encode("a square", 8)}
    assert len(batch.caption.rows_S) == 0
    assert batch.gumbel_MG.shape == (3, 0)


def test_a_text_only_control_has_no_images(tmp_path):
    batch = build(tmp_path, tmp_path, data={"image": False})(examples(20))
    assert batch.pixels_NCHW.shape == (0, 3, SIZE, SIZE)
    assert batch.patch_mask_NP.shape == (0, 16)
    assert len(batch.text.rows_S) > 0


def test_no_text_fields_give_empty_streams(tmp_path):
    batch = build(tmp_path, tmp_path, data={"caption": None, "text": None})(examples(20))
    for stream in (batch.caption, batch.text):
        assert stream.cu_seqlens_S1.tolist() == [0]
        assert len(stream.ids_T) == len(stream.rows_S) == 0
    assert batch.caption.ids_T.dtype == torch.int64


def test_no_examples_give_an_empty_batch(tmp_path):
    batch = build(tmp_path, tmp_path)([])
    assert batch.size == 0
    assert batch.pixels_NCHW.shape == (0, 3, SIZE, SIZE)
    assert batch.gumbel_MG.shape == (0, 4)


def test_without_a_matching_group_the_noise_is_as_wide_as_the_batch(tmp_path):
    assert build(tmp_path, tmp_path, objectives={"matching": {"group": None}})(examples(12)).gumbel_MG.shape == (12, 12)


def test_calling_equals_augmenting_and_assembling(tmp_path):
    folder = write(tmp_path / "d", mixed)
    made, dataset = collator(tmp_path, folder), ShardDataset(folder, image_size=SIZE)
    pixels = np.zeros((12, SIZE, SIZE, 3), np.uint8)
    read = [dataset.read(place, pixels[i]) for i, place in enumerate(dataset.places(range(12)))]
    for i, draws in enumerate(made.augment_draws(range(12))):
        if read[i].image is not None:
            made.augment_into(pixels[i], draws)
    assert_equal(made.assemble(read, pixels), made(dataset.__getitems__(range(12))))


def test_masked_language_needs_a_mask_token(tmp_path):
    tokenizer_folder(tmp_path / "tokenizer", mask=False)
    with pytest.raises(ConfigError, match=r"`objectives.masked_language` needs a mask token and the tokenizer has none"):
        build(tmp_path, tmp_path)


def test_a_label_task_needs_its_label(tmp_path):
    with pytest.raises(ConfigError, match=r"^`data\.label` must name the json field that holds the target of the task; it is null"):
        build(tmp_path, tmp_path, task={"name": "vqa"})
    with pytest.raises(ConfigError, match=r"`task\.name=vqa` needs the label vocabulary"):
        build(tmp_path, tmp_path, task={"name": "vqa"}, data={"label": "answer"})


def test_texts_and_labels_follow_the_channels_of_the_image(tmp_path):
    colours = ["red", "green", "blue"]
    layers = {
        "data": {
            "text": "question",
            "label": "answer",
            "labels": colours,
            "augment": {"shift": 0, "flip": 0.0, "brightness": 0.0, "scale": 0.0, "channel_permutation": True, "colours": colours},
        },
        "objectives": {name: {"weight": 0.0} for name in ("contrastive", "matching", "masked_language", "captioning", "masked_image")},
        "task": {"name": "vqa"},
    }
    made, evaluating = build(tmp_path, tmp_path, **layers), build(tmp_path, tmp_path, training=False, **layers)
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[..., 1] = 200
    fields = {"question": "a green circle above a square", "answer": "green"}
    samples = [Example(p, "k", image=pixels, fields=fields) for p in range(60)]
    batch = made(samples)
    shown = batch.pixels_NCHW.amax((2, 3)).argmax(1).tolist()
    assert set(shown) == {0, 1, 2}
    assert batch.targets["label"].tolist() == shown
    assert sequences(batch.text) == {i: made.tokenizer.encode(f"a {colours[c]} circle above a square", 8) for i, c in enumerate(shown)}
    assert evaluating(samples).targets["label"].tolist() == [1] * 60
    blind = made([Example(p, "k", fields=fields) for p in range(60)])
    assert blind.targets["label"].tolist() == [1] * 60  # nothing was shown, so nothing follows


def test_words_are_masked_by_position_and_only_where_a_task_reads_them(tmp_path):
    stage = {"task": {"name": "classification"}, "objectives": NOTHING}

    def stream(part: float, positions, training: bool = True):
        augment = dict.fromkeys(AUGMENT, 0) | {"word_mask": part}
        made = build(tmp_path, tmp_path, training=training, data={"label": "answer", "labels": ["red", "blue"], "augment": augment}, **stage)
        return made([Example(p, f"k{p}", captions=[caption(p)]) for p in positions]).text, made.tokenizer

    (plain, tokenizer), (masked, _) = stream(0.0, range(200)), stream(0.3, range(200))
    begins, ends = plain.cu_seqlens_S1[:-1].long(), plain.cu_seqlens_S1[1:].long() - 1
    changed = plain.ids_T != masked.ids_T
    assert torch.equal(masked.cu_seqlens_S1, plain.cu_seqlens_S1)
    assert (masked.ids_T[changed] == tokenizer.mask).all()
    assert not changed[begins].any()
    assert not changed[ends].any()
    assert 0.25 < changed.sum() / (len(changed) - 2 * len(begins)) < 0.35
    assert (masked.labels_T == IGNORE).all()
    some, _ = stream(0.3, [150, 7])
    whole = [masked.ids_T[begins[p] : ends[p] + 1] for p in (150, 7)]
    assert torch.equal(some.ids_T, torch.cat(whole))
    assert torch.equal(stream(0.3, range(200), training=False)[0].ids_T, plain.ids_T)


def test_word_mask_needs_a_text_and_a_mask_token(tmp_path):
    stage = {"task": {"name": "classification"}, "objectives": NOTHING}
    data = {"label": "answer", "labels": ["red", "blue"], "augment": {"word_mask": 0.1}}
    with pytest.raises(ConfigError, match=r"^`data\.augment\.word_mask` hides words of `data\.text`, which nothing in this stage reads\."):
        build(tmp_path, tmp_path, data=data | {"text": None}, **stage)
    tokenizer_folder(tmp_path / "maskless" / "tokenizer", mask=False)
    with pytest.raises(ConfigError, match=r"^`data\.augment\.word_mask` needs a mask token and the tokenizer has none\."):
        build(tmp_path / "maskless", tmp_path, data=data, **stage)
