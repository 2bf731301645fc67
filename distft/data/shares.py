"""How the sources of a mixture share sequences: by whole numbers, as evenly as possible. Arithmetic only."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from distft.errors import ConfigError

_MAX_PERIOD = 100_000  # sequences; the assignment of one period is a table in memory


def integer_shares(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportion of `weights`.

    Raises `ConfigError` for a weight that is not a finite number above 0, and for a sum of shares above
    100,000.
    """
    exact = [Fraction(str(weight)) if math.isfinite(weight) else Fraction(0) for weight in weights]
    problems = [
        f"weight={weight} of source {i}: a weight is a number above 0; leave the source out instead."
        for i, (weight, fraction) in enumerate(zip(weights, exact, strict=True))
        if fraction <= 0
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    common_denominator = math.lcm(*(fraction.denominator for fraction in exact))
    numerators = [int(fraction * common_denominator) for fraction in exact]
    divisor = math.gcd(*numerators)
    shares = [numerator // divisor for numerator in numerators]
    if sum(shares) > _MAX_PERIOD:
        raise ConfigError(
            f"The weights {', '.join(str(weight) for weight in weights)} have a period of {sum(shares):,} "
            f"sequences, and the limit is {_MAX_PERIOD:,}: round the weights to fewer digits."
        )
    return shares


def chairman_assignment(shares: Sequence[int]) -> list[int]:
    """Assign sum(shares) slots to datasets; every prefix is within one slot of the exact proportions.

    Item `j` of a dataset with `share` of `period` slots may not take a slot before `j * period / share` (the
    dataset would be one ahead) nor after `(j + 1) * period / share` (one behind). Giving each slot to the
    eligible item with the earliest deadline meets all deadlines if any schedule does, and Tijdeman (The
    chairman assignment problem, 1980) proved that one exists.
    """
    period = sum(shares)
    waiting = [(0, dataset) for dataset, share in enumerate(shares) if share]  # (first slot, dataset)
    ready: list[tuple[int, int]] = []  # (last slot, dataset)
    num_assigned = [0] * len(shares)
    slots = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, dataset = heapq.heappop(waiting)
            deadline = -(-(num_assigned[dataset] + 1) * period // shares[dataset]) - 1
            heapq.heappush(ready, (deadline, dataset))
        _, dataset = heapq.heappop(ready)
        slots.append(dataset)
        num_assigned[dataset] += 1
        if num_assigned[dataset] < shares[dataset]:
            heapq.heappush(waiting, (num_assigned[dataset] * period // shares[dataset], dataset))
    return slots
