"""A coordinator that lies: `python lying_coordinator.py FIRST serve ...`, like `comigs`.

Until round FIRST it is honest. From then on each round has the next one of LIES, told by the real
service over real sockets; of what devices say it believes everything.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import coordinator.server
from coordinator.secure_aggregation import SecureAggregation
from coordinator.tables import MaskingGroup, MaskingStage, MaskingStanding
from edge_runtime.identity import new_key, sign
from edge_runtime.masking import public_key
from edge_runtime.secure_aggregation import bitmap
from protos import coordinator_pb2 as pb

FIRST = 1


class Lying(SecureAggregation):
    """With the lies' hooks; each is honest here."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: dict[int, pb.MaskingGroup] = {}

    def _check_agreed(self, _: object, standing: Any, *__: object) -> Any:
        return standing

    def _check_revealed(self, _: object, standing: Any, *__: object) -> Any:
        return standing

    def _lie(self, number: int) -> str:
        return [*["none"] * FIRST, *LIES][number]

    def _all_but(self, group: MaskingGroup, left_out: int) -> pb.Survivors:
        """What an honest coordinator tells, and that one more has dropped out."""
        sharers, summed = self._ends(group)
        dropped = (sharers - summed) | {left_out}
        summed = summed - {left_out}
        devices = pb.MaskingGroup.FromString(group.terms).devices
        return pb.Survivors(summed=bitmap(summed, devices), dropped=bitmap(dropped, devices))

    def _seen_by(self, group: MaskingGroup, index: int) -> pb.MaskingGroup:
        seen = super()._seen_by(group, index)
        earlier = self.seen.setdefault(index, seen)
        lie = self._lie(group.round)
        if lie == "replaced keys":
            seen.neighbours[0].keys.mask_key = public_key(os.urandom(32))
        elif lie == "keys of another round":
            by_enrolment = {each.keys.certificate: each.keys for each in earlier.neighbours}
            for each in seen.neighbours:
                if each.keys.certificate in by_enrolment:
                    each.keys.CopyFrom(by_enrolment[each.keys.certificate])
        return seen

    def _last(self, standing: MaskingStanding, group: MaskingGroup) -> pb.AggregateReply:
        index, lie = standing.number, self._lie(group.round)
        assert index is not None
        following = index % pb.MaskingGroup.FromString(group.terms).devices + 1
        if not standing.agreed:
            if lie == "no agreement":
                return pb.AggregateReply(unmask=self._unmasking(group))
            if lie in (
                "two sets",
                "two sets, signatures made up",
                "two sets, signatures held back",
            ):
                return pb.AggregateReply(agree=self._all_but(group, following))
        elif lie == "a second set":
            return pb.AggregateReply(agree=self._all_but(group, following))
        elif lie == "two sets, signatures held back" and group.stage == MaskingStage.UNMASK:
            return pb.AggregateReply(unmask=pb.Unmasking())
        return super()._last(standing, group)

    def _unmasking(self, group: MaskingGroup) -> pb.Unmasking:
        unmasking = super()._unmasking(group)
        if self._lie(group.round) == "two sets, signatures made up":
            key = new_key()
            message = self._what_is_agreed(group)
            for each in unmasking.agreed:
                each.signature = sign(key, message)
        return unmasking


LIES = {
    "two sets": "told another device of other survivors",
    "two sets, signatures made up": "passes on what none signed",
    "two sets, signatures held back": "1 devices confirm who is summed up, and 3 are needed",
    "a second set": "tells of survivors in two ways",
    "no agreement": "before devices agreed on who is summed up",
    "replaced keys": "not signed for this round",
    "keys of another round": "not signed for this round",
}
"""What devices should say of each."""


if __name__ == "__main__":
    FIRST = int(sys.argv.pop(1))
    coordinator.server.SecureAggregation = Lying  # type: ignore[misc]
    from edge_runtime.cli import main

    sys.exit(main())
