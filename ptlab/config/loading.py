"""From a YAML file and `--set` overrides to the config of a recipe, or one sentence for each mistake."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ptlab.config.messages import describe, sentences
from ptlab.config.recipes import CONFIGS
from ptlab.config.run import RunConfig
from ptlab.config.yaml12 import parse_yaml
from ptlab.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply `section.key=value` overrides (values are YAML), check all of it.

    The run's name defaults to the file's. Raises: ConfigError, one sentence for each mistake.
    """
    raw = _read_file(Path(path))
    raw.setdefault("name", Path(path).stem)
    changed = [_apply_override(raw, override) for override in overrides]
    config_class = _class_of(raw, path, changed)
    try:
        config = config_class.model_validate(raw)
    except ValidationError as err:
        raise ConfigError("\n".join(sentences(err, config_class, raw, source=str(path), changed=changed))) from None
    _check_files(config, str(path))
    return config


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" (did you mean {path.with_name(near[0])}?)" if near else ""
        raise ConfigError(f"{path}: cannot read the config file: {err.strerror}{hint}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text at byte {err.start}; needed a YAML file") from err
    raw = parse_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: found {describe(raw)} at the top, needed `key: value` pairs")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> str:
    """Set one dotted key in raw; returns the dotted key."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: needed section.key=value, e.g. --set optim.learning_rate=4e-5")
    node = raw
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[:depth])} is {describe(child)}, not a section")
        node = child
    node[keys[-1]] = parse_yaml(text, f"--set {override}")
    return ".".join(keys)


def _class_of(raw: Mapping[str, Any], path: str | Path, changed: Sequence[str]) -> type[RunConfig]:
    """The config class of the recipe that is named; "rl" where none is."""
    name = raw.get("recipe", "rl")
    if isinstance(name, str) and name in CONFIGS:
        return CONFIGS[name]
    where = "--set recipe" if "recipe" in changed else f"{path}: recipe"
    near = difflib.get_close_matches(str(name), CONFIGS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"{where}: found {describe(name)}, needed one of {', '.join(CONFIGS)}{hint}")


def _check_files(config: RunConfig, source: str) -> None:
    for key, value in {"model.path": config.model.path, **config.files()}.items():
        if value is None:
            continue
        path = Path(value)
        if not path.exists():
            raise ConfigError(
                f"{source}: {key}: {value} does not exist (looked at {path.absolute()}); paths are relative to the working directory"
            )
        if (key == "model.path") != path.is_dir():
            wanted, found = ("a model directory", "a file") if key == "model.path" else ("a JSONL file", "a directory")
            raise ConfigError(f"{source}: {key}: {value} is {found}, needed {wanted}")
