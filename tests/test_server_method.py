"""What a job may ask for: ranges, graders, tools, unknown fields; each refusal with its code and field."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from job_server import GRADER, Api, an_api, reinforcement, row, tuned_by
from openai import BadRequestError, NotFoundError
from openai.types.fine_tuning import ReinforcementHyperparameters, ReinforcementMethod
from openai.types.graders import ScoreModelGrader
from pydantic import ValidationError

from rft.server.jobs.bodies import Hyperparameters

SECTION = "method.reinforcement"
TOOL = {"name": "search", "server_url": "http://127.0.0.1:9/search", "headers": {"Authorization": "Bearer s3cr3t"}}
PYTHON = {"type": "python", "name": "p", "source": "def grade(sample, item):\n    return 1.0\n"}
JUDGE = {
    "type": "score_model",
    "name": "j",
    "model": "far",
    "input": [{"role": "user", "content": "{{ item.answer }}"}],
}
SIMILAR = {"type": "text_similarity", "name": "t", "input": "a", "reference": "b", "evaluation_metric": "bleu"}
LABEL = {**JUDGE, "type": "label_model", "labels": ["a", "b"], "passing_labels": ["a"]}
ENDPOINT = {"type": "endpoint", "name": "e", "url": "http://127.0.0.1:9/grade", "headers": {"X-Key": "s3cr3t"}}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with an_api(tmp_path_factory.mktemp("server")) as found:
        yield found


def multi(**parts: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "m", "graders": parts, "calculate_output": " + ".join(parts) or "1"}


def graded(grader: Any) -> dict[str, Any]:
    return {"method": reinforcement(grader=grader)}


def with_tools(*tools: Any) -> dict[str, Any]:
    return {"method": reinforcement(tools=list(tools))}


ROW_05 = {
    "n_epochs": (0, 51, 1.5, "5", True, -1),
    "batch_size": (0, 257, "big"),
    "compute_multiplier": (11, 0, 0.00001, -1, "x"),
    "learning_rate_multiplier": (0, -1, "x", 1e9),
    "eval_interval": (0, 2.5),
    "eval_samples": (0, -3),
    "reasoning_effort": ("max", "none", 3),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in ROW_05.items() for value in bad])
def test_row_05_hyperparameters_have_ranges(api: Api, name: str, value: Any) -> None:
    with pytest.raises(BadRequestError) as caught:
        api.create(method=tuned_by(**{name: value}))
    assert (caught.value.code, caught.value.param) == ("invalid_hyperparameter", f"{SECTION}.hyperparameters.{name}")


def test_hyperparameters_hold_exactly_in_their_ranges() -> None:
    """Of random numbers those inside are taken as they are, the others refused."""
    random_ = random.Random(0)
    ranges: dict[str, tuple[float, float, bool]] = {
        "n_epochs": (1, 50, True),
        "batch_size": (1, 256, True),
        "eval_interval": (1, 1e6, True),
        "eval_samples": (1, 1e6, True),
        "compute_multiplier": (0.00001, 10, False),
        "learning_rate_multiplier": (0, 1e6, False),
    }
    for name, (lowest, highest, is_whole) in ranges.items():
        for _ in range(300):
            spread = random_.choice([3.0, 60.0, 300.0, 3e6])
            value = random_.randint(-3, int(spread)) if random_.random() < 0.5 else random_.uniform(-1, spread)
            above = value >= lowest if is_whole else value > lowest
            is_inside = above and value <= highest and (not is_whole or value == int(value))
            try:
                taken = getattr(Hyperparameters.model_validate({name: value}), name)
            except ValidationError:
                assert not is_inside, (name, value)
            else:
                assert is_inside and taken == value, (name, value)
    for bad in (float("nan"), float("inf"), -float("inf"), 10**400, [], {}, b"1"):
        with pytest.raises(ValidationError):
            Hyperparameters.model_validate({"eval_samples": bad})
        with pytest.raises(ValidationError):
            Hyperparameters.model_validate({"learning_rate_multiplier": bad})
    assert Hyperparameters.model_validate({"n_epochs": None, "batch_size": "auto"}) == Hyperparameters()


GRADER_ERRORS: list[tuple[Any, str, str]] = [
    ({**GRADER, "operation": "neq"}, "operation", "eq"),
    (multi(a={**GRADER, "operation": "neq"}), "graders.a.operation", "eq"),
    (multi(a=multi(b=GRADER)), "graders", "multi grader inside a multi grader"),
    ({**multi(a=GRADER), "calculate_output": "a + b"}, "calculate_output", "b"),
    ({**multi(), "graders": GRADER["input"]}, "graders", "expected an object"),
    ({**SIMILAR, "evaluation_metric": "cosine"}, "evaluation_metric", "evals only"),
    (multi(a={**SIMILAR, "evaluation_metric": "cosine"}), "graders.a.evaluation_metric", "evals only"),
    ({**SIMILAR, "embedding_model": "/etc"}, "embedding_model", "unknown key"),
    (LABEL, "type", "inside a multi grader"),
    ({"type": "reward_function", "source": "def f(): pass"}, "type", "Unknown grader type"),
    ({"type": "environment"}, "type", "Unknown grader type"),
    (multi(a={"type": "reward_function", "source": "x"}), "graders.a.type", "Unknown grader type"),
    ({"name": "no type"}, "type", "Unknown grader type"),
    ({**PYTHON, "source": "x = 1"}, "source", "0 times"),
    ({**PYTHON, "source": "def grade(sample, item): return 1\n#" + "x" * 256_000}, "source", "256 kB"),
    ({**GRADER, "input": "{{ nothing }}"}, "input", "is not a variable"),
    ({**ENDPOINT, "url": "ftp://host"}, "url", "complete"),
    ({**GRADER, "surprise": 1}, "surprise", "unknown key"),
    ({"type": "model", "model": "far"}, "", "needs one"),
]


@pytest.mark.parametrize(("grader", "path", "words"), GRADER_ERRORS)
def test_a_grader_that_is_wrong_is_named(api: Api, grader: Any, path: str, words: str) -> None:
    with pytest.raises(BadRequestError, match=words) as caught:
        api.create(**graded(grader))
    assert caught.value.code == "invalid_grader"
    assert caught.value.param == ".".join(filter(None, [f"{SECTION}.grader", path]))


HOST = "http://169.254.169.254/latest"
OTHER_ERRORS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"method": {"type": "dpo", "dpo": {}}}, "unsupported_method", "method"),
    ({"method": {"type": "magic"}}, "invalid_value", "method.type"),
    ({"method": {"type": "reinforcement"}}, "invalid_value", "method"),
    ({"method": {"type": "reinforcement", "reinforcement": {}}}, "missing_required_parameter", f"{SECTION}.grader"),
    ({"method": reinforcement() | {"surprise": 1}}, "unknown_parameter", "method.surprise"),
    ({"method": reinforcement(surprise=1)}, "unknown_parameter", f"{SECTION}.surprise"),
    ({"method": tuned_by(etest_samples=1)}, "unknown_parameter", f"{SECTION}.hyperparameters.etest_samples"),
    ({"method": reinforcement(max_episode_steps=0)}, "invalid_value", f"{SECTION}.max_episode_steps"),
    ({"method": reinforcement(response_format={"type": "xml"})}, "invalid_value", f"{SECTION}.response_format.type"),
    ({"method": reinforcement(response_format={"type": "json_schema"})}, "invalid_value", f"{SECTION}.response_format"),
    (with_tools({"name": "x"}), "missing_required_parameter", f"{SECTION}.tools.0.server_url"),
    (with_tools({**TOOL, "name": "a b"}), "invalid_value", f"{SECTION}.tools.0.name"),
    (with_tools(TOOL, TOOL), "invalid_tool", f"{SECTION}.tools.1.name"),
    (with_tools({**TOOL, "headers": {"a": "x\ny"}}), "invalid_tool", f"{SECTION}.tools.0.headers"),
    (with_tools({**TOOL, "parameters": {"type": "array"}}), "invalid_value", f"{SECTION}.tools.0"),
    (with_tools(TOOL, {"name": "x", "server_url": HOST}), "url_not_allowed", f"{SECTION}.tools.1.server_url"),
    (with_tools({**TOOL, "server_url": "/local"}), "invalid_run_config", None),
    (graded({**ENDPOINT, "url": HOST}), "url_not_allowed", f"{SECTION}.grader.url"),
    (graded(multi(a=GRADER, b={**ENDPOINT, "url": HOST})), "url_not_allowed", f"{SECTION}.grader.graders.b.url"),
    (graded({**JUDGE, "model": "gone"}), "model_not_found", f"{SECTION}.grader.model"),
    (graded(multi(a={**LABEL, "model": "gone"})), "model_not_found", f"{SECTION}.grader.graders.a.model"),
    (graded({**JUDGE, "model": "lost"}), "model_not_available", f"{SECTION}.grader.model"),
    ({"hyperparameters": {"n_epochs": 2}}, "invalid_value", None),
    ({"suffix": "x" * 65}, "invalid_value", "suffix"),
    ({"suffix": "a:b"}, "invalid_value", "suffix"),
    ({"seed": -1}, "invalid_value", "seed"),
    ({"seed": 2147483648}, "invalid_value", "seed"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "invalid_value", "metadata"),
    ({"metadata": {"k": "x" * 513}}, "invalid_value", "metadata.k"),
    ({"integrations": [{"type": "wandb", "wandb": {}}]}, "missing_required_parameter", "integrations.0.wandb.project"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}] * 6}, "invalid_value", "integrations"),
    ({"extra_body": {"test_file": "file-1"}}, "unknown_parameter", "test_file"),
    ({"extra_body": {"method": "rft"}}, "invalid_value", None),
    ({"extra_body": {"method": reinforcement(tools=[{**TOOL, "x": "\ud800"}])}}, "invalid_value", None),
    ({"metadata": {"x" * 65: "v"}}, "invalid_value", f"metadata.{'x' * 65}.[key]"),
]


@pytest.mark.parametrize(("body", "code", "param"), OTHER_ERRORS)
def test_what_is_wrong_is_named(api: Api, body: dict[str, Any], code: str, param: str | None) -> None:
    num_before = len(api.client.fine_tuning.jobs.list(limit=1000).data)
    with pytest.raises(BadRequestError) as caught:
        if "\\ud800" in json.dumps(body):
            post(api, {"model": "m", "training_file": "f", **body["extra_body"]})
        api.create(**body)
    assert (caught.value.code, caught.value.param) == (code, param), caught.value.message
    assert "s3cr3t" not in caught.value.message
    assert len(api.client.fine_tuning.jobs.list(limit=1000).data) == num_before


def post(api: Api, body: Any) -> Any:
    """Raw HTTP: what the SDK's methods would not send."""
    return api.client.post("/fine_tuning/jobs", cast_to=object, content=json.dumps(body).encode())


