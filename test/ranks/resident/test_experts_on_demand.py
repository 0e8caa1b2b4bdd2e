"""Routed experts in memory on demand: what models answer does not depend on how many have room, and
neither they nor anything else take more memory than the budget says."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import pytest
from crosspool.config.deployment import MAX_MODELS
from crosspool.kernels import native_structs as ns
from crosspool.models.registry import read_model
from crosspool.models.spec import MoEFFN
from crosspool.ranks.resident.arena import round_up
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.kept_weights import OpenWeights, PackedLayout, placed
from crosspool.transport.messages import Logprobs, StepResult, Wake, Waking, Woken
from crosspool.weightpool.checkpoint import Checkpoint
from crosspool.weightpool.experts import GRANULE, largest_layer
from crosspool.weightpool.packed_file import PackedMatrix, PackedTable
from crosspool.weightpool.placement import FFNShard, ffn_bytes
from make_random_checkpoint import make_random_checkpoint
from support.quantized import quantize_gpt_oss
from support.quantized_models import GPT_OSS
from support.warm_devices import WarmDriver

from benchmark.checkpoint import Shape, write
from benchmark.device_driver import DeviceDriver, Generation
from benchmark.server import DEMO, TINY_MODELS

SHAPE = Shape("moe-70m", 512, 4, 16, 2, 256, 8, 2, 64, 8000, context=512, skew=0.5)
MODELS = 2
WHOLE = FFNShard(rank=0, ranks=1, parallel="tp")
SHARES = (1.0, 0.5, 0.25)
PAGE = 4096
Places = tuple[Sequence[str], Sequence[str]]
ONE: Places = (("cpu:0",), ("cpu:0",))
TWO: Places = (("cpu:0",), ("cpu:1",))
SPLIT: Places = (("cpu:0",), ("cpu:1", "cpu:0"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    paths = [folder / f"{SHAPE.name}-{seed}" for seed in range(MODELS)]
    for seed, path in enumerate(paths):
        write(path, SHAPE, seed)
    return paths


def expert_bytes(models: Sequence[Path]) -> int:
    """Bytes of the routed experts of all models."""
    return sum(ffn_bytes(read_model(path), WHOLE, experts=True) for path in models)


def driver(
    models: Sequence[Path], share: float | None, places: Places, **more: Any
) -> DeviceDriver:
    """Devices with room for a share of all experts; None: without experts on demand."""
    fields: dict[str, Any] = {
        "packed_cache_dir": str(models[0].parent / "cache"),
        "packed_cache_bytes": 1 << 30,
        "weight_pool_bytes": 1 << 30,
        "lanes": 2,
    }
    if share is not None:
        granule = GRANULE * len(places[1])
        room = -(-int(share * expert_bytes(models)) // granule) * granule
        fields |= {"experts": "demand", "expert_pool_bytes": room}
    return WarmDriver(models, *places, **(fields | more))


def generations(model: int) -> list[Generation]:
    """A long prompt in chunks, which needs many experts at once, and short ones."""
    return [
        Generation(
            model,
            [(7 + 13 * i * i + 31 * model + 5 * request) % 8000 for i in range(length)],
            new_tokens=24,
            logprobs=Logprobs(output=True, prompt_start=0, top=3),
            chunk=16,
        )
        for request, length in enumerate((40, 5, 3))
    ]


def answers(on: DeviceDriver, *models: int, number: int | None = None) -> list[Any]:
    """Tokens and log-probabilities by model, to the bit. ``number``: that of the only model, where
    it is another one now."""
    asked = [generations(model) for model in models]
    for sequence in asked[0] if number is not None else ():
        sequence.model = number
    on.generate(sequence for of_model in asked for sequence in of_model)
    return [
        msgspec.to_builtins(
            [(one.output, one.output_logprobs, one.prompt_logprobs) for one in of_model]
        )
        for of_model in asked
    ]


def counts(on: DeviceDriver, device: str) -> list[dict[str, Any]]:
    return list(on.inspect(device, "counters")["experts"])


def test_a_shared_expert_keeps_the_weight_of_its_gate_while_experts_are_read(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 4}
    experts = {"vocab_size": 8000, "num_experts": 16, "num_experts_per_tok": 4}
    path = make_random_checkpoint("qwen2_moe", tmp_path / "model", sizes | experts, "float32")
    with driver([path], None, ONE) as on:
        right = answers(on, 0)
    with driver([path], 0.5, ONE) as on:
        assert answers(on, 0) == right
        assert counts(on, "cpu:0")[0]["misses"] > 0


@pytest.fixture(scope="module")
def right(models: list[Path]) -> list[Any]:
    """What the models answer with all experts in memory."""
    with driver(models, None, ONE) as on:
        return answers(on, *range(MODELS))


@pytest.mark.parametrize("share", SHARES)
def test_answers_are_the_same_whatever_has_room(
    models: list[Path], right: list[Any], share: float
) -> None:
    with driver(models, share, ONE) as on:
        assert answers(on, *range(MODELS)) == right
        first = counts(on, "cpu:0")
        assert answers(on, *range(MODELS)) == right
        second = counts(on, "cpu:0")
        assert [of["model"] for of in first] == [
            f"{path.name}-{i}" for i, path in enumerate(models)
        ]
        room = on.deployment.expert_pool_bytes
        assert sum(of["present_bytes"] for of in second) <= room
        for before, after in zip(first, second, strict=True):
            assert before["hits"] > 0 and before["misses"] > 0 and before["stall_seconds"] > 0
            assert before["read_bytes"] >= before["present_bytes"] > 0
            assert after["hits"] > before["hits"]
            if share == 1.0:  # each was read once, some of them ahead and not needed
                assert after["evictions"] == 0 and after["read_bytes"] == after["present_bytes"]
                assert after["misses"] == before["misses"]
            else:
                assert after["read_bytes"] >= before["read_bytes"]
        if share == SHARES[-1]:
            assert sum(of["evictions"] for of in second) > 0


@pytest.mark.parametrize(("places", "parallel"), [(TWO, "tp"), (SPLIT, "tp"), (SPLIT, "ep")])
def test_answers_are_the_same_on_several_devices(
    models: list[Path], places: Places, parallel: str
) -> None:
    with driver(models, None, places, ffn_parallel=parallel) as on:
        whole = answers(on, *range(MODELS))
    with driver(models, 0.25, places, ffn_parallel=parallel) as on:
        assert answers(on, *range(MODELS)) == whole
        for device in places[1]:
            assert any(of["evictions"] for of in counts(on, device))


def resident_bytes(pid: int, address: int, nbytes: int) -> int:
    """Bytes of a range of a process that are in memory."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as pages:
        pages.seek(address // PAGE * 8)
        entries = struct.unpack(f"<{nbytes // PAGE}Q", pages.read(nbytes // PAGE * 8))
    return PAGE * sum(entry >> 63 for entry in entries)


def test_the_memory_held_is_what_the_budget_says(models: list[Path]) -> None:
    """The pool fills, and does not grow; and the process has no more than it says besides."""
    held = {}
    for share in (1.0, 0.25):
        with driver(models, share, ONE) as on:
            for _ in range(3):
                answers(on, *range(MODELS))
            room = on.deployment.expert_pool_bytes
            found = re.search(r"for routed experts on demand at (0x[0-9a-f]+)", on.log("cpu:0"))
            assert found is not None
            pid = on.processes["cpu:0"].pid
            resident = resident_bytes(pid, int(found[1], 16), room)
            present = sum(of["present_bytes"] for of in counts(on, "cpu:0"))
            assert present <= resident <= room
            assert resident >= min(room, present) * 0.9
            held[share] = on.inspect("cpu:0", "pools")["rss_bytes"], resident
    more = held[1.0][0] - held[0.25][0]
    assert abs(more - (held[1.0][1] - held[0.25][1])) < 16 << 20


def test_models_sleep_and_wake_with_their_experts(models: list[Path], right: list[Any]) -> None:
    with driver(models, 0.5, TWO) as on:
        assert answers(on, *range(MODELS)) == right
        on.sleep(0)
        assert [of["model"] for of in counts(on, "cpu:1")] == [f"{models[1].name}-1"]
        assert answers(on, 1) == right[1:]
        assert on.wake(0) == {0: None}
        assert counts(on, "cpu:1")[0]["present_bytes"] == 0
        assert answers(on, *range(MODELS)) == right


def test_steps_that_come_with_a_wake_wait_for_layers_and_experts(
    models: list[Path], right: list[Any]
) -> None:
    """Routers of layers that are still to come foretell nothing."""
    with driver(models, 0.25, ONE) as on:
        for _ in range(4):
            on.sleep(0)
            on.send("cpu:0", Wake(model=0))
            ours, woken = generations(0), False
            going = list(ours)
            on.step(going)
            while going or not woken:
                _, message = on.receive()
                if isinstance(message, StepResult):
                    on.take(going, message)
                    going = [one for one in ours if not one.done]
                    if going:
                        on.step(going)
                    continue
                assert message == Woken(model=0) or isinstance(message, Waking), message
                woken = woken or isinstance(message, Woken)
            on.release(ours)
            assert [one.output for one in ours] == [output for output, _, _ in right[0]]


def test_a_model_that_comes_brings_its_experts_and_takes_them_along(
    models: list[Path], right: list[Any]
) -> None:
    """The later number has the same place in the tables of devices."""
    with driver(models[:1], 1.0, TWO) as on:
        assert answers(on, 0) == right[:1]
        for later in (1, 1 + MAX_MODELS):
            on.deployment = msgspec.structs.replace(on.deployment, next_model=later)
            number, errors = on.add(models[1], experts="demand")
            assert number == later and not any(errors.values()), errors
            assert on.wake(number) == {number: None}
            assert answers(on, 1, number=number) == right[1:]
            assert answers(on, 0) == right[:1]
            assert [of["model"] for of in counts(on, "cpu:1")] == [
                f"{models[0].name}-0",
                f"{models[1].name}-{number}",
            ]
            on.sleep(number)
            on.remove(number)
            (left,) = counts(on, "cpu:1")
            assert left["model"] == f"{models[0].name}-0"
        assert answers(on, 0) == right[:1]


def test_a_model_whose_experts_have_no_pool_is_told_so(
    models: list[Path], right: list[Any]
) -> None:
    with driver(models[:1], None, ONE) as on:
        number, errors = on.add(models[1], experts="demand")
        assert errors == {"cpu:0": None}
        error = on.wake(number)[number]
        assert error is not None and "expert_pool_bytes" in error
        assert answers(on, 0) == right[:1]


def test_a_process_that_is_replaced_reads_its_experts_again(
    models: list[Path], right: list[Any]
) -> None:
    with driver(models, 0.25, TWO) as on:
        assert answers(on, *range(MODELS)) == right
        on.replace("cpu:1")
        assert answers(on, *range(MODELS)) == right


def test_experts_that_cannot_be_read_are_packed_again(
    tmp_path: Path, models: list[Path], right: list[Any]
) -> None:
    """The model's steps are refused, and it is given up; another goes on. Woken again, it answers
    as before."""
    with driver(models, 0.25, ONE, packed_cache_dir=str(tmp_path)) as on:
        assert answers(on, *range(MODELS)) == right
        (file,) = tmp_path.glob(f"{models[0].name}-ffn.*.packed")
        whole = file.read_bytes()
        with file.open("r+b") as damaged:
            for at in range(len(whole) // 8, len(whole), 64 << 10):
                damaged.seek(at)
                damaged.write(bytes([whole[at] ^ 4]))
        ours = generations(0)
        number = on.step(ours)
        error, refused = None, False
        while error is None:
            _, message = on.receive()
            if isinstance(message, StepResult):
                assert message.step == number
                if message.refused:
                    refused = True
                    continue
                on.take(ours, message)
                number = on.step(ours)
            elif isinstance(message, Woken):
                error = message.error
            else:
                assert isinstance(message, Waking), message
        assert refused and "another checksum" in error
        on.release(ours)
        assert answers(on, 1) == right[1:]
        assert on.wake(0) == {0: None}
        assert answers(on, *range(MODELS)) == right
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-9])
    with driver(models, 0.25, ONE, packed_cache_dir=str(tmp_path)) as on:
        assert answers(on, *range(MODELS)) == right
        assert file.read_bytes() == whole


def test_codes_may_be_on_demand(models: list[Path]) -> None:
    with driver(models, None, ONE, quantization="int4") as on:
        expected = answers(on, *range(MODELS))
    # Experts of 4 bits take a third of those in bfloat16, so this is room for half of them.
    with driver(models, 1 / 6, ONE, quantization="int4") as on:
        assert answers(on, *range(MODELS)) == expected
        assert answers(on, *range(MODELS)) == expected
        found = counts(on, "cpu:0")
        assert sum(of["evictions"] for of in found) > 0
        assert sum(of["present_bytes"] for of in found) <= on.deployment.expert_pool_bytes


@pytest.mark.parametrize("parallel", ["tp", "ep"])
def test_experts_with_biases_may_be_on_demand(tmp_path: Path, parallel: str) -> None:
    """gpt-oss in MXFP4; the biases are in memory with the model."""
    shape = {
        "vocab_size": 8000,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_local_experts": 16,
        "num_hidden_layers": 4,
    }
    path = make_random_checkpoint(
        "gpt_oss", tmp_path / "random", shape, "float32", max_shard_size="1GB"
    )
    path, _ = quantize_gpt_oss(path, tmp_path / "made", GPT_OSS)
    with driver([path], None, SPLIT, ffn_parallel=parallel) as on:
        expected = answers(on, 0)
    # Experts of 4 bits take an eighth of those in float32, so this is room for half of them.
    with driver([path], 1 / 14, SPLIT, ffn_parallel=parallel) as on:
        assert answers(on, 0) == expected
        assert answers(on, 0) == expected
        for device in SPLIT[1]:
            assert any(of["evictions"] for of in counts(on, device))


@pytest.mark.parametrize("rounded", [None, "int4"])
def test_what_a_layer_takes_is_counted_as_it_is_packed(
    models: list[Path], rounded: str | None
) -> None:
    """The least budget is that of the largest layer, of which plain weights fill all."""
    spec = read_model(models[0], None, "float32", rounded)
    shards = [FFNShard(rank=rank, ranks=3, parallel="tp", unit=spec.cut_unit) for rank in range(3)]
    for shard in (WHOLE, *shards, FFNShard(rank=1, ranks=3, parallel="ep")):
        part, fixed = (
            PackedFFN(spec, models[0], shard, on_demand=on_demand) for on_demand in (False, True)
        )
        experts = part.weights.plain_bytes - fixed.weights.plain_bytes
        assert experts == SHAPE.layers * largest_layer(spec, shard)
        part.close()
        fixed.close()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_file_is_the_same_with_experts_on_demand(name: str) -> None:
    """Packed weights have one key and one file, whatever of them is in memory; what is not on
    demand lies closely in the arena, and experts are found where the file has them."""
    spec = read_model(DEMO / name)
    parts = [PackedFFN(spec, DEMO / name, WHOLE, on_demand=demand) for demand in (False, True)]
    forms = [part.weights.form(Checkpoint(DEMO / name)) for part in parts]
    assert forms[0].key() == forms[1].key()

    images = [part.weights.image() for part in parts]
    sizes = [round_up(matrix.bytes, 64) for matrix in images[0].matrices]
    ends = list(accumulate(reversed(sizes)))
    offsets = [end - size for end, size in zip(reversed(ends), sizes, strict=True)]
    table = PackedTable(
        key="key",
        arena_bytes=ends[-1],
        matrices=[PackedMatrix(at, ns.PLAIN, 1000 + i) for i, at in enumerate(offsets)],
        arrays=[7] * len(images[0].arrays),
        weight_bytes=ends[-1],
        broken=[],
    )
    every, rest = (PackedLayout(b"", table, placed(table, image), 4096) for image in images)
    right = {
        span.offset: checksum for span, checksum in zip(every.spans, every.checksums, strict=True)
    }
    assert len(rest.spans) == len(rest.stages)
    for span, checksum in zip(rest.spans, rest.checksums, strict=True):
        assert right[span.offset] == checksum
    assert rest.image.bytes == parts[1].weights.plain_bytes
    experts = parts[1].pooled(OpenWeights(-1, rest))
    assert len(experts) == sum(ffn.experts for ffn in spec.ffn if isinstance(ffn, MoEFFN))
    assert 2 * len(experts) == len(every.spans) - len(rest.spans)
    for expert in experts:
        assert right[expert.gate_up_offset] == expert.gate_up_checksum
        assert right[expert.down_offset] == expert.down_checksum
        assert expert.gate_up.contents.data is None and expert.down.contents.data is None
    assert sum(one.bytes for one in parts[1].weights.listing) == ffn_bytes(
        spec, WHOLE, experts=False
    )
    for part in parts:
        part.close()
