"""Check-ins of many devices at once."""

import asyncio
import itertools
from contextlib import closing
from pathlib import Path

from coordinator_help import make_manifest

from coordinator.aggregation import Recipe
from coordinator.policy import Policy
from coordinator.rounds import Rounds
from coordinator.state import State
from coordinator.tables import Settings
from protos import coordinator_pb2 as pb

DEVICES = 50


def test_devices_that_wait_are_answered_one_by_one(tmp_path: Path) -> None:
    """So that whoever calls meanwhile need not wait until all have been."""
    manifest = make_manifest()
    with closing(State(tmp_path)) as whole:
        state = whole.of("base")
        settings = Settings(contract_sha256="", rounds=1, min_devices=DEVICES + 1)
        settings.deadline_seconds, settings.recipe, settings.training = 60.0, "", "{}"
        state.begin(settings, b"generalist")
        rounds = Rounds(
            state=state,
            manifest=manifest,
            manifests={},
            policy=Policy(
                rounds=1,
                min_devices=DEVICES + 1,
                deadline_seconds=60.0,
                recipe=Recipe(),
                selection=None,
                masking=None,
                gate=None,
                privacy=None,
                buffering=None,
                training=pb.TrainingConfig(),
            ),
            report=lambda *_: None,
        )
        answered = asyncio.run(answered_in_turns(rounds))
    steps = [after - before for before, after in itertools.pairwise(answered)]
    assert sum(steps) == DEVICES
    assert max(steps) <= 2


async def answered_in_turns(rounds: Rounds) -> list[int]:
    """How many had been answered in each turn of the event loop from when they were to be."""
    tasks = [asyncio.create_task(rounds.check_in(f"{i}", 30.0)) for i in range(DEVICES)]
    await asyncio.sleep(0)  # they wait now
    rounds.stop()
    answered = [0]
    while answered[-1] < DEVICES:
        await asyncio.sleep(0)
        answered.append(sum(task.done() for task in tasks))
    assert {task.result().action for task in tasks} == {pb.CheckInReply.WAIT}
    return answered