@pytest.mark.parametrize(
    "text",
    ['{"x": NaN}', '{"seed": Infinity}', "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "", "[]", '"x"', "\xff"],
)
def test_a_hostile_body_is_a_400(api: Api, text: str) -> None:
    with pytest.raises(BadRequestError):
        api.client.post("/fine_tuning/jobs", cast_to=object, content=text.encode("latin-1"))


@pytest.mark.parametrize("grader", [GRADER, SIMILAR, PYTHON, JUDGE, ENDPOINT, multi(a=GRADER, b=LABEL, c=ENDPOINT)])
def test_every_type_of_grader_is_taken(api: Api, grader: Any) -> None:
    job = api.wait(api.create(**graded(grader)))
    assert job.status == "queued"
    assert api.config_of(job).grader.type == grader["type"]


def test_row_31_tools_and_no_secret_anywhere_but_in_the_config(api: Api) -> None:
    tool = {**TOOL, "rate_limit": 5, "timeout_s": 30, "region": "eu", "api_key": "s3cr3t"}
    grader = multi(a=GRADER, e=ENDPOINT)
    tools = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
    rows = [row(number, tools=tools) for number in range(12)]
    job = api.wait(api.create(rows, method=reinforcement(grader=grader, tools=[tool], max_episode_steps=5)))
    assert job.status == "queued"
    section = job.method.reinforcement
    shown = {**tool, "headers": {"Authorization": "[redacted]"}, "api_key": "[redacted]"}
    assert section.tools == [shown] and section.max_episode_steps == 5
    assert section.grader.graders["e"]["headers"] == {"X-Key": "[redacted]"}
    config, path = api.config_of(job), api.folder(job) / "job_config.yaml"
    assert config.environment is not None and config.environment.type == "http"
    used = config.environment.tools[0]
    assert used.headers["Authorization"].get_secret_value() == "Bearer s3cr3t"
    assert (used.rate_limit, used.timeout_s, used.extra) == (5, 30, {"region": "eu", "api_key": "s3cr3t"})
    assert (config.rollout.max_episode_steps, config.rollout.max_turns) == (5, 5)
    assert path.stat().st_mode & 0o777 == 0o600
    api.services.index.page("job", limit=1)
    data = api.services.config.data_dir
    holders = [place for place in data.rglob("*") if place.is_file() and b"s3cr3t" in place.read_bytes()]
    assert {place.name for place in holders} == {"job_config.yaml"}


def test_a_tool_may_bring_the_spec_for_rows_without_tools(api: Api) -> None:
    parameters = {"type": "object", "properties": {"q": {"type": "string"}}}
    first = {**TOOL, "parameters": parameters, "description": "finds"}
    second = {**TOOL, "name": "read", "function": {"description": "reads", "parameters": parameters}}
    job = api.wait(api.create(method=reinforcement(tools=[first, second])))
    config = api.config_of(job)
    assert config.environment is not None and config.environment.type == "http"
    specs = [tool.function for tool in config.environment.tools]
    assert specs == [
        {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}
        for name, text in (("search", "finds"), ("read", "reads"))
    ]


def test_the_published_sketch_is_taken_over_raw_http(api: Api) -> None:
    grader = {
        "type": "model",
        "model": "gpt-4o-2024-08-06",
        "prompt": "Ground truth: {answer}\nAgent answer: {final_answer}",
        "response_format": {"type": "json_schema", "json_schema": {"name": "g", "schema": {"type": "object"}}},
    }
    tools = [{"name": "search", "url": "http://127.0.0.1:9/s", "headers": {"Authorization": "Bearer T"}}]
    hyperparameters = {"n_epochs": 3, "batch_size": 16, "compute_multiplier": 1}
    sketch = {"tools": tools, "grader": grader, "hyperparameters": hyperparameters}
    file_id = api.uploads.add([row(number) for number in range(12)])
    body = {"training_file": file_id, "model": "o4-mini-2025-04-16", "method": "rft", "rft": sketch}
    job = api.wait(api.client.fine_tuning.jobs.retrieve(post(api, body)["id"]))
    section = job.method.reinforcement
    assert job.status == "queued" and job.method.type == "reinforcement"
    assert section.tools[0]["server_url"] == "http://127.0.0.1:9/s"
    assert section.grader.type == "score_model"
    assert section.hyperparameters.n_epochs == 3 and section.hyperparameters.batch_size == 16


def test_supervised_is_the_default_as_it_is_at_the_original(api: Api) -> None:
    said = [{"messages": [*row(number)["messages"], {"role": "assistant", "content": "x"}]} for number in range(12)]
    file_id = api.uploads.add(said)
    jobs = api.client.fine_tuning.jobs
    job = api.wait(jobs.create(model="m", training_file=file_id, hyperparameters={"n_epochs": 2}))
    assert job.status == "queued" and job.method.type == "supervised"
    assert job.method.supervised.hyperparameters.n_epochs == 2
    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == 8
    assert job.model_extra["eval_id"] is None
    config = api.config_of(job)
    assert config.warmup is not None
    assert (config.warmup.epochs, config.warmup.batch_size, config.warmup.learning_rate) == (2, 8, 2e-4)
    named = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 0.5}}}
    job = api.wait(jobs.create(model="m", training_file=file_id, method=named))
    half = api.config_of(job).warmup
    assert half is not None and half.learning_rate == 1e-4


