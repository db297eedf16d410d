"""RunConfig: everything that decides a run, from one YAML file plus `key=value` overrides.

Importing this module loads no torch. Unknown keys, wrong types and values out of range are errors that name the
field; the resolved config is written into the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from rft.envs import EnvironmentConfig
from rft.errors import ConfigError
from rft.graders import GraderSpec, judge_models
from rft.graders.base import spec_path
from rft.graders.judge import JudgeConfig
from rft.tracking import TrackerConfig

_AUTO_IMPORTANCE_CAP = 2.0
_TAGS = ("vllm", "transformers", "http", "mcp")  # of the unions below
_GRADER_ATTEMPTS = 8  # twice rft.wire's, since pauses come between them


class Config(BaseModel):
    """A section of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(Config):
    """Low-rank adapters on the policy; `targets` is peft's `target_modules`."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: Literal["all-linear"] | list[str] = "all-linear"


class ModelConfig(Config):
    """The policy: any folder that `AutoModelForCausalLM.from_pretrained` accepts."""

    path: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lora: LoraConfig | None = Field(LoraConfig(), description="null: the whole model is trained")
    freeze: list[str] = Field(
        default_factory=list, description="lora: null; modules or parameters left as they are, e.g. model.layers.0.*"
    )
    master_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="lora: null; what the optimizer steps; null: float32; bfloat16 saves memory, loses updates"
    )
    init_from: Path | None = Field(None, description="a run folder whose newest weights this run starts from")
    reference: Path | None = Field(
        None, description="the model of training.kl_coef; null: this one, as it was before any training"
    )

    @model_validator(mode="after")
    def _of_full_training(self) -> ModelConfig:
        if self.lora is not None and self.freeze:
            raise ValueError("freeze is for lora: null; with adapters choose lora.targets instead")
        if self.lora is not None and self.master_dtype is not None:
            raise ValueError("master_dtype is for lora: null; adapters are always trained in float32")
        if self.dtype == "float32" and self.master_dtype == "bfloat16":
            raise ValueError("master_dtype bfloat16 below a model in float32 would lose what it computes; leave it out")
        return self


class VllmEngineConfig(Config):
    """A vLLM server: given by `url`, or launched by the run as a child process when `url` is null."""

    type: Literal["vllm"] = "vllm"
    url: str | Annotated[list[str], Field(min_length=1)] | None = None  # several share the rollouts
    max_model_len: int = Field(2048, ge=16)
    max_concurrent: int = Field(64, ge=1, description="sequences a server samples at once")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache on CPU, GiB; a GPU uses gpu_memory_share")
    gpu_memory_share: float = Field(0.45, gt=0, le=1)
    start_timeout_s: float = Field(300.0, gt=0)
    request_timeout_s: float = Field(300.0, gt=0)
    args: list[str] = Field(default_factory=list, description="further flags of the server, passed on unchanged")


class TransformersEngineConfig(Config):
    """In-process sampling with transformers: deterministic, slow, needs no vLLM."""

    type: Literal["transformers"] = "transformers"
    max_model_len: int = Field(2048, ge=16)
    max_concurrent: int = Field(64, ge=1, description="sequences sampled as one batch")
    dtype: Literal["bfloat16", "float32"] | None = None  # null: the policy's


EngineConfig = Annotated[VllmEngineConfig | TransformersEngineConfig, Field(discriminator="type")]


class DataConfig(Config):
    """JSONL files of dataset rows. Validation and test are optional; without them nothing is evaluated."""

    train: Path
    validation: Path | None = None
    test: Path | None = None


class ResponseFormat(Config):
    """The form of answers, as chat completions name it. Sampling stays free: an answer that is no JSON is flagged."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None  # name, schema, and perhaps strict and description

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        given = self.json_schema
        if (given is None) == (self.type == "json_schema"):
            raise ValueError("json_schema goes with type json_schema: {name, schema}")
        if given is None:
            return self
        if unknown := sorted(given.keys() - {"name", "schema", "strict", "description"}):
            raise ValueError(f"json_schema.{unknown[0]}: unknown key")
        if not isinstance(given.get("name"), str) or not isinstance(given.get("schema"), dict):
            raise ValueError("json_schema needs a name, and a schema that is a JSON schema")
        return self


