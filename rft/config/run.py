"""RunConfig: the whole configuration, and what has to fit between its sections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rft.config.model import EngineConfig, ModelConfig, VllmEngineConfig
from rft.config.rollout import RolloutConfig
from rft.config.section import Config
from rft.config.training import EvaluationConfig, TrainingConfig, WarmupConfig
from rft.envs import EnvironmentConfig
from rft.graders import GraderSpec, judge_models
from rft.graders.judge import JudgeConfig
from rft.tracking import TrackerConfig

_GRADER_ATTEMPTS = 8  # twice rft.wire's, since pauses come between them


class DataConfig(Config):
    """JSONL files of dataset rows. Validation and test are optional; without them nothing is evaluated."""

    train: Path
    validation: Path | None = None
    test: Path | None = None


class RunConfig(Config):
    """One training run, complete."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(0, ge=0, le=2147483647)
    runs_dir: Path = Path("runs")
    model: ModelConfig
    engine: EngineConfig = VllmEngineConfig()
    data: DataConfig
    environment: EnvironmentConfig | None = None  # null: no tools
    grader: GraderSpec
    shadow_graders: dict[str, GraderSpec] = Field(default_factory=dict)
    judges: dict[str, JudgeConfig] = Field(default_factory=dict)  # by the model name that graders use
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    warmup: WarmupConfig | None = None  # for `rft warmup` alone
    trackers: list[TrackerConfig] = Field(default_factory=list)  # besides the run folder

    @model_validator(mode="after")
    def _judges_exist(self) -> RunConfig:
        graders = {"grader": self.grader, **{f"shadow_graders.{k}": v for k, v in self.shadow_graders.items()}}
        for path, spec in graders.items():
            for model in judge_models(spec):
                if model not in self.judges:
                    raise ValueError(
                        f"{path} asks the model {model}, and judges has no {model}; add judges: "
                        f"{{{model}: {{url: https://host/v1}}}}, or {{{model}: {{path: a model folder}}}}"
                    )
        return self

    @property
    def rollouts_per_item(self) -> int:
        """What the compute multiplier buys: `max(2, round(base_rollouts x compute_multiplier))`."""
        return max(2, round(self.training.base_rollouts * self.training.compute_multiplier))

    @property
    def stall_limit_s(self) -> float:
        """Seconds without any progress that end the run. By default more than any wait that is allowed.

        Inside a rollout nothing takes longer than `time_limit_s`; its graders come after that, each with a few
        attempts within a timeout of its own. On top comes an hour.
        """
        if self.rollout.stall_limit_s is not None:
            return self.rollout.stall_limit_s
        graders = [self.grader, *self.shadow_graders.values(), *self.judges.values()]
        longest_s = max(timeout_s for grader in graders for timeout_s in _timeouts(grader.model_dump()))
        return 3600.0 + self.rollout.time_limit_s + _GRADER_ATTEMPTS * longest_s

    @model_validator(mode="after")
    def _first_round_fits(self) -> RunConfig:
        first, size = self.training.first_rollouts, self.rollouts_per_item
        if self.training.allocation == "adaptive" and first > size:
            raise ValueError(f"training.first_rollouts is {first}, more than the {size} rollouts an item gets")
        return self

    @model_validator(mode="after")
    def _sync_fits(self) -> RunConfig:
        sync, is_full = self.training.sync, self.model.lora is None
        if is_full and sync in ("adapter", "merged"):
            raise ValueError(
                f"training.sync is {sync}, but model.lora is null: there is no adapter; use reload or auto"
            )
        if not is_full and sync in ("reload", "transfer"):
            raise ValueError(f"training.sync is {sync}, which is for model.lora: null; use adapter, merged or auto")
        if sync == "transfer" and not isinstance(self.engine, VllmEngineConfig):
            raise ValueError(f"training.sync is transfer, but engine.type is {self.engine.type}; use reload or auto")
        if sync == "transfer" and isinstance(urls := getattr(self.engine, "url", None), list) and len(urls) > 1:
            raise ValueError("training.sync is transfer, which serves one engine.url, not several; use reload or auto")
        if sync == "transfer" and getattr(self.engine, "num_servers", 1) > 1:
            raise ValueError("training.sync is transfer, which serves one server, not several; use reload or auto")
        return self

    @model_validator(mode="after")
    def _sleep_fits(self) -> RunConfig:
        if self.training.staleness and getattr(self.engine, "sleep", False):
            raise ValueError("engine.sleep gives the GPUs to sampling and training in turn; set training.staleness=0")
        return self

    @model_validator(mode="after")
    def _reference_is_used(self) -> RunConfig:
        if self.model.reference is not None and not self.training.kl_coef:
            raise ValueError("model.reference is only used by training.kl_coef, which is 0; set it, or leave this out")
        return self

    @model_validator(mode="after")
    def _turn_fits_engine(self) -> RunConfig:
        if self.rollout.max_tokens_per_turn >= self.engine.max_model_len:
            raise ValueError("rollout.max_tokens_per_turn must be below engine.max_model_len")
        return self


def _timeouts(tree: Any) -> Iterator[float]:
    """Every `timeout_s` inside, and 0."""
    yield 0.0
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in entries:
        if key == "timeout_s":
            yield float(value)
        else:
            yield from _timeouts(value)
