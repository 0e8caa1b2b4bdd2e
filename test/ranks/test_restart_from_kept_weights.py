"""A device process that takes a dead one's place reads the weights that the dead one had packed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from support.warm_devices import WarmDriver

from benchmark.device_driver import DeviceDriver, Generation
from benchmark.server import DEMO, TINY_MODELS

CORES = sorted(os.sched_getaffinity(0))
FIRST, LAST = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
PACKED, READ = "of matrices packed into", "of packed matrices read"


def outputs(driver: DeviceDriver) -> list[list[int]]:
    sequences = [Generation(model, [5, 6, 7, 8], 12) for model in range(len(TINY_MODELS))]
    driver.generate(sequences)
    return [sequence.output for sequence in sequences]


def test_a_restart_reads_what_was_packed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    models = [DEMO / model for model in TINY_MODELS]
    devices = list(dict.fromkeys((FIRST, LAST)))
    with WarmDriver(
        models,
        kv=[FIRST],
        weights=[LAST],
        loop="resident",
        packed_cache_dir=str(cache),
        packed_cache_bytes=1 << 30,
    ) as driver:
        before = outputs(driver)
        deadline = time.monotonic() + 60
        while len(list(cache.glob("*.packed"))) < 2 * len(models):
            assert time.monotonic() < deadline, [driver.log(device) for device in devices]
            time.sleep(0.05)
        for device in devices:
            log = driver.log(device)
            assert (log.count(PACKED), log.count(READ)) == (len(models), 0), log
            driver.replace(device)
            log = driver.log(device)
            assert (log.count(PACKED), log.count(READ)) == (len(models), len(models)), log
        assert outputs(driver) == before


def test_a_bound_of_0_keeps_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with WarmDriver(
        [DEMO / TINY_MODELS[0]],
        kv=[FIRST],
        weights=[FIRST],
        loop="resident",
        packed_cache_dir=str(cache),
        packed_cache_bytes=0,
    ):
        assert not cache.exists()
