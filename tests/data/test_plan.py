"""Which record a slot reads is computed, never stored."""

import pickle

import pytest

from trainer.config_file import load_config
from trainer.data.plan import BatchPlan
from trainer.data.topology import deal
from trainer.preflight import preflight


def test_every_epoch_reads_every_record_once():
    plan = BatchPlan([3, 5, 8, 13, 21, 34, 55], seed=7)
    for epoch in range(5):
        slots = range(7 * epoch, 7 * epoch + 7)
        assert sorted(map(plan.record, slots)) == [3, 5, 8, 13, 21, 34, 55]


def test_a_batch_larger_than_an_epoch_runs_on_into_the_next():
    plan = BatchPlan(range(3), seed=0)
    read = [plan.record(slot) for slot in range(8)]
    assert sorted(read[:3]) == sorted(read[3:6]) == [0, 1, 2]
    assert len(set(read[6:])) == 2


@pytest.mark.parametrize(("records", "global_batch"), [(10, 4), (3, 8), (4, 4)])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_batches_of_any_size_and_topology_read_every_record_once_an_epoch(
    records, global_batch, world_size, micro_batch
):
    plan = BatchPlan(range(records), seed=7)
    ranks = [deal(global_batch, micro_batch, rank, world_size) for rank in range(world_size)]
    steps = -(-4 * records // global_batch)  # four epochs, the last step beyond them perhaps
    slots = sorted(
        slot for step in range(steps) for rank in ranks for micro_slots in rank.slots(step) for slot in micro_slots
    )
    assert slots == list(range(steps * global_batch)), "every slot is dealt once"
    for epoch in range(4):
        read = [plan.record(slot) for slot in slots[epoch * records : (epoch + 1) * records]]
        assert sorted(read) == list(range(records)), f"epoch {epoch}"


@pytest.mark.parametrize(
    ("records", "global_batch", "said"),
    [
        (
            10,
            4,
            [
                "run    20 steps x 4 images = 80 images = 8 epochs; "
                "batches run on from one epoch into the next: every record counts"
            ],
        ),
        (
            3,
            8,
            [
                "run    20 steps x 8 images = 160 images = 53.33 epochs; "
                "batches run on from one epoch into the next: every record counts",
                "note   8 images / 3 records = 2.67 reads of each per step",
            ],
        ),
        (8, 4, ["run    20 steps x 4 images = 80 images = 10 epochs"]),
    ],
)
def test_the_equations_say_what_becomes_of_records_short_of_a_batch(write_config, records, global_batch, said):
    config = write_config(
        f"""\
model: {{kind: tiny}}
data: {{kind: shapes, image_size: 32, num_images: {records}}}
train: {{max_steps: 20, global_batch_size: {global_batch}}}
objective: {{kind: epsilon}}
lr: {{peak: 1e-4}}
"""
    )
    equations = preflight(load_config(config), rank=0, world_size=1).equations()
    start = next(index for index, line in enumerate(equations) if line.startswith("run"))
    assert equations[start:] == said


def test_epochs_and_seeds_have_different_orders():
    orders = {
        tuple(BatchPlan(range(50), s).record(50 * epoch + i) for i in range(50)) for s in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_a_slot_reads_the_same_record_whatever_was_read_before():
    plan = BatchPlan(range(1000), seed=1)
    forward = [plan.record(slot) for slot in range(900, 2100)]
    again = pickle.loads(pickle.dumps(plan))
    assert [again.record(slot) for slot in reversed(range(900, 2100))] == forward[::-1]


def test_without_shuffling_the_order_is_that_of_the_indices():
    plan = BatchPlan([4, 2, 9], seed=1, shuffle=False)
    assert [plan.record(slot) for slot in range(6)] == [4, 2, 9, 4, 2, 9]


def test_a_plan_is_small_whatever_it_read():
    plan = BatchPlan(range(1_000_000), seed=1)
    plan.record(5_000_000)
    assert len(pickle.dumps(plan)) < 500
