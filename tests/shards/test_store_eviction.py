"""Deleting what is needed last is as good as the best choice there is."""

import random
from functools import cache

import pytest

from shards.store.eviction import Cached, victims


def fewest_misses(uses, room):
    """Try every choice of what to delete."""

    @cache
    def misses(at, held):
        if at == len(uses):
            return 0
        if uses[at] in held:
            return misses(at + 1, held)
        if len(held) < room:
            return 1 + misses(at + 1, held | {uses[at]})
        return 1 + min(misses(at + 1, held - {gone} | {uses[at]}) for gone in held)

    return misses(0, frozenset())


def our_misses(uses, room, size=10):
    held, misses = {}, 0
    for at, name in enumerate(uses):
        if name in held:
            continue
        misses += 1
        upcoming = {}
        for place, later in enumerate(uses[at:]):
            upcoming.setdefault(later, place)
        excess = (len(held) + 1 - room) * size
        for gone in victims(held.values(), upcoming, excess=excess):
            del held[gone.name]
        held[name] = Cached(name, size, float(at))
        assert len(held) <= room
    return misses


@pytest.mark.parametrize("seed", range(40))
def test_as_few_fetches_as_possible(seed):
    draw = random.Random(seed)
    uses = [f"s{draw.randrange(draw.choice((3, 5, 6)))}" for _ in range(14)]
    for room in (1, 2, 3, 4):
        assert our_misses(uses, room) == fewest_misses(tuple(uses), room)


def test_the_unexpected_go_first_the_longest_unused_of_them_before_the_others():
    cached = [Cached("late", 5, 1.0), Cached("old", 5, 2.0), Cached("new", 5, 3.0), Cached("soon", 5, 0.0)]
    expected = {"soon": 1, "late": 7}
    assert [f.name for f in victims(cached, expected, excess=11)] == ["old", "new", "late"]
    assert [f.name for f in victims(cached, expected, excess=1)] == ["old"]
    assert victims(cached, expected, excess=0) == []
    assert victims(cached, expected, excess=21) is None


def test_what_is_needed_sooner_makes_no_room_for_what_is_fetched_ahead():
    cached = [Cached("a", 5, 0.0), Cached("b", 5, 0.0)]
    assert victims(cached, {"a": 0, "b": 2}, excess=5, later_than=1) == [cached[1]]
    assert victims(cached, {"a": 0, "b": 2}, excess=5, later_than=2) is None
