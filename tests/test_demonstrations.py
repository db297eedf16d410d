"""Demonstrations: tokenised as a rollout that says the same, read back as they were written, refused by line."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine
from test_chat import a_chat
from test_rollout import SEARCH, RecordingEnvironment, RecordingGrader
from tiny import tiny_tokenizer

from rft.calls import Dialect, parse_calls, spell_calls
from rft.chat import Chat
from rft.config import RolloutConfig
from rft.data import load_items
from rft.demonstrations import Demonstration, demonstrations_of_run, load_demonstrations
from rft.errors import DataError, UserError
from rft.rollout import Attempt, Workshop, run_rollout
from rft.store import RunStore
from rft.types import Grade, Item, Message, Rollout, StopReason, ToolCall, Turn

FORMATS = [None, "qwen2_5", "qwen3", "llama3_1", "llama3_2", "forking", "mistral"]
FORKING = (  # shows what was thought in the last turn only, so it rewrites what it showed before
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'system' and messages|length > 3 %}[{{ messages|length }}]{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools|tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% if m['tool_calls'] %}[TOOL_CALLS][{% for c in m['tool_calls'] %}{% if not loop.first %}, {% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}{% endfor %}]'
    "{% else %} {{ m['content'] }}{% endif %}<|im_end|>"
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS]{{ m['content'] }}[/TOOL_RESULTS]"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


def chat_of(name: str | None) -> Chat:
    templates = {"forking": FORKING, "mistral": MISTRAL}
    if name not in templates:
        return a_chat(name)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = templates[name]
    return Chat(tokenizer)


def call(query: str, call_id: str = "a") -> dict[str, Any]:
    function = {"name": "search", "arguments": json.dumps({"query": query})}
    return {"id": call_id, "type": "function", "function": function}


def says(content: str | None, *calls: dict[str, Any], **extras: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **extras}


def result(content: str, call_id: str = "a") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Heart attack"}]
EPISODE = [
    says(None, call("infarction")),
    result("I21 »acute«"),
    says(None, call("I21")),
    result("I21.9"),
    says("I21.9"),
]


def a_file(tmp_path: Path, *dialogues: list[dict[str, Any]], **columns: Any) -> Path:
    path = tmp_path / "shown.jsonl"
    rows = [{"messages": dialogue, "tools": [SEARCH], **columns} for dialogue in dialogues]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, chat: Chat | None = None) -> list[Demonstration]:
    return load_demonstrations(path, {"search": SEARCH}, chat or a_chat())


def as_rollout(tmp_path: Path, chat: Chat, turns: list[str], answers: dict[str, str]) -> Rollout:
    """A real rollout of the same row whose model says `turns`."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": PROMPT, "tools": [SEARCH]}) + "\n")
    (item,) = load_items(path, {"search": SEARCH})
    engine = ScriptedEngine(chat, lambda prompt, rollout_id, turn: turns[turn])
    environment = RecordingEnvironment(lambda made: answers[json.loads(made.arguments)["query"]])
    limits = RolloutConfig(max_turns=8, max_tokens_per_turn=512)
    workshop = Workshop(engine, chat, environment, RecordingGrader(), {}, limits, 8192)
    return asyncio.run(run_rollout(Attempt("trace_1", item, "train", 1, 0, 0), workshop))


def said(chat: Chat, demonstration: Demonstration) -> list[str]:
    """The texts under the mask of the last sequence, one per turn, without their ends."""
    last = demonstration.sequences[-1]
    turns: list[list[int]] = []
    for index, (token, is_learnt) in enumerate(zip(last.ids, last.mask, strict=True)):
        if is_learnt and (index == 0 or not last.mask[index - 1]):
            turns.append([])
        if is_learnt:
            turns[-1].append(token)
    assert all(turn[-1] == chat.end_of_turn for turn in turns), "the end of the turn is learnt"
    return [chat.tokenizer.decode(turn[:-1]) for turn in turns]


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_mask_are_those_of_a_rollout_that_says_the_same(tmp_path: Path, name: str | None) -> None:
    chat = chat_of(name)
    (demonstration,) = load(a_file(tmp_path, PROMPT + EPISODE), chat)
    sequences = demonstration.sequences
    if len(sequences) == 1:
        turns = said(chat, demonstration)
    else:  # every turn a sequence of its own
        turns = [said(chat, Demonstration("", "", [sequence]))[-1] for sequence in sequences]
    rollout = as_rollout(tmp_path, chat, turns, {"infarction": "I21 »acute«", "I21": "I21.9"})
    assert rollout.stop_reason is StopReason.ANSWERED
    assert [(s.ids, s.mask) for s in sequences] == [(s.ids, s.mask) for s in rollout.sequences]
    queries = [json.loads(made.arguments)["query"] for made, _ in rollout.tool_calls]
    assert queries == ["infarction", "I21"] and rollout.output_text == "I21.9"
    assert (len(sequences) > 1) == (name == "forking")


