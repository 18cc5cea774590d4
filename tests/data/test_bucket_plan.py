"""With buckets, too, which record a slot reads is computed, never stored."""

import pickle
from collections import Counter
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest

from trainer.data.buckets import HELD_OUT, LEFT_OUT, OUT_OF_SCALE, Bucket, make_buckets
from trainer.data.plan import BatchPlan, BucketPlan, Members
from trainer.data.topology import deal
from trainer.errors import UserError
from trainer.rng import Permutation

BUCKETS = make_buckets([512], 64, 2.0)
KINDS: list[Literal["run_on", "drop"]] = ["run_on", "drop"]


def coded(counts: list[int], seed: int = 0, **others: int) -> np.ndarray:
    """Codes with so many records of each bucket, and of the other codes, in random places."""
    names = {"held_out": HELD_OUT, "left_out": LEFT_OUT, "out_of_scale": OUT_OF_SCALE}
    each = [*enumerate(counts), *((names[name], n) for name, n in others.items())]
    codes = np.concatenate([np.full(n, code, np.uint8) for code, n in each])
    return np.random.default_rng(seed).permutation(codes)


def planned(counts: list[int], global_batch: int, seed: int = 0, remainder: Literal["run_on", "drop"] = "run_on"):
    codes = coded(counts, held_out=7, left_out=3)
    return codes, BucketPlan(Members(codes), BUCKETS[: len(counts)], global_batch, seed, remainder)


def batches_of(plan: BucketPlan, first: int, last: int) -> list[list[int]]:
    size = plan.global_batch
    return [[plan.record(slot) for slot in range(step * size, (step + 1) * size)] for step in range(first, last)]


def first_step(plan: BucketPlan, epoch: int) -> int:
    return sum(map(plan.steps, range(epoch)))


def cases() -> list[tuple[list[int], int]]:
    """Numbers of records per bucket, and a global batch: the edges and many at random."""
    fixed = [([1], 1), ([1], 8), ([0, 1, 0], 4), ([40, 0, 0], 8), ([3, 2, 1], 100), ([8, 16, 24], 8), ([7, 1, 300], 8)]
    draw = np.random.default_rng(5)
    for _ in range(30):
        counts = draw.integers(0, draw.choice([3, 20, 200]), draw.integers(1, 6)).tolist()
        counts[0] += 1
        fixed.append((counts, int(draw.integers(1, 40))))
    return fixed


