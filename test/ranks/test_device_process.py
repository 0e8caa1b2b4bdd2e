"""Real device processes, driven as the scheduler drives them, against transformers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from crosspool.kernels.isa import available_isas
from crosspool.transport.messages import (
    Logprobs,
    Sampling,
    StepResult,
    TokenLogprobs,
)
from make_random_checkpoint import make_random_checkpoint
from safetensors.torch import load_file
from support.marks import slow_but
from support.warm_devices import WarmDriver
from transformers import AutoModelForCausalLM

from benchmark.device_driver import DeviceDriver, Generation

CORES = sorted(os.sched_getaffinity(0))
FIRST = f"cpu:{CORES[0]}"
SECOND = f"cpu:{CORES[-1]}"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one device": {"kv": [FIRST], "weights": [FIRST]},
    "two devices": {"kv": [FIRST], "weights": [SECOND]},
    "two FFN ranks, a model on each and one on both": {
        "kv": [FIRST],
        "weights": [FIRST, SECOND],
        "places": [[FIRST], [SECOND], None],
    },
    "two of each, EP": {
        "kv": [FIRST, SECOND],
        "weights": [SECOND, FIRST],
        "ffn_parallel": "ep",
        "kv_pool_bytes": 16 << 20,
    },
}
PLACEMENTS = {
    name if loop == "host" else f"{name}, {loop}": placement | {"loop": loop}
    for loop in ("host", "resident")
    for name, placement in PLACEMENTS.items()
} | {
    "resident attention, host FFN": PLACEMENTS["two devices"] | {"loops": {SECOND: "host"}},
    "host attention, resident FFN": PLACEMENTS["two devices"] | {"loops": {FIRST: "host"}},
}
FAST = (
    "one device",
    "two devices",
    "one device, resident",
    "two devices, resident",
    "two of each, EP, resident",
    "resident attention, host FFN",
)
QWEN, DEEPSEEK, QWEN_AGAIN = 0, 1, 2
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    qwen = make_random_checkpoint(
        "qwen3_moe", folder / "qwen", {"num_hidden_layers": 2}, "float32", seed=1
    )
    deepseek = make_random_checkpoint(
        "deepseek_v2", folder / "deepseek", {"num_hidden_layers": 5}, "float32", seed=2
    )
    return [qwen, deepseek, qwen]


@pytest.fixture(scope="module")
def references(checkpoints: list[Path]) -> list[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loaded = {
            path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in set(checkpoints)
        }
        return [loaded[path] for path in checkpoints]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=slow_but(FAST, PLACEMENTS))
def driver(request: pytest.FixtureRequest, checkpoints: list[Path]) -> Iterator[DeviceDriver]:
    placement = PLACEMENTS[request.param]
    if len(CORES) == 1 and request.param != "one device":
        pytest.skip("needs two cores")
    with WarmDriver(checkpoints, **placement) as devices:
        yield devices
        assert_ends_in_order(devices, by_signal=request.param != "one device")


def assert_ends_in_order(driver: DeviceDriver, by_signal: bool) -> None:
    """All processes end at once, by SIGTERM or message: the step in flight is finished, and the
    status is 0."""
    driver.step([Generation(DEEPSEEK, prompt(400, 1), 1, logprobs=Logprobs(prompt_start=0))])
    if by_signal:
        time.sleep(0.05)
        for process in driver.processes.values():
            process.send_signal(signal.SIGTERM)
        statuses = {name: process.wait(20) for name, process in driver.processes.items()}
    else:
        statuses = driver.shutdown()
    assert set(statuses.values()) == {0}, statuses
    _, result = driver.receive()
    assert isinstance(result, StepResult)
    assert len(result.rows[0].prompt) == 400


def prompt(length: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(2, 512, length)]


def reference_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Returns log-probabilities, float32 [len(tokens), vocab]; row p judges the token at p + 1."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).float()


def assert_logprobs(found: TokenLogprobs, token: int, row: torch.Tensor, asked: Logprobs) -> None:
    assert found.token == token
    assert found.logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
    best = row.topk(asked.top).values.tolist()
    assert [value for value, _ in found.top] == pytest.approx(best, abs=TOLERANCE)
    for value, other in found.top:
        assert value == pytest.approx(row[other].item(), abs=TOLERANCE)
    assert [other for _, other in found.token_ids] == list(asked.token_ids)
    for value, other in found.token_ids:
        assert value == pytest.approx(row[other].item(), abs=TOLERANCE)


def assert_matches(generation: Generation, model: Any) -> None:
    """Asserts that greedy tokens and all asked-for log-probabilities equal the reference's."""
    known = generation.prompt + generation.output
    rows = reference_logprobs(model, known)
    asked = generation.logprobs
    assert len(generation.output) == generation.new_tokens
    for i, token in enumerate(generation.output):
        row = rows[len(generation.prompt) + i - 1]
        assert row[token] >= row.max() - TOLERANCE
        if asked.output:
            assert_logprobs(generation.output_logprobs[i], token, row, asked)
    wanted = (
        [] if asked.prompt_start < 0 else list(range(asked.prompt_start, len(generation.prompt)))
    )
    assert len(generation.prompt_logprobs) == len(wanted)
    for found, position in zip(generation.prompt_logprobs, wanted, strict=True):
        if position == 0:
            assert found == TokenLogprobs(
                token=generation.prompt[0], logprob=None, top=[], token_ids=[]
            )
        else:
            assert_logprobs(found, generation.prompt[position], rows[position - 1], asked)