class RolloutConfig(Config):
    """The limits of one rollout. A limit ends it with its stop reason; what it said until then is graded."""

    max_turns: int = Field(8, ge=1, description="sampled messages")
    max_episode_steps: int | None = Field(None, ge=1, description="sampled messages and tool calls together")
    max_tokens_per_turn: int = Field(512, ge=1)
    max_tokens_per_rollout: int | None = Field(None, ge=1, description="sampled ones, over all turns")
    last_turn_message: str = Field("", description="added to the tools' answers before the last turn that is allowed")
    truncated_grade: float | None = Field(
        None, allow_inf_nan=False, description="of a rollout that met a limit; null: what the grader says of it"
    )
    response_format: ResponseFormat | None = Field(
        None, description="of the last message; one that is not JSON gets the flag sample_parse_error, nothing else"
    )
    time_limit_s: float = Field(600.0, gt=0)
    temperature: float = Field(0.8, gt=0, le=2)
    max_concurrent: int = Field(
        512, ge=1, description="rollouts in flight at most; how many there are follows the engine's queue"
    )
    stall_limit_s: float | None = Field(
        None,
        gt=0,
        description="without the end of any wait of any rollout; then the run stops and says who waits"
        " for what; null: see RunConfig.stall_limit_s",
    )
    max_discarded_share: float = Field(
        0.5, ge=0, le=1, description="of a step's rollouts; beyond it the run stops and names the cause"
    )
    max_failed_grade_share: float = Field(
        0.5, ge=0, le=1, description="of a step's grades: the grader's code raised, its judge answered no number"
    )

    @property
    def max_sampled_tokens(self) -> int:
        """The tokens one rollout may sample."""
        return self.max_tokens_per_rollout or self.max_turns * self.max_tokens_per_turn


class CostsConfig(Config):
    """What the most expensive rollout of a group loses of its grade; the cheapest loses nothing."""

    tool_calls: float = Field(0.0, ge=0)
    sampled_tokens: float = Field(0.0, ge=0)
    reasoning_tokens: float = Field(0.0, ge=0)
    seconds: float = Field(0.0, ge=0, description="wall-clock, of the whole rollout")
    above: float = Field(0.0, allow_inf_nan=False, description="costs count among rollouts with a grade above this")