MESSAGES = [
    Message(role="assistant", content="I21.9"),
    Message(role="assistant", content=""),
    Message(role="assistant", content='two lines\n"quoted" {"a": 1} ünï → 漢字'),
    *(
        Message(role="assistant", tool_calls=[ToolCall(id="f", call_id="a", name="search", arguments=arguments)])
        for arguments in ("{}", '{"query": "a \\"b\\" \\n c"}', '{"query":"é→漢","k":3,"deep":{"x":[1,2.5,true,null]}}')
    ),
    Message(role="assistant", content="So:", reasoning="First I\nthink."),
    Message(
        role="assistant",
        tool_calls=[ToolCall(id=i, call_id=i, name="search", arguments=json.dumps({"query": i})) for i in ("a", "b")],
    ),
    Message(
        role="assistant",
        content="Let me look.",
        tool_calls=[ToolCall(id="f", call_id="a", name="search", arguments='{"query": "x"}')],
    ),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_what_is_spelled_is_read_back_as_the_same_message(name: str | None, message: Message) -> None:
    chat = chat_of(name)
    item = Item.model_validate({"id": "x", "row": {}, "messages": PROMPT, "tools": [SEARCH]})
    ids = chat.spell(item, [message])
    if name in ("llama3_1", "llama3_2") and message.content and message.tool_calls:
        assert ids is None, "this format cannot say both at once"
        return
    assert ids is not None and ids.count(chat.end_of_turn) == 1
    read = chat.parse(ids, item, "p")
    assert (read.content, read.reasoning.strip()) == (message.content, message.reasoning)
    made = [(c.name, json.loads(c.arguments), c.error) for c in read.tool_calls]
    assert made == [(c.name, json.loads(c.arguments), None) for c in message.tool_calls]


@pytest.mark.parametrize("dialect", ["hermes", "llama3", "mistral"])
def test_calls_in_the_plainest_form_are_parsed_back(dialect: Dialect) -> None:
    item = Item.model_validate({"id": "x", "row": {}, "messages": PROMPT, "tools": [SEARCH]})
    calls = [made for message in MESSAGES for made in message.tool_calls]
    content, read = parse_calls(spell_calls(calls, dialect), dialect, item, "p")
    assert content.strip() == ""
    assert [json.loads(made.arguments) for made in read] == [json.loads(made.arguments) for made in calls]
    assert {made.error for made in read} == {None}


def test_results_come_in_the_order_of_the_calls(tmp_path: Path) -> None:
    chat = a_chat()
    both = says(None, call("x", "1"), call("y", "2"))
    path = a_file(tmp_path, [*PROMPT, both, result("for y", "2"), result("for x", "1"), says("done")])
    text = chat.tokenizer.decode(load(path, chat)[0].sequences[0].ids)
    assert text.index("for x") < text.index("for y")


def test_only_what_follows_the_last_user_message_is_learnt_unless_weights_say_more(tmp_path: Path) -> None:
    chat = a_chat()
    history = [*PROMPT, says("one"), {"role": "user", "content": "and then?"}]
    plain, all_of_it, none_of_the_call = load(
        a_file(
            tmp_path,
            [*history, says("two")],
            [*PROMPT, says("one", weight=1), history[-1], says("two")],
            [*history, says(None, call("x"), weight=0), result("r"), says("two")],
        ),
        chat,
    )
    assert said(chat, plain) == ["two"]
    assert said(chat, all_of_it) == ["one", "two"]
    assert said(chat, none_of_the_call) == ["two"]
    assert all_of_it.sequences[0].ids == plain.sequences[0].ids, "the same text either way"


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        (PROMPT, r":1: messages\[1\]\.role: the last message is from user, not from assistant"),
        ([*PROMPT, says(None, call("x")), result("y")], "the last message is from tool, not from assistant"),
        ([*PROMPT, says(None, call("x")), says("y")], r":1: messages\[3\]: the call a has no result"),
        ([*PROMPT, says("x"), says("y")], "speaks twice in a row"),
        ([*PROMPT, says("x"), result("y"), says("z")], r"messages\[3\]\.tool_call_id: is not the id of a call"),
        ([*PROMPT, says(None, call("x"), call("y")), result("r"), says("z")], "two calls have one id"),
        ([PROMPT[0], says("x")], "the model speaks first"),
        ([*PROMPT, says("x", weight=0)], "no assistant message is learnt from"),
        ([*PROMPT, says("x", weight=2)], r"messages\[2\]\.weight: must be 0 or 1"),
        ([*PROMPT, says("x", reasoning_content=1)], r"messages\[2\]\.reasoning_content: must be a string"),
        ([*PROMPT, says("see <tool_call>{}</tool_call>")], "would not be read back as it is written"),
        ([*PROMPT, says("stop<|im_end|>here")], "would not be read back as it is written"),
        ("nothing", "must be a non-empty list|is missing"),
    ],
)
def test_a_bad_dialogue_is_refused_by_line_and_field(tmp_path: Path, dialogue: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(a_file(tmp_path, dialogue))
    assert "cure:" in str(caught.value) and "shown.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("find", "{}", r'function\.name: there is no tool "find"; the tools are: search'),
        ("search", "[1]", r"tool_calls\[0\]\.function\.arguments: is not a JSON object"),
        ("search", "{", r"tool_calls\[0\]\.function\.arguments: is not a JSON object"),
        ("search", {"query": "x"}, "is not a list of tool calls"),
    ],
)
def test_a_bad_call_is_refused_by_line_and_field(tmp_path: Path, name: str, arguments: Any, message: str) -> None:
    made = {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}
    good = [*PROMPT, says("fine")]
    with pytest.raises(DataError, match=message) as caught:
        load(a_file(tmp_path, good, [*PROMPT, says(None, made)]))
    assert "shown.jsonl:2" in str(caught.value)


