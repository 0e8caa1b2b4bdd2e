"""A deterministic deployment on a virtual clock: the scheduler's core over simulated attention
ranks that check every message against the control path's rules and answer steps with tokens that
depend on the sequence alone, as they find it in the request's pages."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import DeltaNetSpec, DenseFFN, GQASpec, ModelSpec, RopeSpec
from crosspool.scheduler.changes import Change
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.request import GenerateRequest, Grammar, Output, StopRules
from crosspool.transport.messages import (
    AddModel,
    Logprobs,
    Recall,
    Release,
    RemoveModel,
    Row,
    RowResult,
    Sampling,
    Step,
    StepResult,
    TokenLogprobs,
)
from simulated_devices import SimulatedDevices

VOCAB = 320
EOS = 300
WORDS = {301: "ab", 302: "abc", 303: "STOP", 304: "xST", 305: "OPy"}
"""Tokens of several characters; those below 256 are single bytes, the rest have no text."""

NextToken = Callable[[list[int]], int]


def hashed_token(tokens: list[int]) -> int:
    """A token that depends on the whole sequence before it; about one in 40 is the eos."""
    digest = zlib.crc32(repr(tokens).encode())
    return EOS if digest % 40 == 0 else digest // 40 % 256


DELTA_NET = DeltaNetSpec(layers=frozenset({0}), k_heads=1, v_heads=1, k_dim=16, v_dim=4, taps=2)


def spec(
    context: int = 256,
    layers: int = 2,
    head_dim: int = 8,
    delta_net: DeltaNetSpec | None = None,
) -> ModelSpec:
    """``head_dim * 4`` bytes of KV per token and layer that has attention."""
    return ModelSpec(
        family="qwen3_moe",
        hidden=16,
        vocab=VOCAB,
        context=context,
        dtype="bfloat16",
        norm_eps=1e-6,
        tied_embeddings=False,
        attention=GQASpec(
            q_heads=1,
            kv_heads=1,
            head_dim=head_dim,
            scale=1.0,
            rope=RopeSpec(dim=head_dim, interleaved=False),
        ),
        ffn=(DenseFFN(intermediate=8),) * layers,
        delta_net=delta_net,
        eos_token_ids=(EOS,),
    )


def deployment(
    models: int,
    ranks: int = 1,
    bounds: dict[int, dict[str, int]] | None = None,
    **fields: Any,
) -> Deployment:
    """``bounds`` has kv_floor_bytes and kv_ceiling_bytes of models, by index."""
    defaults: dict[str, Any] = {
        "kv_pool_bytes": ranks * 64 * 4096,
        "chunk_bytes": 4096,
        "page_size": 4,
        "chunked_prefill_size": 32,
        "tbt_target_ms": 0.0,
        "loop": "host",
        "max_running_requests": 8,
        "weight_pool_devices": (Device("cuda:9"),),
        "weight_pool_bytes": 1 << 30,
    }
    return Deployment(
        models={
            i: ModelConfig(name=f"model{i}", path="/none", **(bounds or {}).get(i, {}))
            for i in range(models)
        },
        next_model=models,
        kv_pool_devices=tuple(Device(f"cuda:{i}") for i in range(ranks)),
        **(defaults | fields),
    )


def request(
    rid: str,
    prompt: list[int] | int,
    max_new_tokens: int | None,
    *,
    model: int = 0,
    stream: bool = False,
    grammar: Grammar | None = None,
    logprobs: Logprobs | None = None,
    sampling: Sampling | None = None,
    cache_namespace: tuple[str, str] = ("", ""),
    thinks_first: bool = False,
    **stop: Any,
) -> GenerateRequest:
    """``prompt`` has token ids, or is just their number."""
    if isinstance(prompt, int):
        seed = zlib.crc32(rid.encode())
        prompt = [(seed + 31 * i) % 256 for i in range(prompt)]
    return GenerateRequest(
        rid=rid,
        model=model,
        input_ids=prompt,
        sampling=sampling or Sampling(seed=zlib.crc32(rid.encode())),
        stop=StopRules(max_new_tokens=max_new_tokens, **stop),
        logprobs=logprobs or Logprobs(),
        grammar=grammar,
        stream=stream,
        cache_namespace=cache_namespace,
        thinks_first=thinks_first,
    )


def mixed_requests(number: int) -> list[GenerateRequest]:
    """Requests of six kinds in turn, of the models 0 and 1 in turn."""
    kinds: list[dict[str, Any]] = [
        {"stream": True},
        {"logprobs": Logprobs(output=True, prompt_start=0)},
        {"logprobs": Logprobs(output=True, prompt_start=21), "stream": True},
        {"stop_strings": ("ab", "\x00"), "stream": True},
        {"stop_strings": ("STOP",), "stream": True},
        {},
    ]
    return [
        request(f"{i}", 20 + 7 * i, 6 + i, model=i % 2, **kinds[i % len(kinds)])
        for i in range(number)
    ]


class WordDecoder:
    """Decodes tokens to UTF-8 bytes, ``WORDS`` or nothing."""

    def decode(self, ids: list[int]) -> str:
        parts = [bytes([t]) if t < 256 else WORDS.get(t, "").encode() for t in ids]
        return b"".join(parts).decode(errors="replace")


Slot = tuple[int, int]
"""One position of a page: its token, and the digest of the sequence up to it, on which its K and V
depend."""


def digest(before: int, token: int) -> int:
    return zlib.crc32(token.to_bytes(4, "little"), before)


class SimulatedRank:
    """One attention rank: carries messages out in order and asserts that they may be sent."""

    def __init__(
        self, d: Deployment, specs: Mapping[int, ModelSpec], next_token: NextToken
    ) -> None:
        self.deployment = d
        self.next_token = next_token
        self.layouts: dict[int, KVLayout] = {}
        self.budget = d.kv_pool_bytes // len(d.kv_pool_devices) // d.chunk_bytes
        self.mapped: dict[int, set[int]] = {}
        self.steps: list[Step] = []
        self.served: list[int] = []
        """The models of all steps received, in order."""
        self.last_step = -1
        self.recalled: set[int] = set()
        self.leased_steps = 0
        """Number of steps that followed without a message."""
        self.model: dict[int, int] = {}
        self.prompt_len: dict[int, int] = {}
        self.logprobs: dict[int, Logprobs] = {}
        self.sampling: dict[int, Sampling] = {}
        self.tokens: dict[int, list[int]] = {}
        self.sampled: dict[int, int] = {}
        """The last token that each request sampled here, until it is fed back."""
        self.pages: dict[int, list[int]] = {}
        self.own: dict[int, set[int]] = {}
        """Pages of a request that it may write to."""
        self.written: dict[int, dict[int, list[Slot]]] = {}
        """What was written to each page since it was mapped, indexed [model][page]."""
        self.ever_opened: set[int] = set()
        for number, each in specs.items():
            self.add_model(number, each)

    def add_model(self, number: int, each: ModelSpec) -> None:
        assert number not in self.layouts, "a model is added twice"
        self.layouts[number] = KVLayout(
            each, self.deployment.page_size, self.deployment.chunk_bytes
        )
        self.mapped[number], self.written[number] = set(), {}

    def remove_model(self, number: int) -> None:
        assert not self.mapped[number], "a model is removed with chunks"
        assert number not in self.model.values(), "a model is removed with requests"
        assert number not in [step.model for step in self.steps], "a model is removed under a step"
        del self.layouts[number], self.mapped[number], self.written[number]

    def receive(self, message: Any) -> None:
        if isinstance(message, Step):
            self.take_step(message)
        elif isinstance(message, Recall):
            self.take_recall(message)
        else:
            assert isinstance(message, Release)
            self.take_release(message)

    def take_step(self, step: Step) -> None:
        assert step.step > self.last_step, "a step came out of order"
        self.last_step = step.step
        assert step.model in self.layouts, "a step of a model that the rank does not know"
        assert step.model not in [s.model for s in self.steps], "two steps of one model"
        assert len(self.steps) < self.deployment.lanes + 1
        self.map_chunks(step.model, step.map_chunks)
        for opened in step.opens:
            assert opened.request not in self.ever_opened, "opened twice"
            self.ever_opened.add(opened.request)
            self.model[opened.request] = step.model
            self.prompt_len[opened.request] = opened.prompt_len
            self.logprobs[opened.request] = opened.logprobs
            self.sampling[opened.request] = opened.sampling
            self.tokens[opened.request] = []
            self.pages[opened.request] = []
            self.own[opened.request] = set()
        assert step.rows
        if step.lease > 1:
            assert all(row.sample and row.bitmask is None for row in step.rows)
        assert len({row.request for row in step.rows}) == len(step.rows)
        assert {o.request for o in step.opens} <= {row.request for row in step.rows}
        chunks = [row for row in step.rows if row.request not in self.sampled]
        assert sum(len(r.tokens) for r in chunks) <= self.deployment.chunked_prefill_size
        for row in step.rows:
            self.take_row(step.model, row, step.lease)
        assert len(step.rows) <= self.deployment.max_running_requests
        self.steps.append(step)
        self.served.append(step.model)

    def map_chunks(self, model: int, chunks: list[int]) -> None:
        assert not self.mapped[model] & set(chunks), "mapped twice"
        assert len(set(chunks)) == len(chunks)
        self.mapped[model] |= set(chunks)
        assert sum(map(len, self.mapped.values())) <= self.budget, "over budget"

    def take_recall(self, recall: Recall) -> None:
        assert recall.step <= self.last_step
        assert recall.step not in self.recalled, "recalled twice"
        self.recalled.add(recall.step)

    def take_row(self, model: int, row: Row, lease: int) -> None:
        """``lease`` is the number of its steps left, this one included; only its first step brings
        pages."""
        assert self.model[row.request] == model
        tokens, prompt_len = self.tokens[row.request], self.prompt_len[row.request]
        layout = self.layouts[model]
        size, end = layout.page_size, row.start + len(row.tokens)
        if not tokens:
            # what lies before its first row, it shares
            shared, rest = divmod(row.start, size)
            assert not rest and row.start < prompt_len
            assert not (shared and layout.state_pages), "a recurrent state is shared"
            start = self.logprobs[row.request].prompt_start
            assert not (shared and 0 <= start <= row.start), "its log-probability was not computed"
            tokens += [token for page in row.pages[:shared] for token, _ in self.read(model, page)]
            new = set(row.pages[shared:])
        else:
            new = set(row.pages)
        self.own[row.request] |= new
        assert row.tokens and row.start == len(tokens), "a gap in the sequence"
        if row.request in self.sampled:
            assert row.tokens == [self.sampled.pop(row.request)]
        assert not row.sample or end >= prompt_len
        for other, pages in self.pages.items():
            if self.model[other] == model:
                assert not set(pages) & new, "a page to write to is another request's"
        self.pages[row.request] += row.pages
        pages = self.pages[row.request]
        assert len(set(pages)) == len(pages)
        if row.pages:
            assert len(pages) == layout.pages_for(end + lease - 1)
        assert len(pages) >= layout.pages_for(end + lease - 1), "too few pages for the step"
        for page in pages:
            assert set(layout.chunks_of_pages(page)) <= self.mapped[model], "unmapped page"
        self.check_read(model, pages, tokens)
        self.write(model, row, tokens)

    def read(self, model: int, page: int) -> list[Slot]:
        slots = self.written[model].get(page, [])
        full = len(slots) == self.layouts[model].page_size
        assert full, "a page counts as cached that was not computed here"
        return slots

    def check_read(self, model: int, pages: list[int], tokens: list[int]) -> None:
        """Asserts that the pages hold the K and V, and the recurrent state, of exactly these
        tokens."""
        size, chain = self.layouts[model].page_size, 0
        state = self.layouts[model].state_pages
        for position, token in enumerate(tokens):
            chain = digest(chain, token)
            slots = self.written[model].get(pages[state + position // size], [])
            assert slots[position % size : position % size + 1] == [(token, chain)], "wrong KV"
        if tokens:
            for page in pages[:state]:
                assert self.written[model].get(page) == [(len(tokens), chain)], "wrong state"

    def write(self, model: int, row: Row, tokens: list[int]) -> None:
        size, state = self.layouts[model].page_size, self.layouts[model].state_pages
        chain = 0
        for token in tokens:
            chain = digest(chain, token)
        for position, token in enumerate(row.tokens, row.start):
            page = self.pages[row.request][state + position // size]
            assert page in self.own[row.request], "a shared page is written"
            chain = digest(chain, token)
            slots = self.written[model].setdefault(page, [])
            del slots[position % size :]
            assert len(slots) == position % size
            slots.append((token, chain))
        tokens += row.tokens
        for page in self.pages[row.request][:state]:
            self.written[model][page] = [(len(tokens), chain)]

    def take_release(self, release: Release) -> None:
        assert release.requests or release.unmap_chunks
        busy = {row.request for step in self.steps for row in step.rows}
        for number in release.requests:
            assert number not in busy, "released while in a step"
            assert self.model.pop(number) == release.model
            del self.tokens[number], self.pages[number], self.own[number]
            self.sampled.pop(number, None)
        unmap = set(release.unmap_chunks)
        assert unmap <= self.mapped[release.model]
        for number, pages in self.pages.items():
            if self.model[number] == release.model:
                used = {c for p in pages for c in self.layouts[release.model].chunks_of_pages(p)}
                assert not used & unmap, "a chunk in use is unmapped"
        self.mapped[release.model] -= unmap
        written = self.written[release.model]
        for page in list(written):
            if unmap.intersection(self.layouts[release.model].chunks_of_pages(page)):
                del written[page]

    def answer(self, index: int = 0) -> StepResult:
        """Ends one of the steps at work on the lanes and returns its result."""
        step = self.steps.pop(min(index, len(self.steps) - 1, self.deployment.lanes - 1))
        rows = [self.answer_row(row) for row in step.rows]
        more = self.goes_on(step, rows)
        if more:
            self.go_on(step)
        return StepResult(step=step.step, rows=rows, more=more)

    def refuse(self, index: int = 0) -> StepResult:
        """Ends one of the steps at work, since weights are missing, and forgets its requests."""
        step = self.steps.pop(min(index, len(self.steps) - 1, self.deployment.lanes - 1))
        for row in step.rows:
            for position in range(row.start, row.start + len(row.tokens)):
                layout = self.layouts[step.model]
                page, slot = divmod(position, layout.page_size)
                place = self.pages[row.request][layout.state_pages + page]
                del self.written[step.model][place][slot:]
            self.ever_opened.discard(row.request)
            self.sampled.pop(row.request, None)
            del self.model[row.request], self.tokens[row.request]
            del self.pages[row.request], self.own[row.request]
        return StepResult(step=step.step, rows=[], refused=True)

    def goes_on(self, step: Step, rows: list[RowResult]) -> bool:
        stopped = any(r.token in self.sampling[r.request].stop_token_ids for r in rows)
        return step.lease > 1 and not stopped and step.step not in self.recalled

    def go_on(self, step: Step) -> None:
        """Queues the next step of a lease behind the steps that wait."""
        rows = []
        for row in step.rows:
            end, token = row.start + len(row.tokens), self.sampled[row.request]
            rows.append(Row(request=row.request, start=end, tokens=[token], pages=[], sample=True))
            self.take_row(step.model, rows[-1], step.lease - 1)
        self.leased_steps += 1
        self.steps.append(
            Step(
                step=step.step,
                model=step.model,
                map_chunks=[],
                opens=[],
                rows=rows,
                lease=step.lease - 1,
            )
        )

    def answer_row(self, row: Row) -> RowResult:
        wants = self.logprobs[row.request]
        prompt = [
            TokenLogprobs(token=token, logprob=-float(p) if p else None, top=[], token_ids=[])
            for p, token in enumerate(row.tokens, row.start)
            if 0 <= wants.prompt_start <= p < self.prompt_len[row.request]
        ]
        if not row.sample:
            return RowResult(request=row.request, prompt=prompt)
        token, logprob = self.draw(row.request)
        if row.bitmask is not None and not _allows(row.bitmask, token):
            token = first_allowed(row.bitmask)
        self.sampled[row.request] = token
        output = TokenLogprobs(token=token, logprob=logprob, top=[], token_ids=[])
        return RowResult(
            request=row.request,
            token=token,
            output=output if wants.output else None,
            prompt=prompt,
        )

    def draw(self, request: int) -> tuple[int, float]:
        """The request's next token without a grammar, and its log-probability."""
        return self.next_token(self.tokens[request]), -1.0


