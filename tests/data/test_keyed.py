import numpy as np
import pytest

from mmscale.data.keyed import Purpose, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, words):
    assert philox(np.array(counter, dtype=np.uint64), key).tolist() == list(words)


def test_a_number_depends_on_nothing_but_seed_position_purpose_and_index():
    positions = np.array([5, 2**40, 7, 2**61])
    all_of_them = uniform(3, positions, Purpose.GUMBEL, 9)
    for i, position in enumerate(positions):
        assert np.array_equal(uniform(3, np.array([position]), Purpose.GUMBEL, 5)[0], all_of_them[i, :5])
    assert not np.array_equal(uniform(4, positions, Purpose.GUMBEL, 9), all_of_them)
    assert not np.array_equal(uniform(3 + 2**32, positions, Purpose.GUMBEL, 9), all_of_them)
    assert not np.array_equal(uniform(3, positions, Purpose.AUGMENT, 9), all_of_them)


def test_numbers_are_uniform_and_never_0_or_1():
    numbers = uniform(0, np.arange(5000), Purpose.CHOICE, 8)
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
    assert abs(counts - 2500).max() < 250
    assert abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.06


def test_no_positions_give_an_empty_array():
    assert uniform(0, np.array([], dtype=np.int64), Purpose.CHOICE, 4).shape == (0, 4)
