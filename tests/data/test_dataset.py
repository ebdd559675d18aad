import json
import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

from mmscale.data.dataset import ShardDataset
from mmscale.data.decode import decode_image
from mmscale.data.labels import label_counts, label_of, label_vocabulary
from shards.errors import ConfigError, IntegrityError, ShardError
from tests.data.tiny import SIZE, caption, collator, image_bytes, mixed, write


def test_a_position_gives_its_sample(tmp_path):
    dataset = ShardDataset(write(tmp_path / "d"), seed=5, image_size=SIZE)
    assert len(dataset) == 31
    for position in range(70):
        example = dataset[position]
        index = int(example.key[1:])
        assert (example.position, example.weight, example.error) == (position, 1.0, None)
        assert example.captions == [caption(index)]
        assert example.fields["number"] == index
        assert np.array_equal(example.image, decode_image("jpg", image_bytes(index), SIZE))


def test_an_epoch_has_every_sample_once_and_the_next_another_order(tmp_path):
    dataset = ShardDataset(write(tmp_path / "d"), seed=5)
    keys = [e.key for e in dataset.__getitems__(range(62))]
    assert sorted(keys[:31]) == sorted(keys[31:]) == sorted(f"s{i}" for i in range(31))
    assert keys[:31] != keys[31:]
    assert [e.key for e in ShardDataset(tmp_path / "d", shuffle=False).__getitems__(range(33))] == [f"s{i % 31}" for i in range(33)]


def test_it_pickles_and_is_the_same(tmp_path):
    dataset = ShardDataset(write(tmp_path / "d"), seed=5, image_size=SIZE)
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy[p].key for p in range(10)] == [dataset[p].key for p in range(10)]
    assert copy.digest == dataset.digest
    assert copy.order.fingerprint() == dataset.order.fingerprint()


def test_what_does_not_decode_has_weight_0_and_its_key(tmp_path):
    dataset = ShardDataset(write(tmp_path / "d", mixed), shuffle=False, image_size=SIZE)
    broken = [e for e in dataset.__getitems__(range(31)) if e.error]
    assert [e.key for e in broken] == ["s3", "s9", "s15", "s21", "s27"]
    assert all((e.weight, e.image, e.captions, e.fields) == (0.0, None, [], {}) for e in broken)
    assert broken[0].error.startswith("undecodable: the image does not decode")


def test_bad_json_and_bad_text_have_weight_0_too(tmp_path):
    folder = write(tmp_path / "d", lambda i: [{"json": b"{broken"}, {"txt": b"\xff\xfe"}, {"txt": b"good"}][i], rows=(3,))
    examples = ShardDataset(folder, shuffle=False).__getitems__(range(3))
    assert [e.weight for e in examples] == [0.0, 0.0, 1.0]
    assert examples[0].error.startswith("bad_json")
    assert examples[1].error.startswith("not_utf8")


def test_wrong_bytes_are_no_quarantine_but_the_end(tmp_path):
    folder = write(tmp_path / "d", rows=(3,))
    dataset = ShardDataset(folder, shuffle=False, image_size=SIZE)
    tar = folder / "00000.tar"
    content = tar.read_bytes()
    start = content.index(image_bytes(1))
    tar.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    with pytest.raises(IntegrityError, match=r"00000\.tar:s1"):
        dataset[1]


def test_no_data_set_and_negative_positions(tmp_path):
    with pytest.raises(ShardError):
        ShardDataset(tmp_path / "nowhere")
    with pytest.raises(IndexError, match="positions begin at 0; got -1"):
        ShardDataset(write(tmp_path / "d"))[-1]


def test_a_plain_dataloader_reads_it(tmp_path):
    folder = write(tmp_path / "d", mixed)
    loader = DataLoader(ShardDataset(folder, image_size=SIZE), batch_size=8, collate_fn=collator(tmp_path, folder))
    assert [key for batch in loader for key in batch.keys] == [e.key for e in ShardDataset(folder).__getitems__(range(31))]


def test_texts_of_fields(tmp_path):
    example = ShardDataset(write(tmp_path / "d"), shuffle=False)[4]
    assert example.texts("caption") == [caption(4)]
    assert example.texts("question") == [caption(504)]
    assert example.texts("number") == ["4"]
    assert example.texts("nothing") == []


def test_labels():
    assert [label_of(v) for v in ("cat", 3, True, None, {}, ["b", "a", "a"], ["b", "a"], [])] == [
        "cat",
        "3",
        "true",
        None,
        None,
        "a",
        "b",
        None,
    ]


def test_the_label_vocabulary_is_read_from_the_shards(tmp_path):
    reader = ShardDataset(write(tmp_path / "d", mixed)).reader
    assert label_vocabulary(reader, "answer") == ["red"]
    with pytest.raises(ConfigError, match=r"`data\.label=answr` is a field of no sample, .*; .*'answer'.* \(did you mean 'answer'\?\)\."):
        label_vocabulary(reader, "answr")


def test_labels_and_samples_without_one_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    values = ["red", "", "blue", "red", None, 7, float("nan")]
    reader = ShardDataset(write(tmp_path / "d", lambda i: {"json": json.dumps({"kind": values[i % 7]}).encode()}, (7,))).reader
    assert label_counts(reader, "kind") == {"red": 2, "blue": 1, "7": 1}
    assert caplog.messages == [
        "labels      3 of data.label=kind: red (2), blue (1), 7 (1)",
        "3 of 7 samples have no `data.label=kind`, such as s1: the task does not learn from them",
    ]
