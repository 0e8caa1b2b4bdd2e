import math
import re

import pytest
from crosspool.transport.messages import Logprobs, Sampling
from simulation import VOCAB, Simulation, deployment, request, spec


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, VOCAB]}, f"token id {VOCAB} at position 1"),
        ({"prompt": [-1]}, "token id -1 at position 0"),
        ({"prompt": 65}, "65 tokens and leaves no room"),
        ({"prompt": 64}, "context is 64 tokens"),
        ({"prompt": 65, "max_new_tokens": 0}, "65 tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"min_new_tokens": -2}, "min_new_tokens must be at least 0, got -2"),
        ({"min_new_tokens": 5}, r"min_new_tokens \(5\) is greater than max_new_tokens \(4\)"),
        ({"stop_strings": ("x", "")}, "stop string must not be empty"),
        ({"sampling": Sampling(temperature=-0.1)}, "temperature .* got -0.1"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature .* got nan"),
        ({"sampling": Sampling(temperature=math.inf)}, "temperature .* got inf"),
        ({"sampling": Sampling(temperature=1e308)}, r"temperature .* to 1e\+06, got 1e\+308"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p .* got 0.0"),
        ({"sampling": Sampling(top_p=1.1)}, "top_p .* got 1.1"),
        ({"sampling": Sampling(top_k=0)}, "top_k .* got 0"),
        ({"sampling": Sampling(top_k=-2)}, "top_k .* got -2"),
        ({"sampling": Sampling(min_p=-0.1)}, "min_p .* got -0.1"),
        ({"sampling": Sampling(min_p=1.1)}, "min_p .* got 1.1"),
        ({"sampling": Sampling(frequency_penalty=2.1)}, "frequency_penalty .* got 2.1"),
        ({"sampling": Sampling(presence_penalty=-2.1)}, "presence_penalty .* got -2.1"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "repetition_penalty .* got 0.0"),
        ({"sampling": Sampling(logit_bias={VOCAB: 1.0})}, f"logit_bias names token id {VOCAB}"),
        ({"sampling": Sampling(logit_bias={3: math.nan})}, "logit_bias of token 3"),
        ({"sampling": Sampling(seed=2**63)}, "seed must be a 64-bit integer"),
        ({"logprobs": Logprobs(prompt_start=9)}, "logprob_start_len .* length 8, got 9"),
        ({"logprobs": Logprobs(top=-1)}, "top_logprobs_num .* got -1"),
        ({"logprobs": Logprobs(token_ids=(VOCAB,))}, f"token_ids_logprob .* {VOCAB};"),
    ],
)
def test_bad_requests_are_refused_with_400(fields, words):
    sim = Simulation(deployment(1), [spec(context=64)])
    sim.add(request("bad", **({"prompt": 8, "max_new_tokens": 4} | fields)))
    (output,) = sim.outputs["bad"]
    assert output.finish.kind == "abort" and output.finish.status == 400
    assert re.search(words, output.finish.message)
    sim.assert_empty()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 63},
        {"prompt": 64, "max_new_tokens": 0},
        {"min_new_tokens": 4},
        {"sampling": Sampling(temperature=0.0, top_p=1.0, top_k=1, min_p=1.0)},
        {"sampling": Sampling(frequency_penalty=-2.0, presence_penalty=2.0)},
        {"sampling": Sampling(repetition_penalty=2.0, logit_bias={0: -math.inf})},
        {"logprobs": Logprobs(prompt_start=8, top=VOCAB, token_ids=(0, VOCAB - 1))},
    ],
)
def test_values_at_the_edge_are_served(fields):
    sim = Simulation(deployment(1), [spec(context=64)])
    sim.add(request("good", **({"prompt": 8, "max_new_tokens": 4} | fields)))
    sim.run()
    assert sim.finish("good").kind != "abort"