def test_several_problems_come_at_once_and_an_empty_file_is_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 problems(.|\n)*shown\.jsonl:1(.|\n)*shown\.jsonl:2"):
        load(a_file(tmp_path, PROMPT, PROMPT))
    (tmp_path / "shown.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the file has no rows"):
        load(tmp_path / "shown.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "nowhere.jsonl")


def test_one_call_at_a_time_where_the_row_says_so(tmp_path: Path) -> None:
    dialogue = [*PROMPT, says(None, call("x", "1"), call("y", "2"))]
    with pytest.raises(DataError, match="only one call per turn is allowed"):
        load(a_file(tmp_path, dialogue, parallel_tool_calls=False))


def test_a_tool_that_is_not_served_is_refused_as_in_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="search has no endpoint"):
        load_demonstrations(a_file(tmp_path, [*PROMPT, says("x")]), {}, a_chat())


# --- from a run ---


def stored(index: int, score: float | None, ids: list[int], **fields: Any) -> Rollout:
    message = Message(role="assistant", content="x")
    logprobs = [-0.5] * len(ids)
    turn = Turn(
        input_ids=[1, 2, 3], output_ids=ids, logprobs=logprobs, finish_reason="stop", policy_version=0, message=message
    )
    facts: dict[str, Any] = {"split": "train", "step": 1, "seed": 0, "started_at": 0.0, "duration_s": 1.0}
    facts |= {"stop_reason": StopReason.ANSWERED if score is not None else StopReason.TOOL_FAILED}
    grade = Grade(score=score) if score is not None else None
    return Rollout(id=f"trace_{index}", item_id=f"i{index}", attempt=index, turns=[turn], grade=grade, **facts | fields)


def a_run(tmp_path: Path, model: Path) -> RunStore:
    store = RunStore.create(tmp_path / "runs", "sampled", {"model": {"path": str(model)}})
    with store:
        store.append_rollout(stored(0, 1.0, [7, 8]))
        store.append_rollout(stored(1, 0.4, [7, 9]))
        store.append_rollout(stored(2, 0.5, [7, 10]))
        store.append_rollout(stored(3, 1.0, [7, 8]))  # says what the first one says
        store.append_rollout(stored(4, None, [7, 11]))
        store.append_rollout(stored(5, 1.0, [7, 12], split="validation"))
    return store


def test_the_good_rollouts_of_a_run_are_taken_as_they_were_sampled(tmp_path: Path, tiny_model: Path) -> None:
    found = demonstrations_of_run(a_run(tmp_path, tiny_model), 0.5, Chat.from_folder(tiny_model))
    assert [demonstration.where for demonstration in found] == ["trace_0", "trace_2"]
    assert [demonstration.sequences[0].ids for demonstration in found] == [[1, 2, 3, 7, 8], [1, 2, 3, 7, 10]]
    assert found[0].sequences[0].mask == [False, False, False, True, True]


def test_a_run_without_good_rollouts_says_how_good_its_best_is(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"no training rollout has a grade of 2; the best is 1"):
        demonstrations_of_run(a_run(tmp_path, tiny_model), 2.0, Chat.from_folder(tiny_model))


def test_a_run_of_another_tokenizer_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="sampled with another tokenizer"):
        demonstrations_of_run(a_run(tmp_path, tiny_model), 0.5, a_chat("llama3_1"))


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    from tiny import tiny_model_folder

    return tiny_model_folder(tmp_path / "model")