@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 20_000])
def test_members_are_the_records_of_a_code_in_order(n):
    codes = np.random.default_rng(n).choice(np.array([0, 1, 9, HELD_OUT], np.uint8), n, p=[0.6, 0.3999, 0.0001, 0])
    codes[n // 2] = HELD_OUT
    members = Members(codes)
    assert len(members) == n
    for code in (0, 1, 2, 9, HELD_OUT):
        expected = np.flatnonzero(codes == code).tolist()
        assert members.count(code) == len(members.of(code)) == len(expected)
        assert [members.member(code, j) for j in range(len(expected))] == expected == list(members.of(code))
        assert all(type(each) is int for each in members.of(code))


def test_members_that_are_not_adjacent_are_found_over_empty_blocks():
    codes = np.full(50_000, LEFT_OUT, np.uint8)
    codes[[0, 4095, 40_000, 49_999]] = 3
    members = Members(codes)
    assert members.of(3)[:] == list(members.of(3)) == [0, 4095, 40_000, 49_999]
    assert members.of(3)[-1] == 49_999
    assert members.of(3)[1:3] == [4095, 40_000]
    with pytest.raises(AssertionError, match="member 4 of 4"):
        members.member(3, 4)
    with pytest.raises(IndexError):
        members.of(3)[4]
    assert Members(codes[:0]).count(3) == 0


def test_a_plan_without_buckets_reads_members_as_it_reads_their_list():
    codes = coded([900], held_out=100)
    listed = BatchPlan(np.flatnonzero(codes == 0).tolist(), seed=4)
    computed = BatchPlan(Members(codes).of(0), seed=4)
    assert [computed.record(slot) for slot in range(2000)] == [listed.record(slot) for slot in range(2000)]
    assert computed.bucket(0) is None


def test_members_take_little_more_than_the_codes_to_pickle():
    codes = np.random.default_rng(0).integers(0, 40, 1_000_000).astype(np.uint8)
    members = Members(codes)
    counts = len(pickle.dumps(members)) - codes.nbytes
    assert 0 < counts < 1_000_000 / 4096 * 40 * 4 * 1.2
    again = pickle.loads(pickle.dumps(members))
    assert [again.member(3, j) for j in range(500)] == [members.member(3, j) for j in range(500)]


def test_members_of_a_whole_mapped_file_pickle_without_its_bytes(tmp_path):
    codes = coded([12_000, 8_000])
    codes.tofile(tmp_path / "codes")
    members = Members(np.memmap(tmp_path / "codes", np.uint8, mode="r"))
    assert len(pickle.dumps(members)) < 2000
    part = Members(np.memmap(tmp_path / "codes", np.uint8, mode="r")[50:])
    for each, start in ((members, 0), (part, 50)):
        again = pickle.loads(pickle.dumps(each))
        assert again.of(1)[:] == np.flatnonzero(codes[start:] == 1).tolist()


@pytest.mark.parametrize(("counts", "global_batch"), cases())
def test_over_e_epochs_every_record_is_read_e_times_but_for_a_few_ahead(counts, global_batch):
    codes, plan = planned(counts, global_batch)
    read, epochs = Counter(), 5
    for epoch in range(epochs):
        for batch in batches_of(plan, first_step(plan, epoch), first_step(plan, epoch + 1)):
            read.update(batch)
        for code, n in enumerate(counts):
            of_bucket = [read[index] for index in np.flatnonzero(codes == code).tolist()]
            if n:
                assert min(of_bucket) >= epoch + 1
                assert max(of_bucket) <= epoch + 1 + -(-(global_batch - 1) // n)
                assert sum(of_bucket) == -(-(epoch + 1) * n // global_batch) * global_batch
                assert sum(of_bucket) - (epoch + 1) * n <= global_batch - 1
    assert {int(codes[index]) for index in read} == {code for code, n in enumerate(counts) if n}


@pytest.mark.parametrize("remainder", KINDS)
@pytest.mark.parametrize(("counts", "global_batch"), cases())
def test_all_slots_of_a_global_batch_are_of_one_bucket(counts, global_batch, remainder):
    if remainder == "drop":  # some bucket has to fill a batch
        counts = [*counts[:-1], max(counts[-1], global_batch)]
    codes, plan = planned(counts, global_batch, remainder=remainder)
    for step in range(60):
        slots = range(step * global_batch, (step + 1) * global_batch)
        assert {BUCKETS[codes[plan.record(slot)]] for slot in slots} == {plan.bucket(slot) for slot in slots}
        assert len({plan.bucket(slot) for slot in slots}) == 1


@pytest.mark.parametrize(("counts", "global_batch"), cases())
def test_what_is_said_to_be_repeated_is_what_is_read_more_than_once(counts, global_batch):
    _, plan = planned(counts, global_batch)
    for epoch in range(4):
        read = Counter()
        for batch in batches_of(plan, first_step(plan, epoch), first_step(plan, epoch + 1)):
            read.update(batch)
        said = list(plan.repeated(epoch))
        assert dict(said) == {index: reads for index, reads in read.items() if reads > 1}
        assert len(dict(said)) == len(said)
        assert list(plan.dropped(epoch)) == []
    rows = plan.table()
    assert sum(row.repeats for row in rows) == sum(reads - 1 for _, reads in plan.repeated(0))
    assert sum(row.batches for row in rows) == plan.steps(0)
    assert [row.records for row in rows] == [n for n in counts if n]
    assert sum(row.dropped for row in rows) == 0


@pytest.mark.parametrize(("counts", "global_batch"), cases())
def test_what_is_said_to_be_dropped_is_what_is_not_read(counts, global_batch):
    if max(counts) < global_batch:
        with pytest.raises(UserError, match="no bucket fills a batch"):
            planned(counts, global_batch, remainder="drop")
        return
    codes, plan = planned(counts, global_batch, remainder="drop")
    everything = set(np.flatnonzero(codes < len(counts)).tolist())
    for epoch in range(4):
        read = [
            index for batch in batches_of(plan, first_step(plan, epoch), first_step(plan, epoch + 1)) for index in batch
        ]
        assert len(set(read)) == len(read)
        dropped = list(plan.dropped(epoch))
        assert len(dropped) == sum(n % global_batch for n in counts) == sum(row.dropped for row in plan.table())
        assert set(dropped) == everything - set(read)
        assert list(plan.repeated(epoch)) == []
        assert plan.steps(epoch) == sum(n // global_batch for n in counts) == sum(row.batches for row in plan.table())
    assert sum(row.repeats for row in plan.table()) == 0


def test_other_records_are_dropped_in_other_epochs():
    _, plan = planned([103, 57], 10, remainder="drop")
    dropped = [tuple(plan.dropped(epoch)) for epoch in range(6)]
    assert len(set(dropped)) == 6


@pytest.mark.parametrize("remainder", KINDS)
def test_the_steps_of_the_epochs_follow_each_other(remainder):
    _, plan = planned([5, 61, 17], 8, remainder=remainder)
    step = 0
    for epoch in range(50):
        for _ in range(plan.steps(epoch)):
            assert plan.epoch(step) == epoch
            step += 1
    assert [plan.epoch(each) for each in (10**9, 0)] == [(10**9 * 8) // 83 if remainder == "run_on" else 10**9 // 9, 0]


def test_an_epoch_smaller_than_a_batch_may_have_none():
    _, plan = planned([3], 8)
    assert [plan.steps(epoch) for epoch in range(8)] == [1, 0, 1, 0, 0, 1, 0, 0]
    assert [plan.epoch(step) for step in range(4)] == [0, 2, 5, 8]
    assert sorted(Counter(plan.record(slot) for slot in range(24)).values()) == [8, 8, 8]


@pytest.mark.parametrize("remainder", KINDS)
def test_a_slot_reads_the_same_record_whatever_was_read_before(remainder):
    counts = [300, 11, 64]
    _, plan = planned(counts, 16, seed=3, remainder=remainder)
    walked = [(plan.record(slot), plan.bucket(slot)) for slot in range(16 * 100)]
    late = range(16 * 80, 16 * 100)
    _, fresh = planned(counts, 16, seed=3, remainder=remainder)
    assert [(fresh.record(slot), fresh.bucket(slot)) for slot in late] == walked[late.start :]
    again = pickle.loads(pickle.dumps(plan))
    for slot in np.random.default_rng(0).permutation(len(walked)).tolist():
        assert (again.record(slot), again.bucket(slot)) == walked[slot]


@pytest.mark.parametrize("remainder", KINDS)
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 4)])
def test_any_topology_reads_the_same_batches_of_one_bucket(world_size, micro_batch, remainder):
    global_batch, steps = 12, 40
    _, alone = planned([90, 25, 14], global_batch, remainder=remainder)
    expected = [sorted(batch) for batch in batches_of(alone, 0, steps)]
    read: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        _, plan = planned([90, 25, 14], global_batch, remainder=remainder)  # each rank has its own
        topology = deal(global_batch, micro_batch, rank, world_size)
        for step in range(steps):
            for slots in topology.slots(step):
                assert {plan.bucket(slot) for slot in slots} == {alone.bucket(step * global_batch)}
                read[step] += map(plan.record, slots)
    assert [sorted(batch) for batch in read] == expected


def test_every_seed_and_epoch_has_other_orders_of_batches_and_records():
    orders, shapes = set(), set()
    for seed in (0, 1):
        _, plan = planned([160, 160], 16, seed=seed)
        for epoch in (0, 1):
            batches = batches_of(plan, 20 * epoch, 20 * (epoch + 1))
            orders.add(tuple(map(tuple, batches)))
            shapes.add(tuple(plan.bucket(16 * step) for step in range(20 * epoch, 20 * (epoch + 1))))
    assert len(orders) == len(shapes) == 4


def test_batches_of_different_buckets_are_mixed():
    _, plan = planned([800, 800], 16)
    shapes = [plan.bucket(16 * step) for step in range(plan.steps(0))]
    changes = sum(one != other for one, other in pairwise(shapes))
    assert 30 < changes < 70, "of 100 batches about half follow one of the other bucket"


def test_a_bucket_that_is_added_leaves_the_order_within_the_others_alone():
    codes = coded([50, 0, 70])
    few = BucketPlan(Members(codes), BUCKETS[:3], 10, seed=2)
    more = np.concatenate([codes, np.full(40, 1, np.uint8)])
    many = BucketPlan(Members(more), BUCKETS[:3], 10, seed=2)

    def stream(plan: BucketPlan, bucket: Bucket) -> list[list[int]]:
        steps = [step for step in range(plan.steps(0)) if plan.bucket(10 * step) == bucket]
        return sorted(batch for step in steps for batch in batches_of(plan, step, step + 1))

    for bucket in (BUCKETS[0], BUCKETS[2]):
        assert stream(few, bucket) == stream(many, bucket)


@pytest.mark.parametrize("remainder", KINDS)
def test_a_plan_does_not_depend_on_how_the_buckets_are_numbered(remainder):
    codes, plan = planned([50, 33, 70], 10, remainder=remainder)
    turned = np.where(codes < 3, 2 - codes, codes).astype(np.uint8)
    other = BucketPlan(Members(turned), BUCKETS[:3][::-1], 10, 0, remainder)
    assert batches_of(other, 0, 40) == batches_of(plan, 0, 40)
    assert other.table() == plan.table()


def test_a_plan_is_the_same_in_every_version():
    # A change here reorders the records of every run that is resumed.
    codes = np.arange(20, dtype=np.uint8) % 3
    plan = BucketPlan(Members(codes), [Bucket(64, 64), Bucket(32, 128), Bucket(128, 32)], 4, seed=1)
    assert " ".join(str(plan.bucket(4 * step)) for step in range(6)) == "32x128 32x128 64x64 128x32 64x64 128x32"
    assert batches_of(plan, 0, 6) == [
        [19, 7, 1, 13],
        [4, 16, 10, 19],
        [15, 3, 6, 9],
        [17, 14, 5, 8],
        [9, 18, 0, 12],
        [11, 2, 8, 11],
    ]


def test_the_stream_of_one_bucket_is_one_permutation_after_the_other():
    codes, plan = planned([43], 8)
    indices = np.flatnonzero(codes == 0).tolist()
    orders = [Permutation(43, 0, f"bucket order {BUCKETS[0]}", epoch) for epoch in range(8)]
    stream = [indices[order[place]] for order in orders for place in range(43)]
    batches = [stream[8 * number : 8 * number + 8] for number in range(43)]
    for epoch in range(8):
        first, last = first_step(plan, epoch), first_step(plan, epoch + 1)
        assert sorted(batches_of(plan, first, last)) == sorted(batches[first:last])


def test_a_million_records_cost_no_more_to_start_an_epoch_of_than_ten(monkeypatch):
    calls = Counter[str]()
    member = Members.member

    def counted(self: Members, code: int, number: int) -> int:
        calls["member"] += 1
        return member(self, code, number)

    monkeypatch.setattr(Members, "member", counted)
    codes = np.random.default_rng(0).integers(0, 5, 1_000_000).astype(np.uint8)
    plan = BucketPlan(Members(codes), BUCKETS, 256, seed=0)
    plan.record(256 * first_step(plan, 3))
    assert calls["member"] == 1
    assert len(pickle.dumps(plan)) < 1.1 * 1_000_000


def test_without_any_record_in_a_bucket_the_causes_are_counted():
    members = Members(coded([0], held_out=2, out_of_scale=5))
    with pytest.raises(UserError, match=r"no record is in any bucket: 2 held out, 5 too small or too large\n  in data"):
        BucketPlan(members, BUCKETS, 4, 0)
    with pytest.raises(UserError, match="there is none"):
        BucketPlan(Members(np.zeros(0, np.uint8)), BUCKETS, 4, 0)


def test_dropping_all_records_is_refused_with_the_largest_usable_batch():
    codes = coded([3, 7])
    with pytest.raises(
        UserError, match=r"448x576 has the most records, 7.*\n  in train.global_batch_size\n  7 or less"
    ):
        BucketPlan(Members(codes), BUCKETS, 8, 0, "drop")
    assert BucketPlan(Members(codes), BUCKETS, 7, 0, "drop").steps(0) == 1
