"""Models whose weights are given up at once by several threads of a device process."""

import select
import threading

import pytest
from crosspool.ranks.resident import holder
from crosspool.ranks.resident.holder import HolderLink

MODELS, ROUNDS = 8, 50


def test_each_of_several_models_that_go_at_once_gets_its_reply(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(holder, "_REPLY_SECONDS", 5.0)
    link, dropped, over = HolderLink(), [], threading.Event()

    def serve() -> None:
        while not over.is_set():
            if select.select([link], [], [], 0.05)[0]:
                link.serve(dropped.append)

    def give_up(model: int) -> None:
        for _ in range(ROUNDS):
            if not caplog.records:  # after one that got none, the others need not wait for theirs
                link.give_up(model)

    threads = [threading.Thread(target=give_up, args=(model,)) for model in range(MODELS)]
    holding = threading.Thread(target=serve)
    for thread in (holding, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    holding.join()
    assert not caplog.records
    assert sorted(dropped) == sorted([*range(MODELS)] * ROUNDS)
