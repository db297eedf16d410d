"""RunConfig: everything that decides a run, from one YAML file plus `key=value` overrides.

One module per section. Importing this loads no torch. Unknown keys, wrong types and values out of range are errors that
name the field; the resolved config is written into the run folder.
"""

from __future__ import annotations

from rft.config.model import EngineConfig, LoraConfig, ModelConfig, TransformersEngineConfig, VllmEngineConfig
from rft.config.reading import config_problem, load_config, read_tree, validate_config
from rft.config.rollout import ResponseFormat, RolloutConfig
from rft.config.run import DataConfig, RunConfig
from rft.config.section import Config
from rft.config.training import CostsConfig, EvaluationConfig, TrainingConfig, WarmupConfig

__all__ = [
    "Config",
    "CostsConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "ResponseFormat",
    "RolloutConfig",
    "RunConfig",
    "TrainingConfig",
    "TransformersEngineConfig",
    "VllmEngineConfig",
    "WarmupConfig",
    "config_problem",
    "load_config",
    "read_tree",
    "validate_config",
]
