"""Judges given by a folder: real vLLM servers, forced answers, weights that never move with the policy's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from test_config import MINIMAL

from rft.config import RunConfig, validate_config
from rft.engines.judge import place_in_engine, start_judge
from rft.engines.vllm import VllmEngine
from rft.graders import GraderTools, build_grader
from rft.graders.judge import JudgeConfig, Judges, SamplingParams
from rft.graders.run import validate
from rft.graders.sample import sample_of_text
from rft.types import Grade, Item

MODEL = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"
SCORE = {
    **{"type": "score_model", "model": "local", "range": [0, 10]},
    "input": [{"role": "user", "content": "Rate this answer from 0 to 10: {{ sample.output_text }}"}],
    "sampling_params": {"temperature": 0.0, "seed": 3, "max_completions_tokens": 1000},
}
LABEL = {
    **{"type": "label_model", "model": "local", "labels": ["good", "bad"], "passing_labels": ["good"]},
    "input": [{"role": "user", "content": "Is this answer good or bad? {{ sample.output_text }}"}],
    "sampling_params": {"temperature": 0.0, "max_completions_tokens": 1000},
}


def a_config(**sections: Any) -> RunConfig:
    model = {"path": str(MODEL), "dtype": "float32"}
    tree = MINIMAL | {"model": model, "engine": {"type": "vllm", "max_model_len": 512}}
    tree |= {"rollout": {"max_tokens_per_turn": 64}} | sections
    return validate_config(tree, where="test")


class Launched(VllmEngine):
    """An engine that looks launched, for the rule of which weights it holds."""

    @property
    def socket(self) -> Path | None:
        return Path("/s")


@pytest.mark.parametrize(
    ("sync", "judge", "is_shared"),
    [
        ("adapter", {}, True),  # the base model stays beside the adapters
        ("merged", {}, False),  # the engine's weights become the policy's
        ("adapter", {"dtype": "bfloat16"}, False),
        ("adapter", {"max_model_len": 4096}, False),
    ],
)
def test_the_engine_is_a_judge_only_where_it_keeps_the_base(sync: str, judge: dict[str, Any], is_shared: bool) -> None:
    config = a_config(training={"steps": 1, "sync": sync})
    assert config.engine.type == "vllm"
    engine = Launched(config.engine, config.model, Path("log"))
    settings = JudgeConfig.model_validate({"path": MODEL, "dtype": "float32", "max_model_len": 512} | judge)
    assert (place_in_engine(config, settings, engine) is not None) == is_shared


def with_judge(folder: Path, story: Callable[[Judges], Awaitable[Any]]) -> Any:
    async def tell() -> Any:
        judges = Judges({"local": JudgeConfig(path=MODEL, max_model_len=2048, kv_cache_gib=0.25, max_concurrent=4)})
        lines: list[str] = []
        server = await start_judge(judges["local"], folder / "judge.log", lines.append)
        try:
            assert any(line.startswith("starting vLLM") for line in lines), "the start says what it waits for"
            return await story(judges)
        finally:
            await judges.close()
            await server.close()
            assert not server.is_alive

    return asyncio.run(tell())


@pytest.mark.slow
def test_a_local_judge_gives_grades(tmp_path: Path) -> None:
    async def story(judges: Judges) -> list[Grade]:
        await judges["local"].check()
        item, sample = Item(id="1", row={}, messages=[]), sample_of_text("The capital of France is Paris.")
        graders = [build_grader(validate({"type": "multi", "graders": {"a": spec}, "calculate_output": "a"}),
                                GraderTools(judges)) for spec in (SCORE, LABEL)]  # fmt: skip
        return [await grader.grade(item, sample, "trace_1") for grader in graders for _ in range(2)]

    score, score_again, label, label_again = with_judge(tmp_path, story)
    for grade in (score, label):
        assert not grade.all_errors, grade
        used = grade.all_usage["local"]
        assert used.prompt_tokens > 10
        assert used.completion_tokens > 5
    assert 0.0 <= score.score <= 10.0
    assert label.score in (0.0, 1.0)
    assert (score.score, label.score) == (score_again.score, label_again.score)


@pytest.mark.slow
def test_the_judge_beside_adapters_does_not_move(tmp_path: Path) -> None:
    """One server, the policy's adapter loaded and used: the judge's words stay the base model's."""
    from test_engines import adapter

    from rft.engines import PublishedWeights
    from rft.engines import SamplingParams as Sampling

    config = a_config(training={"steps": 1, "sync": "adapter"})
    assert config.engine.type == "vllm"

    async def story() -> tuple[Any, Any, list[int], list[int]]:
        engine = VllmEngine(config.engine, config.model, tmp_path / "engine.log", max_lora_rank=8)
        judges = Judges({"local": JudgeConfig(path=MODEL, dtype="float32", max_model_len=512)})
        judge, params = judges["local"], SamplingParams(temperature=0.0, max_completions_tokens=60)
        schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
        question = [{"role": "user", "content": "What is the capital of France?"}]
        sampling = Sampling(max_tokens=8, temperature=1e-6, seed=0, stop_token_ids=())
        try:
            await engine.start()
            judge.place = place_in_engine(config, judge.config, engine)
            before = await judge.ask(question, schema, params)
            policy_before = (await engine.generate([1, 2, 3, 4], sampling, "r")).ids
            await engine.load(PublishedWeights(1, adapter(MODEL, tmp_path / "adapter", 1)[0], "adapter"))
            policy_after = (await engine.generate([1, 2, 3, 4], sampling, "r")).ids
            after = await judge.ask(question, schema, params)
        finally:
            await judges.close()
            await engine.close()
        return before, after, policy_before, policy_after

    before, after, policy_before, policy_after = asyncio.run(story())
    assert policy_before != policy_after, "the adapter changes what the policy says"
    assert (before.answer, before.errors) == (after.answer, after.errors)
    assert before.usage.completion_tokens == after.usage.completion_tokens
