from __future__ import annotations

import sys

import pytest
import torch

from trainer.rng import Permutation, draw_seed, normal, randint, uniform


def test_noise_of_a_sample_ignores_its_batch():
    whole = normal(0, "noise", [7, 8, 9, 10], (4, 8, 8))
    halves = [normal(0, "noise", slots, (4, 8, 8)) for slots in ([7, 8], [9, 10])]
    assert torch.equal(whole, torch.cat(halves))


def test_noise_ignores_and_leaves_alone_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = normal(3, "noise", [5], (2, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(normal(3, "noise", [5], (2, 2)), first)


def test_noise_is_standard_normal():
    noise = normal(0, "noise", range(64), (4, 32, 32))
    assert noise.shape == (64, 4, 32, 32)
    assert noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.01  # five standard errors
    assert abs(noise.std().item() - 1) < 0.01


def test_seeds_streams_and_slots_draw_differently():
    seeds = {draw_seed(seed, stream, slot) for seed in range(10) for stream in ("noise", "flip") for slot in range(100)}
    assert len(seeds) == 10 * 2 * 100
    assert draw_seed(1, "a", 23) != draw_seed(12, "a", 3)


def test_uniform_fills_the_unit_interval_evenly():
    draws = [uniform(0, "flip", slot) for slot in range(20_000)]
    assert all(0 <= u < 1 for u in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.01  # five standard errors
    tenths = [sum(int(u * 10) == tenth for u in draws) for tenth in range(10)]
    assert min(tenths) > 1800
    assert max(tenths) < 2200


def test_the_largest_draw_is_still_below_one():
    assert ((2**64 - 1) >> 11) * 2.0**-53 == 1 - 2**-53 < 1


def test_randint_hits_every_integer_below_n():
    assert {randint(0, "caption", slot, 7) for slot in range(300)} == set(range(7))


# If one of these changes, every run that anyone has ever made gets other noise and another order of records.


@pytest.mark.parametrize(
    ("seed", "stream", "slot", "drawn"),
    [
        (0, "noise", 0, 6606410864112096114),
        (7, "order/round0", 3, 12272078376758609812),
        (9223372036854775807, "caption", 1000000000000, 8614199352500710118),
        (1, "größe", 42, 5180352632203418171),
    ],
)
def test_draws_stay_what_they_are_in_all_versions(seed: int, stream: str, slot: int, drawn: int):
    assert draw_seed(seed, stream, slot) == drawn


def test_noise_stays_what_it_is_in_all_versions():
    noise = normal(7, "noise", [0, 1_000_000], (4, 8, 8)).double()
    assert noise.sum(dim=(1, 2, 3)).tolist() == pytest.approx([2.010392, -18.279313], abs=1e-4)


def test_the_order_of_records_stays_what_it_is_in_all_versions():
    order = Permutation(10, seed=7, stream="order", epoch=0)
    assert [order[index] for index in range(10)] == [2, 3, 0, 6, 7, 4, 1, 5, 8, 9]


@pytest.mark.parametrize("n", [*range(1, 71), 1000])
def test_a_permutation_hits_every_index_once(n: int):
    order = Permutation(n, seed=0, stream="order", epoch=3)
    assert sorted(order[index] for index in range(n)) == list(range(n))


def test_a_permutation_differs_between_epochs_seeds_and_streams():
    orders = [
        tuple(Permutation(100, seed, stream, epoch)[index] for index in range(100))
        for seed in range(3)
        for stream in ("order", "other")
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_over_many_epochs_a_record_stands_anywhere():
    n, epochs = 10, 3000
    orders = [Permutation(n, 0, "order", epoch) for epoch in range(epochs)]
    for index in range(n):
        places = [order[index] for order in orders]
        assert abs(sum(places) / epochs - (n - 1) / 2) < 0.3  # five standard errors
        assert all(abs(places.count(place) - epochs / n) < 100 for place in range(n))  # six


def test_neighbours_are_separated():
    order = Permutation(1000, 0, "order", 0)
    steps = [abs(order[index + 1] - order[index]) for index in range(999)]
    assert sum(step == 1 for step in steps) < 10  # two are expected
    assert abs(sum(steps) / 999 - 333) < 40  # the mean distance of two random places is n/3


def test_a_permutation_of_a_billion_records_takes_no_table():
    order = Permutation(10**9, 0, "order", 0)
    seen = [order[index] for index in (0, 1, 2, 10**9 - 1)]
    assert len(set(seen)) == 4
    assert all(0 <= value < 10**9 for value in seen)
    held = sum(sys.getsizeof(value) for value in vars(order).values()) + sum(map(sys.getsizeof, order.keys))
    assert held < 1000  # bytes


def test_a_permutation_refuses_an_index_outside():
    order = Permutation(10, 0, "order", 0)
    for index in (-1, 10):
        with pytest.raises(AssertionError, match="of 10"):
            order[index]
