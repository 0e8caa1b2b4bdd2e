"""Stop strings against a plain search of the text, and what a stream may show meanwhile."""

import pytest
from crosspool.scheduler.request import Finish, StopRules
from crosspool.scheduler.stopping import Stopping
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import WORDS, Simulation, WordDecoder, deployment, request, spec


def ids(*words: str | int) -> list[int]:
    """Token ids of single ASCII characters, of bytes, or of the simulation's words."""
    vocabulary = {word: token for token, word in WORDS.items()}
    return [w if isinstance(w, int) else vocabulary.get(w) or ord(w) for w in words]


def stream(script: list[int], *stop: str, max_new_tokens: int | None = None, **rules):
    """Runs ``script`` as a stream; what was delivered after each step, and the end."""
    sim = Simulation(deployment(1), [spec()], lambda tokens: script[len(tokens) - 3])
    limit = len(script) if max_new_tokens is None else max_new_tokens
    sim.add(request("r", 3, limit, stream=True, stop_strings=stop, **rules))
    shown = []
    while sim.ranks[0].steps:
        sim.answer()
        shown.append(len(sim.tokens("r")))
    return shown, sim.finish("r"), sim


@pytest.mark.parametrize(
    ("script", "stop", "shown", "matched"),
    [
        (ids("h", "i", "STOP", "x"), ["STOP"], [1, 2, 3], "STOP"),
        (ids("h", "xST", "OPy", "x"), ["STOP"], [1, 1, 3], "STOP"),
        (ids("S", "T", "O", "P", "x"), ["STOP"], [0, 0, 0, 4], "STOP"),
        (ids("a", "abc", "x"), ["aab"], [0, 2], "aab"),
        # false alarms: held, then shown
        (ids("S", "T", "O", "x", "y"), ["STOP"], [0, 0, 0, 4, 5], None),
        (ids("xST", "xST", "x"), ["STOP"], [0, 1, 3], None),
        (ids("a", "a", "a", "b"), ["aab"], [0, 0, 1, 4], "aab"),
        (ids("a", "b", "a", "c"), ["abab", "ba?"], [0, 0, 0, 4], None),
        # two stop strings: the one that is complete first; at once, the longer
        (ids("a", "b", "c", "d"), ["abcd", "bc"], [0, 0, 3], "bc"),
        (ids("a", "abc"), ["bc", "aabc"], [0, 2], "aabc"),
        # one character of several tokens
        (ids("x", 0xC3, 0xA9, "y"), ["é"], [1, 1, 3], "é"),
        (ids("x", 0xC3, 0xA8, "y"), ["é"], [1, 1, 3, 4], None),
        (ids(0xE2, 0x82, 0xAC, "5", "!"), ["€5"], [0, 0, 0, 4], "€5"),
        # at the last token the stop string wins over the length
        (ids("x", "STOP"), ["STOP"], [1, 2], "STOP"),
        # the end gives up what was held
        (ids("x", "S", "T"), ["STOP"], [1, 1, 3], None),
    ],
)
def test_stream(script, stop, shown, matched):
    seen, finish, sim = stream(script, *stop)
    assert seen == shown
    expected = Finish(kind="length") if matched is None else Finish(kind="stop", matched=matched)
    assert finish == expected
    assert sim.tokens("r") == script[: shown[-1]]


def test_not_streaming_shows_the_same_tokens_once():
    script = ids("h", "xST", "OPy", "x")
    sim = Simulation(deployment(1), [spec()], lambda tokens: script[len(tokens) - 3])
    sim.add(request("r", 3, 4, stop_strings=("STOP",)))
    sim.run()
    (output,) = sim.outputs["r"]
    assert output.token_ids == script[:3]
    assert output.finish == Finish(kind="stop", matched="STOP")


def test_a_stop_string_before_min_new_tokens_does_not_count():
    script = ids("STOP", "x", "STOP", "y", "z")
    shown, finish, _ = stream(script, "STOP", min_new_tokens=2)
    assert shown == [1, 2, 3] and finish.matched == "STOP"
    _, finish, _ = stream(ids("S", "T", "O", "P", "x"), "STOP", min_new_tokens=4)
    assert finish.matched == "STOP"
    _, finish, _ = stream(ids("S", "T", "O", "P", "x"), "STOP", min_new_tokens=5)
    assert finish.kind == "length"
    shown, finish, _ = stream(ids("a", "a", "a", "b"), "aa", min_new_tokens=3)
    assert shown == [0, 1, 3] and finish.matched == "aa"


def test_an_abort_gives_up_what_was_held():
    sim = Simulation(deployment(1), [spec()], lambda tokens: ord("S"))
    sim.add(request("r", 3, 9, stream=True, stop_strings=("SSSSSS",)))
    sim.answer()
    sim.answer()
    sim.core.abort("r")
    sim.schedule()
    (output,) = sim.outputs["r"]
    assert output.token_ids == ids("S", "S") and output.first and output.finish.status == 499


def test_bytes_that_never_become_a_character_are_held_for_a_while_only():
    shown, _, _ = stream([0x80] * 30, "STOP")
    assert max(i - n for i, n in enumerate(shown, 1)) < 8


def reference(text_of_tokens: list[str], stops: list[str]) -> int | None:
    """Index of the token that completes the first stop string."""
    text = ""
    for index, piece in enumerate(text_of_tokens):
        text += piece
        if any(stop in text for stop in stops):
            return index
    return None


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(ids("a", "b", "c", "ab", "abc", "x")), min_size=1, max_size=25),
    st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_any_text(script, stops):
    decoder = WordDecoder()
    rules = StopRules(max_new_tokens=None, stop_strings=tuple(stops))
    stopping = Stopping(rules, spec(), 10**9, decoder, [1, 2, 3])
    end = reference([decoder.decode([token]) for token in script], stops)
    for index, token in enumerate(script):
        finish = stopping.after(token)
        assert (finish is not None) == (index == end)
        text = decoder.decode(script[: index + 1])
        if finish is not None:
            assert finish.matched in text
            break
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        open_text = max((len(b) for b in beginnings if text.endswith(b)), default=0)
        shown = script[: index + 1 - stopping.held]
        assert len(decoder.decode(shown)) <= len(text) - open_text, "showed too much"
        more = script[: len(shown) + 1]
        if stopping.held:
            assert len(decoder.decode(more)) > len(text) - open_text, "held too much"
