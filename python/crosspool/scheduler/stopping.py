"""The end of a request: end-of-sequence and stop tokens, a complete grammar, stop strings, regular
expressions, length.

Stop strings and expressions are searched for in the decoded text, so they may straddle tokens. In a
stream, tokens whose text may turn out to be the beginning of a stop string are *held*.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from crosspool.models.spec import ModelSpec
from crosspool.scheduler.protocols import GrammarMatcher, TextDecoder
from crosspool.scheduler.request import Finish, StopRules
from crosspool.scheduler.stop_regex import StopRegexes, TooSlow

_INCOMPLETE = "\ufffd"
_LONGEST_CHARACTER = 8
"""Number of tokens after which an incomplete character is taken as it is."""
CONTEXT_TOKENS = 5
"""Prompt tokens decoded before the output, since some tokenizers drop a text's leading space."""


class Stopping:
    """Decides after every output token of one request whether it was the last.

    ``max_new_tokens`` is the request's limit, clipped to what context and pool can hold. If it is
    below 1, there is no output token to decide about. The output begins with thinking if there are
    ``think_end`` tokens, which end it; a grammar binds only what comes after them."""

    def __init__(
        self,
        rules: StopRules,
        spec: ModelSpec,
        max_new_tokens: int,
        decoder: TextDecoder,
        prompt: Sequence[int],
        *,
        think_end: Sequence[int] = (),
    ) -> None:
        self._thinking = _Pattern(think_end) if think_end else None
        """Looks for the end of thinking; None after it."""
        self.reasoning_tokens = 0
        """Number of output tokens up to the end of thinking."""
        self._eos = frozenset(spec.eos_token_ids)
        self._min_new_tokens = rules.min_new_tokens
        self._max_new_tokens = max_new_tokens
        self._count = 0
        self._text = (
            StopText(
                rules.stop_strings, decoder, prompt[-CONTEXT_TOKENS:], regexes=rules.stop_regexes
            )
            if rules.stop_strings or rules.stop_regexes
            else None
        )
        stop_tokens = rules.stop_token_ids | (frozenset() if rules.ignore_eos else self._eos)
        self.stop_tokens = frozenset(t for t in stop_tokens if 0 <= t < spec.vocab)
        """Tokens that end the request once ``min_new_tokens`` tokens came before them."""
        self.matcher: GrammarMatcher | None = None

    @property
    def held(self) -> int:
        """Number of last output tokens that may belong to a stop string."""
        return self._text.held if self._text else 0

    @property
    def by_tokens(self) -> bool:
        """Whether ``stop_tokens`` and the number of tokens alone decide."""
        return self.matcher is None and self._text is None

    def follow(self, matcher: GrammarMatcher) -> Finish | None:
        """Has the output follow a grammar from now on; ``matcher`` has followed it so far. Returns
        how the request ends if the grammar ends it."""
        self.matcher = matcher
        return self._grammar_problem(matcher, "what was delivered")

    def feed(self, token: int) -> None:
        """Begins to take the next output token; to be called before :meth:`after`."""
        if self.matcher is not None and self._thinking is None:
            self.matcher.feed(token)

    @property
    def pending(self) -> bool:
        """Whether :meth:`after` has to wait for the grammar."""
        return self.matcher is not None and self.matcher.pending

    def after(self, token: int) -> Finish | None:
        """Takes the next output token; returns how the request ends if this token ends it."""
        self._count += 1
        matcher = None if self._thinking else self.matcher
        if self._thinking is not None:
            self.reasoning_tokens += 1
            if self._thinking.feed(token):
                self._thinking = None
        if matcher and (finish := self._grammar_problem(matcher, f"the sampled token {token}")):
            return finish
        try:
            matched = self._text.feed(token) if self._text else None
        except TooSlow:
            message = "`stop_regex` takes too long to look for in the output; make it simpler"
            return Finish(kind="abort", message=message, status=400)

        if token in self.stop_tokens and self._count > self._min_new_tokens:
            return Finish(kind="stop", matched=token)
        if matcher and matcher.is_terminated:
            return Finish(kind="stop", matched=token if token in self._eos else None)
        if matched is not None and self._count >= self._min_new_tokens:
            return Finish(kind="stop", matched=matched)
        if self._count >= self._max_new_tokens:
            return Finish(kind="length")
        return None

    def passed(self, count: int) -> None:
        """Takes ``count`` tokens that end nothing, of an output that :attr:`by_tokens` decides and
        that does not begin with thinking."""
        self._count += count

    def _grammar_problem(self, matcher: GrammarMatcher, what: str) -> Finish | None:
        if not matcher.accepted:
            message = f"the grammar does not allow {what}"
            return Finish(kind="abort", message=message, status=500)
        if matcher.error is not None:
            return Finish(kind="abort", message=matcher.error, status=400)
        return None

    def bitmask(self) -> bytes | None:
        """Tokens that the grammar allows next, as a bitmask; None without a grammar. Tokens that
        would end the request too early are left out, unless nothing else is allowed. While the
        request thinks, its grammar allows all tokens."""
        if self.matcher is None:
            return None
        allowed = self.matcher.bitmask()
        if self._thinking is not None:
            if self._count >= self._min_new_tokens:
                return None
            allowed = b"\xff" * len(allowed)
        if self._count >= self._min_new_tokens:
            return allowed
        later = bytearray(allowed)
        for token in self.stop_tokens:
            later[token // 8] &= ~(1 << token % 8)
        return bytes(later) if any(later) else allowed


class StopText:
    """Follows the decoded output text and finds the first stop string to be completed in it, or the
    first of ``regexes`` to match.

    SGLang's detokenizer leaves a match in the text, unless it is the pattern itself, letter for
    letter, which it takes for a stop string."""

    def __init__(
        self,
        stop_strings: Iterable[str],
        decoder: TextDecoder,
        context: Sequence[int],
        *,
        regexes: Sequence[str] = (),
    ) -> None:
        self._strings = sorted(stop_strings, key=len, reverse=True)
        self._patterns = [_Pattern(string) for string in self._strings]
        self._regexes = StopRegexes(regexes) if regexes else None
        self._trimmed = [*self._patterns, *(_Pattern(regex) for regex in regexes)]
        """What must not be shown by halves."""
        self._decoder = decoder
        self._ids = list(context)
        self._decided = len(self._ids)
        """Number of first ``_ids`` whose text is known; they stay as context for the next."""
        self._length = 0
        self._open_tokens: list[int] = []
        """Length of the text at the end of each held token; -1 while its text is incomplete."""

    @property
    def held(self) -> int:
        return len(self._open_tokens)

    def feed(self, token: int) -> str | None:
        """Takes the next token; returns the stop string that its text completes or the regular
        expression that matches, if any. Raises :class:`TooSlow`."""
        text = self._decode(token)
        if text is None:
            self._open_tokens.append(-1)
            return None
        completed = [
            string
            for character in text
            for string, pattern in zip(self._strings, self._patterns, strict=True)
            if pattern.feed(character)
        ]
        for literal in self._trimmed[len(self._patterns) :]:
            for character in text:
                literal.feed(character)
        self._length += len(text)
        ends = [end if end >= 0 else self._length for end in self._open_tokens]
        safe = self._length - max(pattern.matched for pattern in self._trimmed)
        self._open_tokens = [end for end in (*ends, self._length) if end > safe]
        if completed:
            return completed[0]
        return self._regexes.feed(text) if self._regexes is not None else None

    def _decode(self, token: int) -> str | None:
        """The text that ``token`` adds; None while that ends within a character."""
        self._ids.append(token)
        before = self._decoder.decode(self._ids[: self._decided])
        after = self._decoder.decode(self._ids)
        too_long = len(self._ids) - self._decided >= _LONGEST_CHARACTER
        if after.endswith(_INCOMPLETE) and not too_long:
            return None
        text = after[len(before) :]
        if text or too_long:
            self._ids = self._ids[self._decided :]
            self._decided = len(self._ids)
        return text


_Part = TypeVar("_Part", str, int)


class _Pattern(Generic[_Part]):
    """Knuth-Morris-Pratt matcher, one part at a time: a character of a text, or a token."""

    def __init__(self, whole: Sequence[_Part]) -> None:
        self._whole: Sequence[_Part] = whole
        self.matched = 0
        """Length of the longest proper prefix of ``whole`` that the parts fed so far end with."""
        self._fallback = [0]
        for part in whole[1:]:
            self._fallback.append(self._longer(self._fallback[-1], part))

    def feed(self, part: _Part) -> bool:
        """Whether ``part`` completes ``whole``."""
        self.matched = self._longer(self.matched, part)
        complete = self.matched == len(self._whole)
        if complete:
            self.matched = self._fallback[-1]
        return complete

    def _longer(self, matched: int, part: _Part) -> int:
        while matched and self._whole[matched] != part:
            matched = self._fallback[matched - 1]
        return matched + 1 if self._whole[matched] == part else 0
