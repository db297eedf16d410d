"""What a template writes around the words of the world, learnt, and when it must not be."""

from __future__ import annotations

import html
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from test_chat import TEMPLATES, a_chat, an_item, spell

from rft.chat import Chat, tool_message
from rft.frames import Frames, Written
from rft.types import Message, ToolCall, ToolResult

END = "<end>"
SPOKEN = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search"}}]}


def replies(*words: str, **more: str) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": word, "tool_call_id": f"c{i}", **more} for i, word in enumerate(words)]


class Template:
    """Renders replies with `write`, and counts how often it is asked."""

    def __init__(self, write: Callable[[dict[str, Any]], str], *, is_fork: bool = False) -> None:
        self.write, self.is_fork, self.num_asked = write, is_fork, 0

    def __call__(self, replies: list[dict[str, Any]]) -> Written:
        self.num_asked += 1
        return Written("\n" + "".join(self.write(reply) for reply in replies) + "said:", self.is_fork)


def num_asked_after_learning(template: Template, texts: list[list[str]]) -> int:
    """How often 20 more rounds of `texts` render, each of them checked, after 20 rounds of plain words."""
    frames = Frames(END)
    for index in range(20):
        for words in texts:
            plain = replies(*(f"word {index}" for _ in words))
            assert frames.written("p", SPOKEN, plain, template) == template(plain)
    template.num_asked = 0
    for index in range(20):
        for words in texts:
            said = replies(*(f"{word}{index}" for word in words))
            assert frames.written("p", SPOKEN, said, template) == template(said)
    return template.num_asked - 20 * len(texts)  # those of the comparison


def plainly(reply: dict[str, Any]) -> str:
    return f"<r>{reply['content']}</r>"


def test_a_plain_template_is_rendered_no_more_once_it_is_known() -> None:
    texts = [["a"], ['é "quoted" {{x}}\n\n<b>', "b"], ["<r>", "</r>", "\\"]]
    assert num_asked_after_learning(Template(plainly), texts) == 0


@pytest.mark.parametrize(
    "write",
    [
        lambda reply: f"<r>{html.escape(reply['content'])}</r>",
        lambda reply: f"<r>{reply['content']!r}</r>",
        lambda reply: f"<r id={reply['tool_call_id']}>{reply['content']}</r>",
        lambda reply: f"<r>{' '.join(reply['content'].split())}</r>",
        lambda reply: f"<r>{reply['content']} {reply['content']}</r>",
        lambda reply: "<r></r>",
    ],
)
def test_words_that_are_not_written_as_they_are_are_always_rendered(write: Callable[[dict[str, Any]], str]) -> None:
    assert num_asked_after_learning(Template(write), [["a"], ["b", "c"]]) == 40


def test_a_fork_is_always_rendered() -> None:
    assert num_asked_after_learning(Template(plainly, is_fork=True), [["a"]]) == 20


@pytest.mark.parametrize("word", ["", " a", "a\n", f"a {END} b"])
def test_words_that_a_template_may_trim_or_that_end_a_turn_are_rendered(word: str) -> None:
    frames, template = Frames(END), Template(lambda reply: f"<r>{reply['content'].strip() or 'nothing'}</r>")
    for _ in range(20):
        frames.written("p", SPOKEN, replies("plain"), template)
    template.num_asked = 0
    assert frames.written("p", SPOKEN, replies(word), template).text == template(replies(word)).text
    assert template.num_asked == 2


def test_a_kind_that_differs_once_is_rendered_ever_after() -> None:
    frames, template = Frames(END), Template(lambda reply: f"<r>{reply['content'].replace('no', 'yes')}</r>")
    for word in ["a", "b", "no", *"cdefghijklm"]:
        frames.written("p", SPOKEN, replies(word), template)
    assert frames.written("p", SPOKEN, replies("no"), template).text == "\n<r>yes</r>said:"


def test_kinds_are_learnt_apart() -> None:
    """By place, by the name of the call that is answered, by the reply's role and by how many there are."""
    frames, template = Frames(END), Template(plainly)
    for _ in range(20):
        frames.written("p", SPOKEN, replies("a"), template)
    other = {**SPOKEN, "tool_calls": [{"function": {"name": "other"}}]}
    for place, spoken, said in [
        ("q", SPOKEN, replies("a")),
        ("p", other, replies("a")),
        ("p", {**SPOKEN, "content": "x"}, replies("a")),
        ("p", SPOKEN, replies("a", role="user")),
        ("p", SPOKEN, replies("a", name="search")),
        ("p", SPOKEN, replies("a", "b")),
    ]:
        template.num_asked = 0
        frames.written(place, spoken, said, template)
        assert template.num_asked == 2  # the words and the probe


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_a_chat_renders_no_result_of_a_kind_it_knows(template: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its template writes results as they are; what comes out is what a fresh chat renders."""
    used, item, random = a_chat(template), an_item(), Random(3)
    sampled, letters = spell(used, "x"), "ab \"'{}<>&\n\\é中"

    def talk(num_turns: int) -> list[Message]:
        messages: list[Message] = []
        for turn in range(num_turns):
            call = ToolCall(id=f"fc_{turn}", call_id=f"call_{random.random()}", name="search", arguments="{}")
            output = "i" + "".join(random.choices(letters, k=30)) + "."
            messages.append(Message(role="assistant", tool_calls=[call]))
            messages.append(tool_message(ToolResult(call_id=call.call_id, output=output)))
        return messages

    for num_turns in (1, 2, 3, 4) * 8:
        used.continuation(item, talk(num_turns), sampled)
    talks = [talk(num_turns) for num_turns in (1, 2, 3, 4) * 4]
    expected = [a_chat(template).continuation(item, messages, sampled) for messages in talks]
    asked: list[None] = []
    render = Chat._render

    def counted(self: Chat, *args: Any, **options: Any) -> str:
        asked.append(None)
        return render(self, *args, **options)

    monkeypatch.setattr(Chat, "_render", counted)
    assert [used.continuation(item, messages, sampled) for messages in talks] == expected
    is_written_as_json = template is not None and template.startswith("llama")
    assert len(asked) == (len(talks) if is_written_as_json else 0)
