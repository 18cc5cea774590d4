"""What a compiler makes of the operations of a step: fewer kernels, which move fewer bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from counting import OF_WEIGHTS, PRODUCTS, Op

FUSED = "fused norms, activations, sums, casts"


def fused(ops: Sequence[Op]) -> list[Op]:
    """The operations with those of one block and one pass fused between its products.

    The assumption: within a block's forward, and within its backward, all norms, activations, sums, casts and copies
    that feed one another, or read the same, with no product (convolution, linear, attention) between them are one
    kernel. It reads each tensor from outside once and writes each tensor that others need once; where a backward needs
    what a forward kernel made and nobody else does, it is computed again from what that kernel had read. Products,
    casts of weights, and all outside of the blocks stay as they are. A compiler does less: a norm over more than a
    kernel holds at once is read twice, and sums over rows end a kernel.
    """
    maker: dict[int, int] = {}  # of a value: the index of the operation that wrote it
    level: list[int] = []  # products on the longest way to an operation: what has as many cannot wait for another
    first: dict[
        Any, int
    ] = {}  # by value, block, pass and level: the index of the first operation that touches the value
    group = list(range(len(ops)))

    def root(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for index, op in enumerate(ops):
        makers = [maker[value] for value in op.reads if value in maker]
        level.append(max((level[each] + (ops[each].part in PRODUCTS) for each in makers), default=0))
        if _fusible(op):
            for value in (*op.reads, *op.writes):
                group[root(index)] = root(first.setdefault((value, op.block, op.backward, level[index]), index))
        maker |= dict.fromkeys(op.writes, index)
    members: defaultdict[int, list[Op]] = defaultdict(list)
    for index, op in enumerate(ops):
        members[root(index)].append(op)
    return list(_merged(members.values()))


def _fusible(op: Op) -> bool:
    return op.block is not None and op.part not in (*PRODUCTS, OF_WEIGHTS)


def _merged(groups: Iterable[list[Op]]) -> Iterable[Op]:
    groups = list(groups)
    maker = {value: number for number, group in enumerate(groups) for op in group for value in op.writes}
    whole: dict[int, int] = {}
    for op in (each for group in groups for each in group):
        for value, size in (*op.reads.items(), *op.writes.items()):
            whole[value] = max(size, whole.get(value, 0))
    readers: defaultdict[int, set[int]] = defaultdict(set)
    for number, group in enumerate(groups):
        for op in group:
            for value in op.reads:
                readers[value].add(number)

    def again(value: int, number: int) -> bool:
        """Whether that group, of a backward, computes the value again instead of reading it."""
        made = maker.get(value)
        if made is None or not _fusible(groups[made][0]) or not _fusible(groups[number][0]):
            return False
        (block, backward), (of_block, in_backward) = groups[made][0].block or (0, 0), groups[number][0].block or (0, 0)
        return block == of_block and not backward and bool(in_backward)

    def kept(value: int, number: int) -> bool:
        return not readers[value] or any(each != number and not again(value, each) for each in readers[value])

    def outside(number: int) -> dict[int, int]:
        inside = {value for op in groups[number] for value in op.writes}
        sizes: Counter[int] = Counter()  # views of one tensor add up, to no more than all of it
        for op in groups[number]:
            sizes.update({value: size for value, size in op.reads.items() if value not in inside})
        return {value: min(size, whole[value]) for value, size in sizes.items()}

    for number, group in enumerate(groups):
        if not _fusible(group[0]):
            yield from group
            continue
        reads: dict[int, int] = {}
        for value, size in outside(number).items():
            reads |= outside(maker[value]) if again(value, number) and not kept(value, maker[value]) else {value: size}
        writes = {value: size for op in group for value, size in op.writes.items() if kept(value, number)}
        yield Op("fused", FUSED, reads, writes, backward=group[0].backward, block=group[0].block)
