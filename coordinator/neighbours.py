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

from edge_runtime.neighbours import Graph

COLLUDING_SHARE = 0.2
SECRET_BITS = 40
RESTORED_BITS = 20
# Keys and certificates of as many fit one message.
MAX_NEIGHBOURS = 300
# Below it, all-to-all costs little.
COMPLETE_UP_TO = 64


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
    colluding = math.floor(COLLUDING_SHARE * devices)
    dropping = devices - least
    for degree in range(2, min(devices - 2, MAX_NEIGHBOURS) + 1, 2):
        threshold = (degree + 1) // 2 + 1
        apart = degree / 2 * math.log2(min(1.0, (colluding + dropping) / devices))
        if (
            math.log2(devices) + apart <= -SECRET_BITS
            and _bits(devices, colluding, degree, range(threshold, degree + 1)) <= -SECRET_BITS
            and _bits(devices, least, degree, range(threshold)) <= -RESTORED_BITS
        ):
            return Graph(devices, degree, threshold)
    if complete.degree <= MAX_NEIGHBOURS:
        return complete
    raise ValueError(
        f"a group of {devices} devices of which {staying:.0%} need to stay takes more than "
        f"{MAX_NEIGHBOURS} neighbours for each; raise --secure-threshold, or select fewer devices"
    )


def least_devices(devices: int, staying: float) -> int:
    """Of `devices`, those that have to stay."""
    # Rounded first: 0.7 * 10 is a little more than 7.
    return math.ceil(round(devices * staying, 6))


def _bits(devices: int, marked: int, degree: int, hits: range) -> float:
    """log2 of (a bound of) the probability that of the neighbours of any device, drawn from the
    others, as many as in `hits` are `marked`: hypergeometric, times the devices."""
    others = devices - 1
    marked = min(marked, others)
    logs = [
        _log_choose(marked, hit)
        + _log_choose(others - marked, degree - hit)
        - _log_choose(others, degree)
        for hit in hits
        if max(0, degree - (others - marked)) <= hit <= min(marked, degree)
    ]
    if not logs:
        return -math.inf
    largest = max(logs)
    total = largest + math.log(sum(math.exp(log - largest) for log in logs))
    return (total + math.log(devices)) / math.log(2)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
