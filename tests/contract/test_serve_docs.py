"""docs/serve.md against the code: settings with their defaults, endpoints, metrics, OpenAI's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from ptlab.serve import OWN_OPTIONS
from ptlab.server.meters import Meters
from ptlab.server.openai_bodies import IGNORED, MOST_CHOICES, MOST_STOPS, REFUSED, ChatBody, CompletionBody
from ptlab.server.routes import catalog, downloads, futures, metrics, sampling, service, training
from ptlab.server.routes.openai import OpenAILimits
from ptlab.server.settings import ServeSettings

DOCS = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Text below a heading, up to the next one of its level."""
    [level] = re.findall(rf"^(#+) {re.escape(title)}$", DOCS, re.MULTILINE)
    return re.split(rf"^#{{1,{len(level)}}} ", DOCS.split(f"{level} {title}\n", 1)[1], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_every_setting_stands_in_the_table_with_its_default() -> None:
    documented = {row[0].strip("`"): row[1] for row in rows(section("Limits and times"))[1:]}
    fields = {name: field for name, field in ServeSettings.model_fields.items() if name not in OWN_OPTIONS}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default).lower()
        assert documented[name] == default, name


def paths(routers: Iterable[object]) -> set[tuple[str, str]]:
    found = set()
    for router in routers:
        for route in router.routes:  # type: ignore[attr-defined]
            assert isinstance(route, APIRoute)
            found |= {(method, route.path.removeprefix("/").removeprefix("api/v1/")) for method in route.methods - {"HEAD"}}
    return found


def test_every_endpoint_stands_in_the_table() -> None:
    text = section("Endpoints")
    named = set(re.findall(r"`(GET|POST|PUT|DELETE) ([^`]+)`", text))
    below_checkpoint = {"publish", "ttl", ".../external_weights_urls", ".../archive"}
    documented = set()
    for method, path in named:
        if path in below_checkpoint:
            path = "training_runs/{id}/checkpoints/{path}/" + path.removeprefix(".../")
        documented.add((method, re.sub(r"\{[a-z_]+\}|\.\.\.$", "{}", path).removeprefix("/")))
    router = metrics.create_metrics_router(Meters(CollectorRegistry()))
    served = paths([*(module.router for module in (service, training, sampling, futures, catalog, downloads)), router])
    served_plain = {(method, re.sub(r"\{[a-z_]+(:path)?\}", "{}", path)) for method, path in served}
    outside = {
        ("GET", "metrics"), ("POST", "v1/chat/completions"), ("POST", "v1/completions"), ("GET", "v1/models"), ("GET", "v1/models/{}"),
    }  # fmt: skip
    assert documented == served_plain | outside


def test_every_metric_is_described() -> None:
    registry = CollectorRegistry()
    Meters(registry)
    text = section("Metrics")
    for family in registry.collect():
        if family.name.startswith("ptlab_"):
            assert family.name in text, family.name
    documented = set(re.findall(r"ptlab_[a-z_]+", text))
    known = {family.name for family in registry.collect()} | {f"{family.name}_total" for family in registry.collect()}
    assert documented <= known


def test_every_parameter_of_openai_is_accounted_for() -> None:
    text = section("OpenAI's API")
    for name in {*REFUSED, *IGNORED, *ChatBody.model_fields, *CompletionBody.model_fields}:
        assert f"`{name}" in text, name
    assert f"`n` ({MOST_CHOICES})" in text
    assert f"`stop` ({MOST_STOPS})" in text
    limits = OpenAILimits()
    assert f"{limits.most_requests} such requests" in text
    assert f"{limits.most_models_per_key} models" in text


def test_links_lead_somewhere() -> None:
    folder = Path(__file__).parents[2] / "docs"
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", DOCS):
        assert (folder / target).exists(), target
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", DOCS, re.MULTILINE)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", DOCS):
        assert anchor in headings, anchor