class TrainingConfig(Config):
    """GRPO. Rollouts per item = max(2, round(base_rollouts x compute_multiplier))."""

    steps: int = Field(..., ge=0)
    items_per_step: int = Field(8, ge=1)
    base_rollouts: int = Field(8, ge=2)
    compute_multiplier: float = Field(1.0, gt=0.00001, le=10)
    allocation: Literal["uniform", "adaptive"] = "uniform"  # adaptive: the same rollouts, where grades vary
    first_rollouts: int = Field(4, ge=2, description="adaptive: what an item gets before its grades are looked at")
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    max_ratio: float | None = Field(None, gt=1, description="a second clip, where the advantage is negative")
    cispo_max_ratio: float = Field(5.0, gt=0, description="cispo: what a token's ratio is cut to")
    importance_cap: float | Literal["auto"] | None = Field(
        "auto",
        description="the ratio to the sampling policy, cut to this, weighs the tokens instead of being clipped;"
        " null: it is clipped; auto: null without staleness, else 2",
    )
    staleness: int = Field(
        0, ge=0, le=64, description="how many optimizer steps the weights that sampled may be behind"
    )
    entropy_coef: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="loss -= entropy_coef x mean entropy of the sampled tokens"
    )
    kl_coef: float = Field(0.0, ge=0, description="of the KL to the model without its adapter; costs a forward pass")
    advantage_scale: Literal["none", "group"] = "none"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    costs: CostsConfig = CostsConfig()
    batch: Literal["auto", "packed", "plain"] = "auto"
    max_tokens_per_micro_batch: int = Field(4096, ge=16)
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="the 8-bit ones need the package bitsandbytes"
    )
    sync: Literal["auto", "adapter", "merged", "reload", "transfer"] = Field(
        "auto",
        description="how new weights reach the engine; for model.lora: null reload (from disk), or transfer (from GPU"
        " memory to one vLLM server: CUDA IPC to a launched one, NCCL to engine.url)",
    )
    max_logprob_gap: float = Field(
        0.2, gt=0, description="mean |engine - trainer| log-probability; beyond it the run stops"
    )
    checkpoint_every: int = Field(1, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones")
    keep_best: int = Field(1, ge=0, description="beside them, those with the best validation grades")

    @property
    def effective_importance_cap(self) -> float | None:
        """What `importance_cap` comes to: null where the ratio is clipped, and for cispo, which cuts it itself."""
        if self.importance_cap == "auto":
            return _AUTO_IMPORTANCE_CAP if self.staleness > 0 and self.loss != "cispo" else None
        return self.importance_cap

    @field_validator("importance_cap", mode="before")
    @classmethod
    def _is_a_cap(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or value == "auto" or (is_number and 1 <= value < math.inf):
            return value
        raise ValueError("input should be a number of at least 1, null or auto")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> TrainingConfig:
        """Refuses what is set and would be ignored. A value that equals its default, as in a dump, is not set."""
        for name, reason in self._ignored():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {reason}")
        return self

    def _ignored(self) -> Iterator[tuple[str, str]]:
        clips = ("clip_low", "clip_high", "max_ratio")
        if self.loss == "cispo":
            yield from ((name, "has no effect with loss: cispo; remove it, or choose another loss") for name in clips)
            if self.importance_cap not in (None, "auto"):
                yield (
                    "importance_cap",
                    "is not for loss: cispo, which cuts the ratio itself; set cispo_max_ratio instead",
                )
            return
        yield "cispo_max_ratio", f"has no effect with loss: {self.loss}; remove it, or set loss: cispo"
        cap = self.effective_importance_cap
        if cap is not None:
            reason = f"has no effect where the ratio is a weight (importance_cap comes to {cap:g})"
            yield from ((name, f"{reason}; remove it, or set importance_cap: null") for name in clips)


class EvaluationConfig(Config):
    """Validation runs at step 0 and every `every` steps, the test split before step 1 and after the last."""

    every: int = Field(10, ge=1)
    validation_items: int | None = Field(None, ge=1)  # null: all
    test_items: int | None = Field(None, ge=1)
    rollouts_per_item: int = Field(1, ge=1)


class WarmupConfig(Config):
    """`rft warmup`: supervised training on demonstrations, from a file or from the graded rollouts of a run."""

    demonstrations: Path | None = None  # JSONL: rows whose messages go on with what the model is to say
    from_run: Path | None = None  # a run folder: its training rollouts with a grade of at least min_grade
    min_grade: float | None = Field(None, allow_inf_nan=False)
    epochs: int = Field(3, ge=1)
    learning_rate: float | None = Field(None, gt=0, description="null: 2e-4 with adapters, 2e-5 for all weights")
    batch_size: int = Field(8, ge=1, description="sequences per optimizer step")
    max_length: int | None = Field(
        None, ge=16, description="tokens; longer demonstrations are left out and counted; null: engine.max_model_len"
    )
    held_out_share: float = Field(
        0.0, ge=0, le=0.5, description="of the demonstrations; measured every epoch, and the best epoch is kept"
    )

    @model_validator(mode="after")
    def _one_source(self) -> WarmupConfig:
        if (self.demonstrations is None) == (self.from_run is None):
            raise ValueError("name one source: demonstrations, or from_run with min_grade")
        if (self.from_run is None) != (self.min_grade is None):
            raise ValueError("min_grade goes with from_run: the least grade a rollout is learnt from")
        return self


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


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b.c=value` overrides (values are YAML), validate.

    Raises ConfigError naming the file, the field and the cure.
    """
    return validate_config(read_tree(path, overrides, example="configs/quickstart.yaml"), where=str(path))


def read_tree(path: Path, overrides: list[str] | None, *, example: str) -> dict[str, Any]:
    """A YAML file with its overrides, not yet validated. Raises ConfigError; `example` is a file to start from."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path), cure="check the path of the config") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot be read as YAML: {error}", where=str(path), cure="fix the file") from None
    if not isinstance(tree, dict):
        raise ConfigError("must be a mapping of sections", where=str(path), cure=f"start from {example}")
    for override in overrides or []:
        _apply(tree, override)
    return tree


def validate_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Validate a config given as a plain tree; `where` names its source in errors."""
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(
            config_problem(error),
            where=where,
            cure="compare with configs/quickstart.yaml; rft/config.py lists every key",
        ) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError("an override has the form key=value", where=override, cure="e.g. training.steps=2")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{parent} is a value, not a section", where=override, cure="check the key")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value is not YAML: {error}", where=override, cure="quote the value") from None


def config_problem(error: ValidationError, tags: Collection[str] = _TAGS) -> str:
    """What is wrong, by the path of each field. `tags`: what pydantic adds to a path and nobody wrote."""
    lines = []
    for problem in error.errors(include_url=False):
        # pydantic puts the discriminator's tag into the path (engine.vllm.url): the user wrote engine.url
        path = ".".join(part for part in spec_path(problem["loc"]) if part not in tags)
        lines.append(f"{path or 'config'}: {_sentence(problem['type'], problem['msg'])}")
    return "; ".join(lines)


def _sentence(kind: str, text: str) -> str:
    text = text.removeprefix("Value error, ")
    return "unknown key" if kind == "extra_forbidden" else text[0].lower() + text[1:]