def test_tokens_and_logprobs_equal_transformers(
    driver: DeviceDriver, references: list[Any]
) -> None:
    """Models interleaved, requests of different lengths in one batch, several prompt chunks,
    prompt log-probabilities over chunk borders, every attention rank."""
    everything = Logprobs(output=True, prompt_start=0, top=4, token_ids=(7, 3))
    generations = []
    for rank in range(len(driver.deployment.kv_pool_devices)):
        for model in (QWEN, DEEPSEEK, QWEN_AGAIN):
            shapes = [
                (37, 9, everything),
                (50, 16, Logprobs(output=True, prompt_start=16, top=1)),
                (23, 7, Logprobs(prompt_start=11, token_ids=(5,))),
                (5, 100, Logprobs()),
                (1, 1, everything),
            ]
            for length, chunk, logprobs in shapes:
                generations.append(
                    Generation(
                        model,
                        prompt(length, 10 * model + length),
                        6 + length % 5,
                        logprobs=logprobs,
                        rank=rank,
                        chunk=chunk,
                    )
                )
    driver.generate(generations)
    for generation in generations:
        assert_matches(generation, references[generation.model])


def test_draws_do_not_depend_on_the_batch(driver: DeviceDriver) -> None:
    last = len(driver.deployment.kv_pool_devices) - 1
    sampling = Sampling(temperature=1.2, top_p=0.9, seed=1234)

    def one(rank: int) -> Generation:
        return Generation(QWEN, prompt(20, 5), 12, sampling=sampling, rank=rank)

    alone, among = one(0), one(last)
    driver.generate([alone])
    others = [
        Generation(QWEN, prompt(9 + i, i), 8, sampling=Sampling(seed=i), rank=last)
        for i in range(4)
    ]
    driver.generate([*others, among, Generation(DEEPSEEK, prompt(30, 9), 12)])
    assert alone.output == among.output
    assert len(set(alone.output)) > 3


def test_where_the_tensors_are(driver: DeviceDriver, checkpoints: list[Path]) -> None:
    deployment = driver.deployment
    tensors = [t for device in driver.processes for t in driver.inspect(device, "tensors")]
    ranks = {(t["role"], t["rank"]) for t in tensors}
    assert ranks == {("attention", i) for i in range(len(deployment.kv_pool_devices))} | {
        ("ffn", i) for i in range(len(deployment.weight_pool_devices))
    }
    for tensor in tensors:
        is_ffn = "mlp." in tensor["name"]
        assert is_ffn == (tensor["role"] == "ffn"), tensor
        assert tensor["bytes"] == 4 * int(np.prod(tensor["shape"])), tensor
    for index, path in enumerate(checkpoints):
        name = deployment.models[index].name
        holders = {t["rank"] for t in tensors if (t["model"], t["role"]) == (name, "ffn")}
        assert holders == set(deployment.ffn_ranks(index))
        (file,) = path.glob("*.safetensors")
        whole = load_file(file)
        assert {t["name"] for t in tensors if t["model"] == name} == set(whole)
        split = [n for n in whole if "_proj" in n and "mlp." in n]
        for key in split:
            shares = sum(t["bytes"] for t in tensors if (t["model"], t["name"]) == (name, key))
            assert shares == whole[key].nbytes, key
    for ready in driver.ready.values():
        for info in ready.ranks:
            assert info.weight_bytes == sum(
                t["bytes"] for t in tensors if (t["role"], t["rank"]) == (info.role, info.rank)
            )


