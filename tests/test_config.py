"""The configuration refuses what it does not know and says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rft.config import RunConfig, load_config
from rft.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
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
