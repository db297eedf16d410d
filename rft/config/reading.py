"""From a YAML file and `key=value` overrides to a RunConfig, or to one error that names the field."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rft.config.run import RunConfig
from rft.errors import ConfigError
from rft.graders.base import spec_path

_TAGS = ("vllm", "transformers", "http", "mcp")  # of the unions


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b.c=value` overrides (values are YAML), validate.

    Raises ConfigError naming the file, the field and the cure.
    """
    return validate_config(read_tree(path, overrides, example="configs/quickstart.yaml"), where=str(path))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, and `!file`."""


def _file(loader: _Loader, node: yaml.ScalarNode | yaml.SequenceNode) -> str:
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return "\n".join(_text(loader, part) for part in parts)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    path = Path(loader.name).parent / str(loader.construct_scalar(node))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise yaml.constructor.ConstructorError(None, None, f"!file {path}: {error}", node.start_mark) from None


_Loader.add_constructor("!file", _file)


def read_tree(path: Path, overrides: list[str] | None, *, example: str) -> dict[str, Any]:
    """A YAML file with its overrides, not yet validated. Raises ConfigError; `example` is a file to start from.

    A value `!file PATH` is the text of that file, its path seen from the YAML file's folder; `!file [PATH, PATH]` joins
    several: what graders share stands in one file.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, _Loader)
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
            cure="compare with configs/quickstart.yaml; rft/config/ lists every key",
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