def test_what_crosses_is_counted(driver: DeviceDriver) -> None:
    """2 x layers x hidden x rows x bytes of an element cross to each FFN rank of the model,
    where rows are tokens; nothing crosses to other FFN ranks."""
    ffn_ranks = range(len(driver.deployment.weight_pool_devices))

    def crossed() -> np.ndarray[Any, Any]:
        """[end, FFN rank, field]"""
        answers = [driver.inspect(device, "counters") for device in driver.processes]
        ends = []
        for end in ("links", "served"):
            links = [link for answer in answers for link in answer[end]]
            total = len(driver.deployment.kv_pool_devices) * len(ffn_ranks)
            assert len(links) == total * driver.deployment.lanes
            fields = ("rows", "dispatch_bytes", "combine_bytes")
            ends.append(
                [
                    [
                        sum(link[field] for link in links if link["ffn_rank"] == rank)
                        for field in fields
                    ]
                    for rank in ffn_ranks
                ]
            )
        return np.array(ends)

    for model in (QWEN, DEEPSEEK, QWEN_AGAIN):
        spec = driver.specs[model]
        before = crossed()
        driver.generate([Generation(model, prompt(21, 3), 5, chunk=8)])
        rows = (21 + 4) * spec.layers
        one_way = rows * spec.hidden * 4
        own = driver.deployment.ffn_ranks(model)
        expected = [[rows, one_way, one_way] if rank in own else [0] * 3 for rank in ffn_ranks]
        assert (crossed() - before).tolist() == [expected] * 2


