"""Which devices count as hanging, by what they show in the memory that they share with the
launcher."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crosspool.cli.hangs import HangWatch
from crosspool.cli.held_up import held_up
from crosspool.config.device import Device
from crosspool.transport.heartbeats import LINE_BYTES, Activity, Heartbeat, Heartbeats

PATIENCE = 5.0
LOOK = 0.1
DEVICES = (Device("cpu:0"), Device("cpu:1"))
FIRST, SECOND = ((device.name, 1) for device in DEVICES)


class Loop:
    """A device: its process's own thread counts unless it is ``deaf``, and its loop does what the
    test says unless it is ``frozen``."""

    def __init__(self, device: Device, fd: int) -> None:
        self._device, self._fd = device, fd
        self.begin(1)

    def begin(self, incarnation: int) -> None:
        """Is the next process, which loads."""
        self.heartbeat = Heartbeat(DEVICES, self._device, self._fd, incarnation)
        self._activity = ctypes.c_uint32.from_address(self.heartbeat.loop_address)
        self._looks = ctypes.c_uint32.from_address(self.heartbeat.loop_address + 4)
        self._advances = ctypes.c_uint64.from_address(self.heartbeat.loop_address + LINE_BYTES)
        self.deaf = self.frozen = incarnation > 1
        self.counts = False

    def is_(self, activity: Activity, *, counts: bool = False) -> None:
        self._activity.value = activity
        self.counts = counts

    def live(self) -> None:
        if not self.deaf:
            self.heartbeat.beat()
        if not self.frozen:
            self._advances.value += self.counts
            self._looks.value += self._activity.value != Activity.COMPUTING


class Machine:
    def __init__(self) -> None:
        self.heartbeats = Heartbeats(DEVICES)
        self.now = 1000.0
        self.loops = [Loop(device, self.heartbeats.fd) for device in DEVICES]
        self.held_up = {"1": 100.0, "2": 0.0}
        """Seconds for which the system has held up each of a device's threads."""
        self.starves = 0.0
        """Share of the time for which the system holds one of them up."""
        self.watch = HangWatch(
            *(self.heartbeats, [device.name for device in DEVICES], PATIENCE),
            *(lambda: self.now, lambda pid: dict(self.held_up)),
        )

    def look(self, stopped: tuple[str, ...] = ()) -> dict[tuple[str, int], str]:
        return self.watch.look(stopped)

    def live(self, seconds: float, stopped: tuple[str, ...] = ()) -> dict[tuple[str, int], str]:
        """Lets time pass; returns the first devices that were found to hang."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK
            self.held_up["2"] += self.starves * LOOK
            for loop in self.loops:
                loop.live()
            if found := self.look(stopped):
                return found
        return {}


@contextmanager
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.heartbeats.close()


def test_an_idle_device_does_not_hang_and_may_compute_afterwards() -> None:
    with machine() as m:
        assert not m.live(3600)
        m.loops[0].is_(Activity.COMPUTING)
        assert not m.live(PATIENCE - 1)


@pytest.mark.parametrize("activity", list(Activity))
def test_a_loop_that_neither_computes_nor_looks_for_work_hangs(activity: Activity) -> None:
    with machine() as m:
        assert not m.live(1)
        m.loops[0].is_(activity, counts=activity == Activity.COMPUTING)
        assert not m.live(LOOK)
        m.loops[0].frozen = True
        began = m.now
        assert m.live(60) == {FIRST: "its loop has stood still for 5 s"}
        assert PATIENCE <= m.now - began < PATIENCE + 1


@pytest.mark.parametrize("starves", [0.5, 1.0])
def test_a_loop_that_the_system_holds_up_hangs_later(starves: float) -> None:
    with machine() as m:
        assert not m.live(1)
        m.starves = starves
        m.loops[0].frozen = True
        factor = 1 / max(0.1, 1 - starves)
        assert not m.live((PATIENCE - 1) * factor)
        assert m.live(2 * factor) == {FIRST: "its loop has stood still for 5 s"}
        m.loops[0].begin(2)
        assert not m.live(1)


def test_what_the_system_holds_up_is_told_by_it() -> None:
    before = held_up(os.getpid())[str(threading.get_native_id())]
    began = time.monotonic()
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        while time.monotonic() < began + 0.5:  # in the kernel
            zeros.read(1 << 20)
    now = held_up(os.getpid())[str(threading.get_native_id())]
    assert 0.3 < now - before < 10
    assert held_up(2**30) == {}


def test_a_process_without_a_resident_loop_is_watched_alone() -> None:
    with machine() as m:
        m.loops[0].frozen = m.loops[1].frozen = True
        assert not m.live(60)
        m.loops[1].deaf = True
        assert m.live(60) == {SECOND: "its main thread has stood still for 5 s"}


def test_a_part_may_take_long_while_threads_count() -> None:
    with machine() as m:
        m.loops[0].is_(Activity.COMPUTING, counts=True)
        m.loops[1].is_(Activity.WAITING)
        assert not m.live(30)


def test_a_process_whose_main_thread_stands_still_hangs() -> None:
    with machine() as m:
        assert not m.live(1)
        m.loops[1].deaf = True
        assert m.live(60) == {SECOND: "its main thread has stood still for 5 s"}


def test_a_loading_or_ending_device_does_not_hang() -> None:
    with machine() as m:
        m.loops[0].deaf = m.loops[1].deaf = True
        m.loops[0].is_(Activity.COMPUTING)
        assert not m.live(60)
        m.loops[0].deaf = False
        assert not m.live(1)
        m.loops[0].deaf = True
        m.loops[0].heartbeat.rest()
        assert not m.live(60)


def test_devices_that_wait_for_one_another_all_hang() -> None:
    with machine() as m:
        m.loops[0].is_(Activity.WAITING)
        why = "for 5 s devices have waited for one another"
        assert m.live(60) == {FIRST: why, SECOND: why}


@pytest.mark.parametrize("change", ["computing", "reading", "loading", "stopped"])
def test_a_device_may_wait_for_one_that_is_away(change: str) -> None:
    with machine() as m:
        m.loops[0].is_(Activity.WAITING)
        m.loops[1].deaf = change in ("loading", "stopped")
        if change == "computing":
            m.loops[1].is_(Activity.COMPUTING, counts=True)
        if change == "reading":
            m.loops[1].is_(Activity.READING)
        if change == "loading":
            m.loops[1].begin(2)
        assert not m.live(60, (DEVICES[1].name,) if change == "stopped" else ())


def test_a_stopped_device_does_not_hang_when_it_continues() -> None:
    with machine() as m:
        m.loops[0].is_(Activity.COMPUTING)
        m.loops[0].deaf = True
        assert not m.live(60, stopped=(DEVICES[0].name,))
        assert not m.live(PATIENCE - 1)


def test_time_in_which_the_launcher_did_not_run_does_not_count() -> None:
    with machine() as m:
        m.loops[0].is_(Activity.COMPUTING)
        for _ in range(5):
            m.now += 60
            assert not m.look()


def test_a_new_process_begins_anew() -> None:
    with machine() as m:
        m.loops[0].is_(Activity.COMPUTING)
        m.loops[0].deaf = True
        assert not m.live(PATIENCE - 1)
        m.loops[0].begin(2)
        assert not m.live(60)
        m.loops[0].deaf = False
        assert not m.live(1)
        m.loops[0].deaf = True
        assert m.live(60) == {(DEVICES[0].name, 2): "its main thread has stood still for 5 s"}


def test_nobody_waits_for_a_dead_device() -> None:
    with machine() as m:
        assert not m.live(1)
        m.loops[0].is_(Activity.WAITING)
        m.loops[1].deaf = m.loops[1].frozen = True
        assert m.live(60) == {SECOND: "its main thread has stood still for 5 s"}
        assert m.look() == {SECOND: "its main thread has stood still for 5 s"}
        m.loops[1].begin(2)
        assert not m.live(60)
