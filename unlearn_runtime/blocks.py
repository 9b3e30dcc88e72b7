"""Assigns every trainable number of a network to one block."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from rdp_calc.errors import GuardFailed
from unlearn_runtime.projections import Range

#: The columns of one block, as disjoint ranges of the flat vector in ascending order.
Block = tuple[Range, ...]


def make_blocks(
    split: str | tuple[tuple[str, ...], ...], *, ranges: dict[str, Range], size: int, count: int
) -> tuple[Block, ...]:
    """``count`` blocks that partition the flat vector of ``size`` numbers.

    split: "layers" keeps the tensors of one module together and groups consecutive modules into blocks of nearly equal
    size; "equal" cuts the vector into contiguous parts whose sizes differ by one at most; otherwise one list of shell
    patterns of tensor names a block. ranges: tensor name -> its columns, in the order of the vector.

    Raises GuardFailed where there are fewer layers or numbers than blocks, another number of lists than ``count``, and
    for a tensor in no list or in several, or a pattern that matches none.
    """
    if split == "equal":
        if size < count:
            raise GuardFailed(f"the model has {size} parameters, too few for {count} blocks; plan with fewer blocks.")
        ends = [size * j // count for j in range(count + 1)]
        return tuple(((ends[j], ends[j + 1]),) for j in range(count))
    if split == "layers":
        return _by_layers(ranges, count)
    assert not isinstance(split, str)
    return _by_patterns(split, ranges, count)


def _by_layers(ranges: dict[str, Range], count: int) -> tuple[Block, ...]:
    layers: dict[str, list[Range]] = {}
    for name, part in ranges.items():
        layers.setdefault(name.rpartition(".")[0], []).append(part)
    if len(layers) < count:
        raise GuardFailed(
            f"the model has {len(layers)} layers with parameters, too few for {count} blocks; plan with fewer blocks,"
            " or --block-by equal."
        )
    parts = list(layers.values())
    sizes = [sum(stop - start for start, stop in layer) for layer in parts]
    total, ends = sum(sizes), [0]
    for j in range(1, count):
        # The cut nearest to j/count of all numbers that leaves a layer for every block.
        candidates = range(ends[-1] + 1, len(parts) - (count - j) + 1)
        ends.append(min(candidates, key=lambda end: abs(sum(sizes[:end]) * count - j * total)))
    ends.append(len(parts))
    return tuple(_merged([part for layer in parts[ends[j] : ends[j + 1]] for part in layer]) for j in range(count))


def _by_patterns(split: Sequence[Sequence[str]], ranges: dict[str, Range], count: int) -> tuple[Block, ...]:
    if len(split) != count:
        raise GuardFailed(f"the plan names {len(split)} blocks of tensors but has numbers for {count}; plan again.")
    homes: dict[str, list[int]] = {name: [] for name in ranges}
    for j, patterns in enumerate(split):
        for pattern in patterns:
            matching = [name for name in ranges if fnmatchcase(name, pattern)]
            if not matching:
                raise GuardFailed(f"block pattern {pattern} matches no trained tensor of the model.")
            for name in matching:
                if j not in homes[name]:
                    homes[name].append(j)
    for name, found in homes.items():
        if len(found) != 1:
            where = "no block" if not found else f"blocks {', '.join(map(str, found))}"
            raise GuardFailed(f"tensor {name} is in {where}; every trained tensor must be in exactly one.")
    return tuple(_merged([part for name, part in ranges.items() if homes[name] == [j]]) for j in range(count))


def _merged(parts: list[Range]) -> Block:
    """The ranges in ascending order, neighbours joined."""
    found: list[Range] = []
    for start, stop in sorted(parts):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)
