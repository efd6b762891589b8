"""Secure aggregation between real devices' sessions and a coordinator process, over TLS."""

from __future__ import annotations

import numpy as np
from coordinator_help import Fleet, in_parallel
from masking_help import Masked, expected, joined, step_of, vector

from edge_runtime.bundle import Bundle
from edge_runtime.client import Client

MASKED = ("--secure-aggregation", "--min-devices", "3")


def play(bundle: Bundle, clients: list[Client], number: int, leaving: dict[int, str]) -> list[str]:
    """A round in which the devices in `leaving` vanish at a stage."""
    return in_parallel(
        *(
            lambda index=index, client=client: Masked(client, number).run(
                step_of(bundle, index, number), until=leaving.get(index)
            )
            for index, client in enumerate(clients)
        )
    )


def test_the_sum_is_exact_when_all_stay(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, *MASKED, "--rounds", "2")
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(4)))
    for _ in range(2):
        number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
        start = vector(bundle, clients[0].download(number))
        assert play(bundle, clients, number, {}) == [""] * 4
        served.wait_for("round_closed", round=number)
        steps = [step_of(bundle, index, number) for index in range(4)]
        got = vector(bundle, clients[0].download(number + 1))
        np.testing.assert_array_equal(got, expected(start, steps, group=4))
