"""Group commit: what many calls want to be durable becomes so together.

A commit waits for the disk, however little it writes. It does so in a thread, so that the event
loop goes on; what comes meanwhile is gathered and is the next commit. Each change is decided upon
just before its commit, in turn, and nobody else may change the rounds until that is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class _Wanted(Generic[R]):
    who: str
    decide: Callable[[list[R]], R | None]
    after: Callable[[R], None]
    done: asyncio.Future[R | None]


class Commits(Generic[R]):
    """Commits of rows R, or whatever says what is to change."""

    def __init__(self, commit: Callable[[list[R]], None]) -> None:
        """
        Args:
            commit: makes changes durable, all or none; runs in a thread.
        """
        self._commit = commit
        self._wanted: list[_Wanted[R]] = []
        self._running: asyncio.Task[None] | None = None
        self.still = asyncio.Lock()
        """Held during a commit; whoever holds it may decide and change what it depends on."""

    async def make(
        self,
        who: str,
        decide: Callable[[list[R]], R | None],
        after: Callable[[R], None] = lambda _: None,
    ) -> R | None:
        """Makes the change that `decide` wants; durable on return.

        Args:
            who: it is about; in one commit there is one change of each.
            decide: gets the changes that will be in the same commit. None: there is no need.
            after: is told of a change that was made, also when whoever wanted it has gone.

        Raises:
            What `decide` and the commit raise; nothing has changed then.
        """
        done = asyncio.get_running_loop().create_future()
        self._wanted.append(_Wanted(who, decide, after, done))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        change: R | None = await done
        return change

    async def _run(self) -> None:
        try:
            while self._wanted:
                async with self.still:
                    await self._commit_wanted()
        finally:
            self._running = None

    async def settled(self) -> None:
        """Returns when nothing is to be committed."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def _commit_wanted(self) -> None:
        changes: list[R] = []
        waiting = list(self._decided(changes))
        if not changes:
            return
        try:
            await asyncio.to_thread(self._commit, changes)
        except Exception as error:  # for everybody who waits to deal with
            for wanted in waiting:
                if not wanted.done.done():
                    wanted.done.set_exception(error)
        else:
            made = list(zip(waiting, changes, strict=True))
            for wanted, change in made:
                if not wanted.done.done():
                    wanted.done.set_result(change)
            for wanted, change in made:
                _tell(wanted, change)

    def _decided(self, changes: list[R]) -> Iterator[_Wanted[R]]:
        """Puts what is to be committed now into `changes`. Yields what each of them was."""
        present, self._wanted = self._wanted, []
        seen: set[str] = set()
        for wanted in present:
            if wanted.who in seen:
                self._wanted.append(wanted)
            elif not wanted.done.done():  # it is when its caller has gone
                seen.add(wanted.who)
                try:
                    change = wanted.decide(changes)
                except Exception as error:  # its caller's to deal with
                    wanted.done.set_exception(error)
                    continue
                if change is None:
                    wanted.done.set_result(None)
                else:
                    changes.append(change)
                    yield wanted


def _tell(wanted: _Wanted[R], change: R) -> None:
    """A bug in one's `after` must not keep from others what they wait for."""
    try:
        wanted.after(change)
    except Exception as error:
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"what follows a commit for {wanted.who} failed", "exception": error}
        )


async def to_its_end(work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread; cancelled, it still waits for the thread."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
