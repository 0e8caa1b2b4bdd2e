"""Work of many requests begins bit by bit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from crosspool.frontend import private, tokenizer_manager
from crosspool.frontend.tokenizer_manager import PooledTokenizerManager
from crosspool.frontend.told import Told
from crosspool.frontend.turns import Turns


async def turns_of_the_loop(begin: Callable[[Callable[[], None]], Awaitable[Any]]) -> list[int]:
    """The turn of the event loop in which ``begin`` called what it was given, each time."""
    turn, noted = 0, list[int]()

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    await begin(lambda: noted.append(turn))
    counting.cancel()
    return noted


def test_between_two_turns_the_loop_does_all_else() -> None:
    turns, order = Turns(), list[int]()

    async def begin(note: Callable[[], None]) -> None:
        async def one(index: int) -> None:
            for _ in range(3):
                await turns.take()
                order.append(index)
                note()

        await asyncio.gather(*(one(index) for index in range(4)))

    noted = asyncio.run(turns_of_the_loop(begin))
    assert len(noted) == 12 and len(set(noted)) == 12
    assert order == [0, 0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3]


def test_a_turn_costs_nothing_where_nobody_else_begins() -> None:
    turns = Turns()

    async def begin(note: Callable[[], None]) -> None:
        assert not await turns.take()
        note()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not await turns.take()

    assert asyncio.run(turns_of_the_loop(begin)) == [1]


def test_who_is_cancelled_while_it_waits_holds_nobody_up() -> None:
    async def main() -> bool:
        turns = Turns()
        await turns.take()
        first = asyncio.create_task(turns.take())
        second = asyncio.create_task(turns.take())
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.wait_for(second, 5)

    assert asyncio.run(main())


def manager(**fields: Any) -> Any:
    """A tokenizer manager without sockets."""
    made = PooledTokenizerManager.__new__(PooledTokenizerManager)
    vars(made).update(turns=Turns(), _told=Told(made), **fields)
    return made


def test_prompts_and_samples_begin_one_at_a_time() -> None:
    async def begin(note: Callable[[], None]) -> None:
        made = manager()
        tokenizer_manager._several.set(True)
        await asyncio.gather(
            *(made.on_texts("a", note) for _ in range(5)),
            *(made.before_sending(None) for _ in range(5)),
        )

    assert len(set(asyncio.run(turns_of_the_loop(begin)))) == 5


def test_messages_of_the_scheduler_are_taken_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def begin(note: Callable[[], None]) -> None:
        left = [b"message"] * 5

        async def receive() -> list[bytes]:
            return [left.pop()]  # raises IndexError after the last one

        async def take(*_: Any) -> None:
            note()

        monkeypatch.setattr(private, "take_output", take)
        monkeypatch.setattr(private, "decode", lambda frame: frame)
        made = manager(recv_from_detokenizer=SimpleNamespace(recv_multipart=receive))
        with pytest.raises(IndexError):
            await made.handle_loop()

    assert len(set(asyncio.run(turns_of_the_loop(begin)))) == 5
