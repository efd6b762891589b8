"""Group commit: what comes while a commit is under way is in the next one, once or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from coordinator.commits import Commits


class Disk:
    """Commits names; each commit waits until it is let go on."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.full = False

    def commit(self, changes: list[str]) -> None:
        self.begun.release()
        self.go_on.acquire()
        if self.full:
            raise OSError("the disk is full")
        self.commits.append(changes)

    async def has_begun(self) -> None:
        await asyncio.to_thread(self.begun.acquire)


def wanting(name: str) -> Callable[[list[str]], str | None]:
    """Wants to commit `name`, unless that would be the third of a commit."""
    return lambda beside: name if len(beside) < 2 else None


def test_what_comes_meanwhile_is_committed_together() -> None:
    async def run() -> None:
        disk = Disk()
        commits = Commits(disk.commit)
        first = asyncio.create_task(commits.make("ada", wanting("a")))
        await disk.has_begun()
        others = {
            name: asyncio.create_task(commits.make(who, wanting(name)))
            for who, name in [("ada", "a2"), ("ben", "b"), ("ben", "b2"), ("eve", "e")]
        }
        await asyncio.sleep(0)
        assert commits.still.locked()
        assert not first.done(), "nobody is told before it is durable"
        gone = asyncio.create_task(commits.make("gone", wanting("g")))
        await asyncio.sleep(0)
        gone.cancel()
        disk.go_on.release(3)
        assert await first == "a"
        assert [await task for task in others.values()] == ["a2", "b", "b2", None]
        await commits.settled()
        assert disk.commits == [["a"], ["a2", "b"], ["b2"]]
        assert not commits.still.locked()

    asyncio.run(run())


def test_what_is_to_follow_does_though_nobody_waits_any_more() -> None:
    async def run() -> None:
        disk, told = Disk(), list[str]()
        commits = Commits(disk.commit)
        gone = asyncio.create_task(commits.make("ada", wanting("a"), told.append))
        await disk.has_begun()
        waiting = asyncio.create_task(commits.make("ben", wanting("b"), told.append))
        gone.cancel()
        disk.go_on.release(2)
        assert await waiting == "b"
        with pytest.raises(asyncio.CancelledError):
            await gone
        await commits.settled()
        assert told == ["a", "b"]

    asyncio.run(run())


def test_what_fails_after_a_commit_holds_up_nobody() -> None:
    async def run() -> None:
        disk, told, failures = Disk(), list[str](), list[str]()
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(str(context["exception"]))
        )
        commits = Commits(disk.commit)
        first = asyncio.create_task(commits.make("ada", wanting("a")))
        await disk.has_begun()

        def fail(name: str) -> None:
            raise ValueError(f"a bug with {name}")

        others = [
            asyncio.create_task(commits.make(who, wanting(who), after))
            for who, after in (("ben", fail), ("eve", told.append), ("ben", told.append))
        ]
        await asyncio.sleep(0)
        disk.go_on.release(3)
        assert await first == "a"
        assert [await task for task in others] == ["ben", "eve", "ben"]
        await commits.settled()
        assert told == ["eve", "ben"]
        assert failures == ["a bug with ben"]

    asyncio.run(run())


def test_a_commit_that_fails_fails_for_all_in_it_and_for_nobody_else() -> None:
    async def run() -> None:
        disk = Disk()
        commits = Commits(disk.commit)
        disk.full = True
        first = asyncio.create_task(commits.make("ada", wanting("a")))
        await disk.has_begun()

        def refused(_: list[str]) -> str:
            raise ValueError("too late")

        others = [asyncio.create_task(commits.make(who, wanting(who))) for who in ("ben", "eve")]
        late = asyncio.create_task(commits.make("late", refused))
        await asyncio.sleep(0)
        disk.go_on.release()
        with pytest.raises(OSError, match="full"):
            await first
        await disk.has_begun()
        disk.full = False
        disk.go_on.release()
        assert [await task for task in others] == ["ben", "eve"]
        with pytest.raises(ValueError, match="too late"):
            await late
        assert disk.commits == [["ben", "eve"]]

    asyncio.run(run())
