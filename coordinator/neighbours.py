"""How many neighbours the devices of a masking group have, and how many shares restore a secret.

Small groups are complete: all share with all. In a large one each device has k neighbours, drawn
at random (SecAgg+, Bell et al. 2020): numbers are dealt out at random, and each device is joined to
the k / 2 next ones on either side of a circle. k is the smallest even number with which, of n
devices,

* there is a device of whose k neighbours a threshold collude with the coordinator with a
  probability of at most 2^-40, if a fifth of all devices do;
* the others that stay are not connected with at most 2^-40;
* there is a secret of which less than a threshold of shares stay with at most 2^-20, if as many
  devices drop out as may.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np

from edge_runtime.neighbours import COMPLETE_UP_TO, Graph

RESTORED_BITS = 20
# Keys and certificates of as many fit one message.
MAX_NEIGHBOURS = 300


@functools.lru_cache(maxsize=64)
def graph_for(devices: int, staying: float) -> Graph:
    """The graph of a group of which a share `staying`, more than a half, is to stay to the end.

    Raises:
        ValueError: it takes more neighbours than MAX_NEIGHBOURS; one line says what to do.
    """
    least = least_devices(devices, staying)
    complete = Graph(devices, devices - 1, max(least, devices // 2 + 1))
    if devices <= COMPLETE_UP_TO:
        return complete
    for degree in range(2, min(devices - 2, MAX_NEIGHBOURS) + 1, 2):
        graph = Graph(devices, degree, threshold=(degree + 1) // 2 + 1)
        if not graph.hides(least):
            continue
        if graph.log_probability(least, range(graph.threshold)) <= -RESTORED_BITS:
            return graph
    if complete.degree <= MAX_NEIGHBOURS:
        return complete
    raise ValueError(
        f"a group of {devices} devices of which {staying:.0%} need to stay takes more than "
        f"{MAX_NEIGHBOURS} neighbours for each; raise --secure-threshold, or select fewer devices"
    )


def enough_signers(graph: Graph, signers: Iterable[int], quorum: int) -> list[int]:
    """Of `signers`, which bind a group, not many more than it takes for that."""
    kept = sorted(signers)
    if graph.is_complete:
        return kept[:quorum]
    devices, reach = graph.devices, graph.degree // 2
    held, around = graph.shares(kept), np.arange(-reach, reach + 1)
    before = dict(zip(kept, [kept[-1], *kept], strict=False))
    after = dict(zip(kept, [*kept[1:], kept[0]], strict=True))
    wide = sum((after[number] - number) % devices > reach for number in kept)  # gaps: at most one
    for number in kept:
        if len(after) <= quorum:
            break
        last, following = before[number], after[number]
        gaps = [(number - last) % devices, (following - number) % devices]
        then = wide - sum(gap > reach for gap in gaps) + (sum(gaps) > reach)
        near = (number - 1 + around) % devices
        if then > 1 or held[near].min() <= graph.threshold:
            continue
        held[near] -= 1
        wide, after[last], before[following] = then, following, last
        del after[number]
    return list(after)


def least_devices(devices: int, staying: float) -> int:
    """Of `devices`, those that have to stay."""
    # Rounded first: 0.7 * 10 is a little more than 7.
    return math.ceil(round(devices * staying, 6))