def test_the_openapi_document_shows_the_body(api: Api) -> None:
    document: Any = api.client.get("/openapi.json", cast_to=object)
    schemas = document["components"]["schemas"]
    assert schemas["JobBody"]["properties"]["training_file"]["maxLength"] == 128
    epochs = schemas["Hyperparameters"]["properties"]["n_epochs"]
    assert {"type": "integer", "minimum": 1, "maximum": 50} in epochs["anyOf"]


def test_row_03_typed_graders_of_the_sdk(api: Api) -> None:
    grader = ScoreModelGrader(
        name="judge",
        type="score_model",
        model="o4-mini-2025-04-16",
        input=[{"role": "user", "content": "rate"}],
    )
    hyperparameters = ReinforcementHyperparameters(n_epochs=5, batch_size=4, reasoning_effort="medium")
    section = ReinforcementMethod(grader=grader, hyperparameters=hyperparameters)
    job = api.wait(api.create(method={"type": "reinforcement", "reinforcement": section}))
    assert job.status == "queued"
    assert job.method.reinforcement.grader.model == "o4-mini-2025-04-16"
    config = api.config_of(job)
    assert config.judges["o4-mini-2025-04-16"].path is not None
    assert (config.training.items_per_step, config.training.steps) == (4, 15)


JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "auto",
    "x" * 300,
    [],
    [None],
    {},
    {"type": "multi"},
    {"": {}},
    "{{ item }}",
]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(tree: Any, random_: random.Random) -> Any:
    """A copy with one place replaced, removed, or given an unknown neighbour."""
    copy = json.loads(json.dumps(tree))
    *parents, last = random_.choice(list(places(copy)))
    node = copy
    for key in parents:
        node = node[key]
    action = random_.choice(["replace", "replace", "remove", "add"])
    if action == "add" and isinstance(node, dict):
        node["unheard_of"] = random_.choice(JUNK)
    elif action == "remove":
        del node[last]
    else:
        node[last] = random_.choice(JUNK)
    return copy


def test_no_body_is_a_bug(api: Api) -> None:
    """Whatever is wrong with a request, it is the client's mistake, with a message."""
    random_ = random.Random(2)
    parts = multi(a=GRADER, b=SIMILAR, c=PYTHON, d=JUDGE, e=ENDPOINT, f=LABEL)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    section = {"grader": parts, "tools": [{**TOOL, "parameters": {"type": "object"}}], "response_format": form}
    section |= {"max_episode_steps": 3, "hyperparameters": {"n_epochs": 1, "compute_multiplier": 1.5}}
    body = {"model": "m", "training_file": api.uploads.add([row(1)]), "suffix": "s", "metadata": {"k": "v"}}
    body |= {"method": {"type": "reinforcement", "reinforcement": section}}
    body |= {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}], "seed": 1}
    client = api.client.with_options(max_retries=0)
    num_refused = 0
    for _ in range(120):
        try:
            client.post("/fine_tuning/jobs", cast_to=object, body=mutated(body, random_))
        except (BadRequestError, NotFoundError) as error:
            num_refused += 1
            assert error.code and error.message, error
    assert num_refused > 60