def test_the_pool_is_mapped_on_demand_and_given_back(driver: DeviceDriver) -> None:
    device = driver.deployment.kv_pool_devices[0].name
    budget = driver.inspect(device, "pools")["budget_bytes"]
    assert budget == driver.deployment.kv_pool_bytes // len(driver.deployment.kv_pool_devices)
    generation = Generation(DEEPSEEK, prompt(40, 1), 2)
    step = driver.step([generation])
    _, result = driver.receive()
    assert isinstance(result, StepResult)
    assert result.step == step
    pools = driver.inspect(device, "pools")
    name = driver.deployment.models[DEEPSEEK].name
    assert pools["mapped_bytes"][name] == driver.deployment.chunk_bytes
    assert sum(pools["mapped_bytes"].values()) + pools["free_bytes"] == budget
    driver.release([generation])
    pools = driver.inspect(device, "pools")
    assert (sum(pools["mapped_bytes"].values()), pools["free_bytes"]) == (0, budget)
    assert driver.inspect(device, "counters")["requests"] == 0


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK])
def test_pages_of_another_sequence_serve_as_well_as_own_ones(
    driver: DeviceDriver, references: list[Any], model: int
) -> None:
    """Both requests begin with the same tokens and run at once, and each writes behind them."""
    page_size = driver.deployment.page_size
    ids, other = prompt(43, 7), prompt(9, 8)
    first = Generation(model, ids, 6)
    driver.run([first])
    whole = (len(ids) + 5) // page_size
    asked = Logprobs(output=True, prompt_start=30 // page_size * page_size + 1, top=2)
    followers = []
    for tokens, shared in (
        (ids, 10),
        (ids[:30] + other, 7),
        (ids + first.output[:-1] + other, whole),
    ):
        for pages in (shared, 0):
            follower = Generation(model, list(tokens), 6, chunk=5)
            follower.shared = first.pages[:pages]
            follower.computed = pages * page_size
            if pages * page_size < asked.prompt_start:
                follower.logprobs = asked
            followers.append(follower)
    driver.run(followers)
    for hit, miss in zip(followers[::2], followers[1::2], strict=True):
        assert hit.shared and not miss.shared
        assert hit.output == miss.output
        assert_matches(hit, references[model])
        assert_matches(miss, references[model])
    driver.release([*followers, first])


def test_a_release_waits_for_its_models_step(driver: DeviceDriver, references: list[Any]) -> None:
    """A release that is sent right behind a step may not take the pages away from under it; what
    comes after still finds its place in the order."""
    first, second = Generation(DEEPSEEK, prompt(60, 1), 1), Generation(QWEN, prompt(30, 2), 1)
    third = Generation(DEEPSEEK, prompt(12, 3), 1)
    flying = {}
    for generation in (first, second, third):
        flying[driver.step([generation])] = generation
        driver.release([generation])
    for _ in flying:
        _, result = driver.receive()
        assert isinstance(result, StepResult)
        driver.take([flying[result.step]], result)
    for generation in flying.values():
        assert_matches(generation, references[generation.model])


def test_a_bitmask_bars_tokens(driver: DeviceDriver) -> None:
    allowed = {40, 77, 300}
    words = np.zeros(512 // 32, dtype="<u4")
    for token in allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    generation = Generation(QWEN, prompt(8, 4), 1, sampling=Sampling(temperature=2.0))
    driver.step([generation], bitmask=words.tobytes())
    _, result = driver.receive()
    assert isinstance(result, StepResult)
    assert result.rows[0].token in allowed
    driver.release([generation])


def test_an_idle_process_uses_no_processor_time(driver: DeviceDriver) -> None:
    time.sleep(0.3)
    processes = [psutil.Process(process.pid) for process in driver.processes.values()]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(1.0)
    used = [sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True)]
    assert max(used) < 0.07, used


@pytest.fixture(scope="module")
def events(driver: DeviceDriver) -> list[dict[str, Any]]:
    """Lane events of three models on two lanes."""
    for device in driver.processes:
        driver.inspect(device, "trace_start")
    driver.generate(
        [Generation(model, prompt(30, model), 20) for model in (QWEN, DEEPSEEK, QWEN_AGAIN)]
    )
    events = [
        event for device in driver.processes for event in driver.inspect(device, "trace_stop")
    ]
    assert driver.inspect(FIRST, "trace_stop") == []
    return events


@pytest.mark.parametrize("driver", ["two devices", "two devices, resident"], indirect=True)
class TestPipeline:
    """What the lane events show."""

    def test_every_part_is_there(self, events: list[dict[str, Any]]) -> None:
        layers = {QWEN: 2, DEEPSEEK: 5, QWEN_AGAIN: 2}
        for part, role in (("attention", "attention"), ("ffn", "ffn")):
            for model, depth in layers.items():
                seen = [e["layer"] for e in events if (e["part"], e["model"]) == (part, model)]
                assert sorted(seen) == sorted([*range(depth)] * 20)
            assert {e["role"] for e in events if e["part"] == part} == {role}
        heads = [e for e in events if e["part"] == "lm_head"]
        assert len(heads) == 60
        assert {e["lane"] for e in events} == {0, 1}

    def test_attention_of_one_model_overlaps_ffn_of_another(
        self, events: list[dict[str, Any]]
    ) -> None:
        overlaps = sum(
            a["model"] != f["model"] and a["start_ns"] < f["end_ns"] and f["start_ns"] < a["end_ns"]
            for a in events
            if a["part"] == "attention"
            for f in events
            if f["part"] == "ffn"
        )
        assert overlaps > 10

    def test_a_batch_that_ends_early_is_replaced_while_the_other_goes_on(
        self, driver: DeviceDriver, events: list[dict[str, Any]]
    ) -> None:
        if driver.deployment.loop == "resident":
            pytest.skip("its steps are shorter than the driver's turn; see test_resident_executor")
        steps: dict[int, dict[str, Any]] = {}
        for event in events:
            if event["role"] == "attention":
                step = steps.setdefault(event["step"], event | {"ends": 0})
                step["start_ns"] = min(step["start_ns"], event["start_ns"])
                step["ends"] = max(step["ends"], event["end_ns"])
        ordered = sorted(steps.values(), key=lambda s: s["start_ns"])
        replaced = 0
        for step in ordered:
            later = [
                s for s in ordered if s["lane"] == step["lane"] and s["start_ns"] > step["ends"]
            ]
            if later and any(
                other["lane"] != step["lane"]
                and other["start_ns"] < step["ends"]
                and later[0]["start_ns"] < other["ends"]
                for other in ordered
            ):
                replaced += 1
        assert replaced > 10


FFN_RANKS: dict[str, dict[str, Any]] = {
    "one": {"weights": [SECOND]},
    "two, TP": {"weights": [SECOND, FIRST], "ffn_parallel": "tp"},
    "two, EP": {"weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}


@pytest.mark.skipif(len(CORES) == 1, reason="needs two cores")
@pytest.mark.parametrize("ranks", slow_but(["one"], list(FFN_RANKS)))
@pytest.mark.parametrize("loop", slow_but(["resident"], ["host", "resident"]))
def test_a_dead_ffn_rank_is_replaced_under_a_step(
    loop: str, ranks: str, checkpoints: list[Path], references: list[Any]
) -> None:
    """The successor of a killed FFN rank finds what it had been sent, and the step goes on."""
    with WarmDriver(checkpoints, kv=[FIRST], loop=loop, **FFN_RANKS[ranks]) as driver:
        generation = Generation(DEEPSEEK, prompt(40, 1), 8)
        driver.generate([Generation(QWEN, prompt(9, 2), 2)])
        for _ in range(2):
            # Stopped, it is surely dispatched to, and surely has not answered, when it dies.
            driver.processes[SECOND].send_signal(signal.SIGSTOP)
            driver.step([generation])
            time.sleep(0.2)
            driver.replace(SECOND)
            _, result = driver.receive()
            assert isinstance(result, StepResult)
            driver.take([generation], result)
        driver.generate([generation])
        assert_matches(generation, references[DEEPSEEK])


@pytest.mark.skipif(len(CORES) == 1, reason="needs two cores")
@pytest.mark.parametrize("loop", slow_but(["host"], ["host", "resident"]))
def test_a_new_attention_rank_waits_for_the_reply_to_its_predecessor(
    loop: str, checkpoints: list[Path], references: list[Any]
) -> None:
    """Although it has a step to begin, and the same lane for it."""
    with WarmDriver(checkpoints, kv=[FIRST], weights=[SECOND], loop=loop, lanes=1) as driver:
        driver.processes[SECOND].send_signal(signal.SIGSTOP)
        driver.step([Generation(DEEPSEEK, prompt(40, 1), 8)])
        time.sleep(0.2)
        driver.replace(FIRST)
        generation = Generation(DEEPSEEK, prompt(40, 1), 8)
        driver.step([generation])
        time.sleep(0.2)
        assert driver.processes[FIRST].poll() is None, driver.log(FIRST)
        driver.processes[SECOND].send_signal(signal.SIGCONT)
        _, result = driver.receive()
        assert isinstance(result, StepResult)
        driver.take([generation], result)
        driver.generate([generation])
        assert_matches(generation, references[DEEPSEEK])


@pytest.mark.parametrize("isa", slow_but(["portable"], available_isas()))
def test_every_isa_path_equals_transformers(
    isa: str,
    checkpoints: list[Path],
    references: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CROSSPOOL_CPU_ISA", isa)
    with DeviceDriver(checkpoints[:2], kv=[FIRST], weights=[FIRST], loop="resident") as driver:
        generations = [
            Generation(
                model, prompt(30, seed), 8, logprobs=Logprobs(output=True, prompt_start=0, top=3)
            )
            for model in (QWEN, DEEPSEEK)
            for seed in (1, 2)
        ]
        # These are sampled by native code.
        generations += [Generation(model, prompt(17, 3), 24) for model in (QWEN, DEEPSEEK)]
        driver.generate(generations)
        for generation in generations:
            assert_matches(generation, references[generation.model])
