"""How long a step takes, and each of its stages: with random weights of a real model's shape."""

from __future__ import annotations

from benchmark.gpu import Plan, Run
from benchmark.gpu_report.notes import Notes
from benchmark.gpu_report.platform import Platform


def step_times(platform: Platform, notes: Notes) -> None:
    """A step as one graph, its stages one by one, and the loop that the host launches."""
    run, name = _run(platform, notes), platform.scale.shape
    notes.headline("copy within the device's memory", run.recorder.rows[-1]["median"], "GB/s")
    notes.at("makes random weights", model=name)
    model = run.prepare(name, platform.scale.layers)
    notes.fact("layers", model.spec.layers, model=name)
    for batch in platform.scale.batches:
        notes.at(f"a step of {batch} rows as one graph", model=name)
        whole = run.whole(name, model, batch)
        notes.headline(f"{name}, batch {batch}: whole step as one graph", whole, "ms")
        notes.at(f"stages of {batch} rows", model=name)
        run.stages(name, model, batch)
        notes.at(f"stages of {batch} rows that the host launches", model=name)
        ms = run.loop(name, model, batch=batch, loop="host", lanes=1, whole=whole)
        notes.headline(f"{name}, batch {batch}: host launches the stages", ms, "ms")


def resident_step_times(platform: Platform, notes: Notes) -> None:
    """The resident loop on one and two lanes, beside a step as one graph."""
    run, name = _run(platform, notes), platform.scale.shape
    notes.at("makes random weights", model=name)
    model = run.prepare(name, platform.scale.layers)
    for batch in platform.scale.batches:
        whole = run.whole(name, model, batch)
        for lanes in (1, 2):
            notes.at(f"resident loop of {lanes} lanes, {batch} rows", model=name)
            ms = run.loop(name, model, batch=batch, loop="resident", lanes=lanes, whole=whole)
            words = "resident loop" if lanes == 1 else "resident loop, two lanes"
            notes.headline(f"{name}, batch {batch}: {words}", ms, "ms")
            if lanes == 1:
                notes.headline(
                    f"{name}, batch {batch}: resident loop to one graph", ms / whole, "x"
                )


def _run(platform: Platform, notes: Notes) -> Run:
    scale = platform.scale
    plan = Plan(
        platform.device,
        scale.batches,
        scale.context,
        scale.tokens,
        scale.rounds,
        platform.join,
    )
    notes.at("measures a copy")
    return Run(plan, notes.measured)
