"""Stop regular expressions against Python's own search of the text, and what they may cost."""

import re
import time
import warnings

import pytest
from crosspool.scheduler.request import Finish, StopRules
from crosspool.scheduler.stop_regex import WINDOW, StopRegexes, TooSlow
from crosspool.scheduler.stopping import Stopping
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulation import EOS, WORDS, Simulation, WordDecoder, deployment, request, spec

HOSTILE = [r"(a+)+$x", r"(?:(?:a{1,25}){1,25})+$x", "(?=(a*)*b)" * 20, r"(?<!(?i:\w(?=)+)*){99}"]


def ids(*words: str | int) -> list[int]:
    """Token ids of single ASCII characters, of bytes, or of the simulation's words."""
    vocabulary = {word: token for token, word in WORDS.items()}
    return [w if isinstance(w, int) else vocabulary.get(w) or ord(w) for w in words]


def stream(script: list[int], *patterns: str, **rules):
    """Runs ``script`` as a stream; what was delivered after each step, and the end."""
    sim = Simulation(deployment(1), [spec()], lambda tokens: script[len(tokens) - 3])
    sim.add(request("r", 3, len(script), stream=True, stop_regexes=patterns, **rules))
    shown = []
    while sim.ranks[0].steps:
        sim.answer()
        shown.append(len(sim.tokens("r")))
    return shown, sim.finish("r")


@pytest.mark.parametrize(
    ("script", "patterns", "shown", "matched"),
    [
        (ids("h", "i", "4", "2", "x"), [r"\d\d"], [1, 2, 3, 4], r"\d\d"),
        (ids("x", "abc", "y"), ["zz", "b[cd]"], [1, 2], "b[cd]"),
        (ids("x", "y"), [r"\d"], [1, 2], None),
        # characters of several tokens
        (ids("x", 0xC3, 0xA9, "y"), ["[é]"], [1, 1, 3], "[é]"),
        # The match is the pattern itself, so the detokenizer will take it away.
        (ids("x", "S", "T", "y"), ["ST"], [1, 1, 3], "ST"),
        (ids("x", "S", "U", "y"), ["ST"], [1, 1, 3, 4], None),
        # Only the text's own beginning is one.
        (ids("a", "b", "a"), ["^b"], [1, 2, 3], None),
    ],
)
def test_stream(script, patterns, shown, matched):
    seen, finish = stream(script, *patterns)
    assert seen == shown
    expected = Finish(kind="length") if matched is None else Finish(kind="stop", matched=matched)
    assert finish == expected


def test_a_stop_string_wins_over_a_regex_and_both_over_the_length():
    _, finish = stream(ids("a", "b"), r"\w{2}", stop_strings=("ab",))
    assert finish.matched == "ab"
    _, finish = stream(ids("a", "b"), r"\w{2}")
    assert finish.matched == r"\w{2}"
    _, finish = stream([ord("a"), EOS], r"\w$")
    assert finish.matched == r"\w$"


def test_a_match_before_min_new_tokens_does_not_count():
    _, finish = stream(ids("1", "x", "y", "z"), r"\d", min_new_tokens=2)
    assert finish.kind == "length"
    shown, finish = stream(ids("1", "x", "2", "z"), r"\d", min_new_tokens=2)
    assert len(shown) == 3 and finish.matched == r"\d"


atoms = st.sampled_from(
    ["a", "b", "c", ".", r"\w", "[ab]", "[^a]", "^", "$", r"\b", "aa", "{e}", "[[:a:]", "(?i:B)"]
)
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "+?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
        inner.map(lambda one: f"({one})"),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
        st.sampled_from("abc").map(lambda one: f"(?<={one})"),
    ),
    max_leaves=6,
)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(ids("a", "b", "c", "ab", "abc", "x")), min_size=1, max_size=15),
    st.lists(patterns, min_size=1, max_size=3),
)
@example(ids("x", "e"), [r"(?:xe){e}"])
@example(ids("x", "a", ":"), [r"[[:alpha:]]"])
def test_any_text(script, patterns):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = [re.compile(pattern) for pattern in patterns]
    decoder = WordDecoder()
    rules = StopRules(max_new_tokens=None, stop_regexes=tuple(patterns))
    stopping = Stopping(rules, spec(), 10**9, decoder, [1, 2, 3])
    for index, token in enumerate(script):
        text = decoder.decode(script[: index + 1])
        found = [pattern.pattern for pattern in expected if pattern.search(text)]
        finish = stopping.after(token)
        assert finish == (Finish(kind="stop", matched=found[0]) if found else None)
        if found:
            return


def test_only_the_last_characters_are_searched():
    followed = StopRegexes([r"<a>(?s:.)*</a>", r"(?<=q)b"])
    assert followed.feed("<a>" + "x" * (WINDOW - 7)) is None
    assert followed.feed("</a>") == r"<a>(?s:.)*</a>"
    followed = StopRegexes([r"<a>(?s:.)*</a>", r"(?<=q)b", r"^x"])
    assert followed.feed("<a>" + "x" * (WINDOW - 6)) is None
    assert followed.feed("</a>") is None
    for _ in range(20):
        assert followed.feed("x" * 1000) is None
    assert len(followed._text) < 5 * WINDOW
    assert followed.feed("q") is None
    assert followed.feed("b") == r"(?<=q)b"


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_search_that_takes_too_long_ends_the_request(pattern):
    rules = StopRules(max_new_tokens=None, stop_regexes=(pattern,))
    stopping = Stopping(rules, spec(), 10**9, WordDecoder(), [1, 2, 3])
    began = time.thread_time()
    for _ in range(2000):
        finish = stopping.after(ord("a"))
        if finish is not None:
            break
    assert finish is not None and finish.kind == "abort" and finish.status == 400
    assert "stop_regex" in finish.message
    assert time.thread_time() - began < 2


def test_what_one_request_takes_is_bounded_over_all_its_patterns_and_tokens():
    followed = StopRegexes([rf"(a+)+$x{i}" for i in range(32)])
    began = time.thread_time()
    with pytest.raises(TooSlow):
        followed.feed("a" * WINDOW)
    assert time.thread_time() - began < 0.1


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "unterminated"),
        ("(((a{999}){999}){999}){999}b", "repetitions"),
        ("(?:a|b{9999})", "9999"),
        (r"\p{L}", "escape"),
        ("a" * 257, "257 bytes"),
        ("*", "nothing to repeat"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern, why):
    sim = Simulation(deployment(1), [spec()])
    sim.add(request("r", 3, 5, stop_regexes=("a", pattern)))
    finish = sim.finish("r")
    assert finish.kind == "abort" and finish.status == 400
    assert "stop_regex" in finish.message and why in finish.message
