"""The configuration refuses what it does not know and says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rft.config import RunConfig, TrainingConfig, load_config, validate_config
from rft.config.reading import read_tree
from rft.errors import ConfigError

_FOLDER = Path(__file__).parent.parent / "configs"
_OTHERS = ("server", "seed_cookbook", "case_studies")
CONFIGS = [path for path in sorted(_FOLDER.glob("*.yaml")) if path.stem not in _OTHERS]
MINIMAL = {
    "model": {"path": "m"},
    "engine": {"type": "vllm"},
    "data": {"train": "t.jsonl"},
    "grader": {"type": "string_check", "name": "g", "input": "a", "reference": "b", "operation": "eq"},
    "training": {"steps": 3},
}


def written(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL), ["training.steps=7", "engine.type=transformers", "seed=3"])
    assert (config.training.steps, config.engine.type, config.seed) == (7, "transformers", 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=2", "training.stepz: unknown key"),
        ("training.steps=many", "training.steps: input should be a valid integer"),
        ("training.steps=-1", "training.steps: input should be greater than or equal to 0"),
        ("training.compute_multiplier=11", "training.compute_multiplier"),
        ("engine.type=tgi", "engine"),
        ("engine.max_model_len=20", "rollout.max_tokens_per_turn must be below"),
        ("steps", "an override has the form key=value"),
        ("seed.x=1", "seed is a value, not a section"),
        ("name=../x", "name"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, message: str) -> None:
    tree = MINIMAL | {"seed": 1}
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, tree), [override])
    assert message in str(caught.value)
    assert "cure" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cispo_max_ratio": 3.0}, "cispo_max_ratio has no effect with loss: dapo; remove it, or set loss: cispo"),
        ({"loss": "gspo", "cispo_max_ratio": 3.0}, "cispo_max_ratio has no effect with loss: gspo"),
        ({"loss": "cispo", "clip_low": 0.1}, "clip_low has no effect with loss: cispo; remove it"),
        ({"loss": "cispo", "clip_high": 0.1}, "clip_high has no effect with loss: cispo; remove it"),
        ({"loss": "cispo", "max_ratio": 4.0}, "max_ratio has no effect with loss: cispo; remove it"),
        (
            {"loss": "cispo", "importance_cap": 2.0},
            "importance_cap is not for loss: cispo, which cuts the ratio itself",
        ),
        ({"importance_cap": 3, "max_ratio": 4.0}, "max_ratio has no effect where the ratio is a weight"),
        ({"importance_cap": 3, "clip_low": 0.1}, "clip_low has no effect where the ratio is a weight"),
        ({"staleness": 1, "clip_high": 0.4}, "(importance_cap comes to 2); remove it, or set importance_cap: null"),
        ({"importance_cap": "often"}, "training.importance_cap: input should be a number of at least 1, null or auto"),
        ({"importance_cap": 0.5}, "training.importance_cap: input should be a number of at least 1, null or auto"),
        ({"staleness": 65}, "training.staleness: input should be less than or equal to 64"),
        ({"entropy_coef": -0.1}, "training.entropy_coef: input should be greater than or equal to 0"),
    ],
)
def test_options_that_a_loss_would_ignore_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(MINIMAL | {"training": {"steps": 3, **options}}, "run.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "cap"),
    [
        ({}, None),
        ({"staleness": 1}, 2.0),
        ({"staleness": 1, "loss": "cispo", "cispo_max_ratio": 3.0}, None),
        ({"staleness": 1, "importance_cap": None, "clip_low": 0.1, "max_ratio": 4.0}, None),
        ({"importance_cap": 3}, 3.0),
        ({"loss": "gspo", "staleness": 4, "importance_cap": 1.5}, 1.5),
    ],
)
def test_importance_cap_and_its_dump(options: dict[str, object], cap: float | None) -> None:
    """A dump names every key, those without effect too: it is a valid config and the same one."""
    training = TrainingConfig.model_validate({"steps": 3, **options})
    assert training.effective_importance_cap == cap
    assert TrainingConfig.model_validate(training.model_dump(mode="json")) == training


def test_a_missing_file_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(broken)


def test_the_compute_multiplier_buys_rollouts(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    sizes = [
        load_config(path, [f"training.compute_multiplier={value}"]).rollouts_per_item for value in (0.01, 0.5, 1, 2.3)
    ]
    assert sizes == [2, 4, 8, 18]


JUDGED = {"type": "score_model", "model": "gpt-4o", "input": [{"role": "user", "content": "{{ sample.output_text }}"}]}


def test_a_judge_must_be_configured(tmp_path: Path) -> None:
    tree = MINIMAL | {"grader": {"type": "multi", "graders": {"a": JUDGED}, "calculate_output": "a"}}
    with pytest.raises(ConfigError, match=r"grader asks the model gpt-4o, and judges has no gpt-4o"):
        load_config(written(tmp_path, tree))
    config = load_config(written(tmp_path, tree | {"judges": {"gpt-4o": {"url": "http://127.0.0.1:8000/v1"}}}))
    assert config.judges["gpt-4o"].url == "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("grader", "path"),
    [
        ({"type": "multi", "graders": {"a": {"type": "python", "source": ""}}, "calculate_output": "a"},
         "grader.graders.a.source"),
        ({**JUDGED, "range": [0, "high"]}, "grader.range.1"),
        ({"type": "endpoint", "url": "nowhere"}, "grader.url"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_grader_has_its_path(tmp_path: Path, grader: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, MINIMAL | {"grader": grader}))
    assert f"{path}: " in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, MINIMAL | {"shadow_graders": {"endpoint": grader}}))
    assert path.replace("grader.", "shadow_graders.endpoint.", 1) + ": " in str(caught.value)


def test_secrets_are_masked_in_what_is_written(tmp_path: Path) -> None:
    grader = {"type": "endpoint", "url": "http://127.0.0.1:9/g", "headers": {"Authorization": "Bearer hidden"}}
    config = load_config(written(tmp_path, MINIMAL | {"grader": grader}))
    assert "hidden" not in str(config.model_dump(mode="json")) + repr(config)


def test_a_value_can_be_the_text_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "graders").mkdir()
    (tmp_path / "graders/one.py").write_text("def grade(sample, item):\n    return 0.5\n")
    config = tmp_path / "run.yaml"
    config.write_text("grader: {type: python, source: !file graders/one.py}\n")
    tree = read_tree(config, None, example="")
    assert tree == {"grader": {"type": "python", "source": "def grade(sample, item):\n    return 0.5\n"}}


def test_a_file_that_is_missing_is_named_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("name: a\ngrader: {type: python, source: !file gone.py}\n")
    with pytest.raises(ConfigError, match=r"(?s)gone\.py.*line 2"):
        read_tree(config, None, example="")


def test_a_value_can_join_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("y = x\n")
    config = tmp_path / "run.yaml"
    config.write_text("grader: {source: !file [a.py, b.py]}\n")
    assert read_tree(config, None, example="") == {"grader": {"source": "x = 1\n\ny = x\n"}}
    config.write_text("grader: {source: !file [a.py, gone.py]}\n")
    with pytest.raises(ConfigError, match=r"(?s)gone\.py.*line 1"):
        read_tree(config, None, example="")
    config.write_text("grader: {source: !file [a.py, {b: c}]}\n")
    with pytest.raises(ConfigError):
        read_tree(config, None, example="")
