"""What a chat template writes around the words of the world, learnt once: most continuations need no rendering.

Guarantees: what a frame gives is what the template wrote for a probe of quotes, brackets, line ends and other letters,
and for the first real words of that kind, `_NUM_CHECKS` times; a kind that once differed is rendered ever after.
Does not know templates or tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, Any]  # as a template takes it

_NUM_CHECKS = 8
_NUM_KEPT = 1024  # models invent names of tools
_PROBE = "rft-{index} \"'\\ <b>&amp; {{{{x}}}} {{% é 中\t|\n\n# end-{index}"


class Written(NamedTuple):
    """What a template adds after a message, generation prompt included; of a fork, which rewrites, the whole."""

    text: str
    is_fork: bool


Render = Callable[[list[Message]], Written]  # what is added for these replies, after the same message


@dataclass(slots=True)
class _Frame:
    """pieces: the texts between the words of replies, one more than there are replies; None where there is no frame."""

    pieces: list[str] | None
    num_checks: int = 0

    def fill(self, words: Sequence[str]) -> str:
        assert self.pieces is not None
        return self.pieces[0] + "".join(word + piece for word, piece in zip(words, self.pieces[1:], strict=True))


class Frames:
    """Learns what surrounds replies, by kind of the message before them and of themselves."""

    def __init__(self, end: str) -> None:
        """end: the text that ends a turn; words that hold it are always rendered."""
        self._end = end
        self._frames: dict[Hashable, _Frame] = {}

    def written(self, place: Hashable, spoken: Message, replies: list[Message], render: Render) -> Written:
        """What is added after `spoken` when the world says `replies`: what `render` says, or would say.

        place: what a template may look at before `spoken`.
        """
        kind = place, _kind(spoken, replies)
        words = [str(reply.get("content")) for reply in replies]
        frame = self._frames.get(kind)
        is_plain = all(word and word == word.strip() and self._end not in word for word in words)
        if not is_plain or (frame is not None and frame.pieces is None):
            return render(replies)
        if frame is not None and frame.num_checks == _NUM_CHECKS:
            return Written(frame.fill(words), is_fork=False)
        written = render(replies)
        if frame is None and len(self._frames) < _NUM_KEPT:
            frame = self._frames[kind] = _Frame(_learnt(replies, render))
        if frame is not None and frame.pieces is not None:
            frame.num_checks += 1
            if written != (frame.fill(words), False):
                frame.pieces = None
        return written


def _kind(spoken: Message, replies: Sequence[Message]) -> Hashable:
    """What a template may look at beside the words: some write the name of the call that a result answers."""
    calls = tuple(str(call["function"]["name"]) for call in spoken.get("tool_calls", ()))
    return bool(spoken.get("content")), calls, tuple((reply["role"], reply.get("name")) for reply in replies)


def _learnt(replies: Sequence[Message], render: Render) -> list[str] | None:
    """None where the words are not written as they are, or an id, which differs every time, is written with them."""
    probes = [_PROBE.format(index=index) for index in range(len(replies))]
    text, is_fork = render([{**reply, "content": probe} for reply, probe in zip(replies, probes, strict=True)])
    if is_fork or any(text.count(probe) != 1 for probe in probes):
        return None
    pieces = []
    for probe in probes:
        before, found, text = text.partition(probe)
        if not found:  # in another order
            return None
        pieces.append(before)
    pieces.append(text)
    ids = [str(reply["tool_call_id"]) for reply in replies if reply.get("tool_call_id")]
    return None if any(one in piece for one in ids for piece in pieces) else pieces
