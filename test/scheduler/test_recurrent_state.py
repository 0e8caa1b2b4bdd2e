"""Models with recurrent state: it is promised, freed and lost with KV, and nobody shares it."""

from random import Random

import pytest
from crosspool.kvpool.layout import KVLayout
from simulation import (
    DELTA_NET,
    Simulation,
    deployment,
    expected_tokens,
    mixed_requests,
    request,
    spec,
)

SPEC = spec(delta_net=DELTA_NET)


def test_the_state_takes_pages_of_each_request():
    layout = KVLayout(SPEC, page_size=4, chunk_bytes=4096)
    assert layout.page_bytes == 4 * 8 * 4
    # 16 rows of the matrix and 9 of the convolution's inputs, of 16 bytes; 8 of them to a page
    assert SPEC.state_bytes == 25 * 16 and layout.state_pages == 4
    sim = Simulation(deployment(1, promise="worst_case"), [SPEC])
    sim.add(request("r", 10, 7))
    (seq,) = sim.core._ranks[0].running[0].values()
    assert len(seq.pages) == 4 + -(-17 // 4)
    sim.run()
    assert sim.tokens("r") == expected_tokens(request("r", 10, 7), SPEC)
    sim.assert_empty()


def test_no_two_requests_share_pages_and_other_models_still_do():
    d = deployment(2)
    assert d.prefix_cache
    sim = Simulation(d, [SPEC, spec()])
    for model in (0, 1):
        for name in ("first", "second"):
            sim.add(request(f"{name} {model}", list(range(40)), 4, model=model))
            sim.run()
    cached = {rid: outputs[-1].cached_tokens for rid, outputs in sim.outputs.items()}
    assert cached["first 0"] == cached["second 0"] == cached["first 1"] == 0
    assert cached["second 1"] > 0


@pytest.mark.parametrize("fields", [{}, {"promise": "growth", "growth_tokens": 4}])
@pytest.mark.parametrize("lease", [1, 5])
def test_requests_are_replayed_from_their_first_token_when_a_rank_is_lost(fields, lease):
    d = deployment(
        2, loop="resident", lease_steps=lease, kv_pool_bytes=30 * 4096, chunked_prefill_size=16,
        **fields,
    )  # fmt: skip
    requests = mixed_requests(8)
    calm = Simulation(d, [SPEC, spec()])
    calm.add(*requests)
    calm.run()
    for steps in range(0, 60, 3):
        sim = Simulation(d, [SPEC, spec()])
        sim.add(*requests)
        for _ in range(steps):
            if sim.ranks[0].steps:
                sim.answer()
        sim.lose()
        sim.restore()
        sim.run()
        for r in requests:
            assert sim.tokens(r.rid) == calm.tokens(r.rid)
        sim.assert_empty()


@pytest.mark.parametrize("seed", range(6))
def test_nobody_is_stuck_in_a_tight_pool(seed):
    random = Random(seed)
    own = spec(context=200, delta_net=DELTA_NET, head_dim=random.choice((8, 10, 14, 22)))
    layout = KVLayout(own, 4, 4096)
    chunks = layout.chunks_for(layout.pages_for(200)) + random.choice((0, 1, 3))
    d = deployment(
        2, promise="growth", growth_tokens=8, kv_pool_bytes=chunks * 4096, max_running_requests=64
    )
    sim = Simulation(d, [own, spec(context=100)], lambda tokens: 7)
    requests = [
        request(f"r{i}", random.randint(1, 60), random.randint(1, 40), model=i % 2)
        for i in range(20)
    ]
    sim.add(*requests)
    sim.run()
    for r in requests:
        assert sim.finish(r.rid).kind == "length"
    sim.assert_empty()