def first_allowed(bitmask: bytes) -> int:
    return next(token for token in range(VOCAB) if _allows(bitmask, token))


def _allows(bitmask: bytes, token: int) -> bool:
    return bool(bitmask[token // 8] >> token % 8 & 1)


def bitmask_of(tokens: set[int]) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(VOCAB // 8, "little")


class ToyMatcher:
    """Allows one set of tokens after another; complete after the last. After a token that
    ``slow_at`` names by its number it stays pending until ``pending`` is set to False."""

    error: str | None = None
    accepted = True
    pending = False

    def __init__(self, allowed: list[set[int]], slow_at: int | None = None) -> None:
        self.allowed = allowed
        self.position = 0
        self.slow_at = slow_at

    def feed(self, token: int) -> None:
        assert not self.pending
        self.accepted = token in self.allowed[self.position]
        self.position += self.accepted
        self.pending = self.position == self.slow_at

    def bitmask(self) -> bytes:
        assert not self.pending and not self.is_terminated
        return bitmask_of(self.allowed[self.position])

    @property
    def is_terminated(self) -> bool:
        return self.position == len(self.allowed)


class ToyGrammars:
    """Compiles when the test sets the future's result."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []
        self.outputs: list[list[int]] = []
        """Tokens that each matcher is to have followed."""

    def compile(self, grammar: Grammar, output: Sequence[int] = ()) -> Future[Any]:
        self.outputs.append(list(output))
        self.futures.append(Future())
        return self.futures[-1]


class Simulation:
    """Core, ranks and clock together. ``outputs[rid]`` collects what came out."""

    def __init__(
        self,
        d: Deployment,
        specs: list[ModelSpec],
        next_token: NextToken = hashed_token,
        think_ends: list[tuple[int, ...]] | None = None,
    ) -> None:
        self.now = 1000.0
        self.specs = dict(enumerate(specs))
        self.deployment = d
        self.grammars = [ToyGrammars() for _ in specs]
        tools = {
            number: ModelTools(
                spec=each,
                decoder=WordDecoder(),
                grammars=self.grammars[number],
                think_end=think_ends[number] if think_ends else (),
            )
            for number, each in self.specs.items()
        }
        self.core = SchedulerCore(d, tools, lambda: self.now)
        self.next_token = next_token
        self.ranks = [SimulatedRank(d, self.specs, next_token) for _ in d.kv_pool_devices]
        self.devices = SimulatedDevices(d, self.specs)
        self.changes: list[Change] = []
        """Models that have come, been refused or left."""
        self.started: list[str] = []
        """Request ids in the order in which the requests were opened on a rank."""
        self._rid_of_seed: dict[int, str] = {}
        self.outputs: dict[str, list[Output]] = defaultdict(list)

    def add(self, *requests: GenerateRequest) -> None:
        for r in requests:
            self._rid_of_seed[r.sampling.seed] = r.rid
            self.core.add(r)
        self.schedule()

    def schedule(self) -> None:
        self.core.schedule()
        for device, order in self.core.drain_device_messages():
            busy = {step.model for rank in self.ranks for step in rank.steps}
            if isinstance(order, AddModel | RemoveModel):
                self.change(device, order)
            else:
                self.devices.receive(device, order, busy)
        for rank, message in self.core.drain_messages():
            if isinstance(message, Step):
                self.devices.check_step(rank, message.model)
            self.ranks[rank].receive(message)
            if isinstance(message, Step):
                self.started += [self._rid_of_seed[o.sampling.seed] for o in message.opens]
        for output in self.core.drain_outputs():
            news = self.outputs[output.rid]
            assert not news or news[-1].finish is None, "output after the end"
            assert output.first == (not news)
            assert output.finish or output.token_ids
            assert not (news and output.prompt_logprobs)
            news.append(output)
            assert output.completion_tokens == len(self.tokens(output.rid))
        self.changes += self.core.drain_changes()

    def load(
        self, each: ModelSpec, name: str = "further", replaces: int | None = None, **options: Any
    ) -> int:
        """Adds a model; returns its number."""
        number = self.core.take_number()
        self.specs[number] = each
        self.grammars.append(ToyGrammars())
        config = ModelConfig(name=name, path="/none", **options)
        tools = ModelTools(spec=each, decoder=WordDecoder(), grammars=self.grammars[-1])
        self.core.add_model(number, config, tools, replaces)
        self.devices.know(number, self.core.deployment.with_model(number, config), self.specs)
        self.schedule()
        return number

    def unload(self, number: int, timeout: float = 60.0) -> None:
        self.core.remove_model(number, timeout)
        self.schedule()

    def change(self, device: int, order: AddModel | RemoveModel) -> None:
        """A device is told of a model that comes or leaves; it answers in :meth:`follow`."""
        for index, own in enumerate(self.deployment.kv_pool_devices):
            if self.deployment.devices.index(own) == device:
                if isinstance(order, AddModel):
                    self.ranks[index].add_model(order.model, self.specs[order.model])
                else:
                    self.ranks[index].remove_model(order.model)
        if isinstance(order, RemoveModel):
            assert order.model not in self.devices.takes[device], "a model is removed with weights"
        self.devices.orders.append((device, order))

    def answer(self, rank: int = 0, index: int = 0) -> None:
        """Ends one step of ``rank``."""
        self.core.on_result(rank, self.ranks[rank].answer(index))
        self.schedule()

    def follow(self, error: str | None = None) -> None:
        """Has the devices do all that they were told to; wakes and loads fail with ``error``, if
        given."""
        while self.devices.orders:
            device, order = self.devices.orders.pop(0)
            if isinstance(order, AddModel):
                self.core.on_added(device, order.model, error)
            elif isinstance(order, RemoveModel):
                self.core.on_removed(device, order.model)
            elif self.devices.carry_out(device, order, error):
                self.core.on_slept(device, order.model)
            else:
                self.core.on_woken(device, order.model, error)
            self.schedule()

    def lose(self, rank: int = 0) -> SimulatedRank:
        """Attention rank ``rank`` dies; returns it as it was."""
        dead = self.ranks[rank]
        self.ranks[rank] = SimulatedRank(self.deployment, self.specs, self.next_token)
        self.core.lose_attention_rank(rank)
        self.schedule()
        return dead

    def restore(self, rank: int = 0) -> None:
        """Attention rank ``rank`` is back."""
        self.core.restore_attention_rank(rank)
        self.schedule()

    def answer_all(self) -> None:
        """Ends the oldest step of every rank."""
        for index, rank in enumerate(self.ranks):
            if rank.steps:
                self.answer(index)

    def run(self) -> None:
        """Goes on until every step has ended."""
        while any(rank.steps for rank in self.ranks):
            self.answer_all()

    def finished(self, rid: str) -> bool:
        return bool(self.outputs[rid]) and self.outputs[rid][-1].finish is not None

    def finish(self, rid: str) -> Any:
        assert self.finished(rid), f"{rid} has not ended"
        return self.outputs[rid][-1].finish

    def tokens(self, rid: str) -> list[int]:
        return [token for output in self.outputs[rid] for token in output.token_ids]

    def text(self, rid: str) -> str:
        return WordDecoder().decode(self.tokens(rid))

    def snapshot(self) -> dict[str, Any]:
        """The core's snapshot as HTTP clients see it."""
        return msgspec.to_builtins(self.core.snapshot())

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs, no step is in flight and nothing is to be drained."""
        core = self.core
        return not (
            core._messages
            or core._outputs
            or any(core._requests())
            or any(rank.flights for rank in core._ranks)
        )

    def assert_empty(self) -> None:
        """Asserts that nobody waits or runs, that nothing is promised, and that a flush gives back
        every page and chunk."""
        assert self.idle
        for rank in self.snapshot()["ranks"]:
            assert rank["free_chunks"] + rank["cached_chunks"] == rank["budget_chunks"]
            assert rank["promised_chunks"] == rank["running"] == 0
            assert rank["mapped_chunks"] == rank["cached_chunks"]
        self.core.flush()
        self.schedule()
        for rank in self.ranks:
            assert not rank.model and not any(rank.mapped.values()) and not rank.steps
        for rank in self.snapshot()["ranks"]:
            assert rank["free_chunks"] == rank["budget_chunks"]
            assert rank["promised_chunks"] == rank["mapped_chunks"] == rank["cached_chunks"] == 0


def expected_tokens(r: GenerateRequest, s: ModelSpec) -> list[int]:
    """Tokens that ``r``, without stop strings or grammar, must yield under :func:`hashed_token`."""
    most = r.stop.max_new_tokens
    room = s.context - len(r.input_ids)
    tokens = list(r.input_ids)
    stops = r.stop.stop_token_ids | (frozenset() if r.stop.ignore_eos else {EOS})
    for _ in range(room if most is None else min(most, room)):
        tokens.append(hashed_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(r.input_ids) :]
