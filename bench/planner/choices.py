"""Whether the fastest of rivals by prediction is it by measurement too, and what it costs if not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.planner.truth import Pair

# Two that differ by less are as good.
TIE = 0.03


@dataclass(frozen=True)
class Choice:
    """Of all groups of rivals of one quantity.

    Attributes:
        hit: share of groups whose pick is within :data:`TIE` of the best.
        regret: mean of (time of the pick / best time - 1); of a rate, best rate / rate of the pick - 1.
        of_three: median of what the best of the first three picks costs.
    """

    file: str
    quantity: str
    groups: int
    hit: float
    regret: float
    worst_regret: float
    of_three: float
    floor_hit: float
    floor_regret: float


def choice_of(file: str, pairs: Sequence[Pair]) -> Choice | None:
    """None where no group has rivals."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.group:
            groups[pair.group].append(pair)
    rivals = [group for group in groups.values() if len(group) > 1]
    if not rivals:
        return None
    ours = [regret(group, lambda pair: pair.predicted) for group in rivals]
    floors = [regret(group, lambda pair: pair.floor) for group in rivals]
    count = len(rivals)
    return Choice(
        file,
        pairs[0].quantity,
        count,
        hit=sum(each <= TIE for each in ours) / count,
        regret=sum(ours) / count,
        worst_regret=max(ours),
        of_three=median(regret(group, lambda pair: pair.predicted, picks=3) for group in rivals),
        floor_hit=sum(each <= TIE for each in floors) / count,
        floor_regret=sum(floors) / count,
    )


def regret(group: Sequence[Pair], guess: Callable[[Pair], float], *, picks: int = 1) -> float:
    """What the best of the first ``picks`` by ``guess`` costs over the best of the group, as a share."""
    times = group[0].unit == "s"
    picked = sorted(group, key=guess, reverse=not times)[:picks]
    if times:
        return min(pair.measured for pair in picked) / min(pair.measured for pair in group) - 1
    return max(pair.measured for pair in group) / max(pair.measured for pair in picked) - 1
