"""YAML with the scalars of version 1.2."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ptlab.errors import ConfigError


class Yaml12Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 4e-5 is a float, `no` and 2026-11-21 are text; a key given twice is refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Yaml12Dumper(yaml.SafeDumper):
    """Quotes text that a reader of either YAML version would take for something else."""


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.?)(?:[eE][-+]?[0-9]+)?$", list("-+0123456789.")),
    ("float", r"^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", list("-+.")),
):
    for _class in (Yaml12Loader, Yaml12Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML value. Raises: ConfigError that begins with `where`."""
    try:
        return yaml.load(text, Loader=Yaml12Loader)
    except yaml.MarkedYAMLError as err:
        line = f" line {err.problem_mark.line + 1}:" if err.problem_mark is not None else ""
        raise ConfigError(f"{where}:{line} not valid YAML: {err.problem}") from err
    except (yaml.YAMLError, ValueError) as err:
        raise ConfigError(f"{where}: {err}") from err
