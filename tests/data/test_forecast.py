import numpy as np

from mmscale.data.forecast import Forecast
from mmscale.data.loader import share
from shards.order import GlobalOrder


def steps_of(order, rank, steps, batch=24, micro=4, size=3):
    return [share(order.by_lane(step * batch, batch).tolist(), micro, rank, size) for step in range(steps)]


def test_upcoming_shards_are_those_of_the_next_steps_in_order_of_use():
    order = GlobalOrder([20] * 50, 0, lanes=6, block=30, whole=0)
    steps = steps_of(order, rank=1, steps=40)
    needed = [order.locate(np.concatenate(micro))[1].tolist() for micro in steps]
    forecast = Forecast(order, steps, ahead=10)
    for done in range(40):
        ahead = [shard for step in needed[done : done + 10] for shard in step]
        assert forecast.upcoming() == list(dict.fromkeys(ahead))
        forecast.advance()
    assert forecast.upcoming() == []


def test_several_steps_are_left_behind_at_once():
    order = GlobalOrder([20] * 50, 0, lanes=6, block=30, whole=0)
    one, other = (Forecast(order, steps_of(order, rank=0, steps=30), ahead=8) for _ in range(2))
    one.advance(7)
    for _ in range(7):
        other.advance()
    assert one.upcoming() == other.upcoming()
