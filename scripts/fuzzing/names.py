"""What scripts/fuzz_server.py knows of a server: which body a route reads, names of things that exist, and values that break parsers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel

from ptlab.server import bodies, openai_bodies

Json = Any
PASS: Final = "forward_backward"
"""The one body that is protobuf."""
API: Final = "/api/v1"
SHAPES: Final[Mapping[str, type[BaseModel] | str | None]] = {
    f"{API}/client/config": bodies.ClientConfigBody,
    f"{API}/client/dynamic_config": bodies.ClientConfigBody,
    f"{API}/telemetry": bodies.TelemetryBody,
    f"{API}/create_session": bodies.CreateSessionBody,
    f"{API}/session_heartbeat": bodies.HeartbeatBody,
    f"{API}/sessions/search": bodies.SearchSessionsBody,
    f"{API}/sessions/{{session_id}}/finish": bodies.FinishSessionBody,
    f"{API}/sessions/{{session_id}}/project": bodies.AssignProjectBody,
    f"{API}/auth/token": None,
    f"{API}/create_model": bodies.CreateModelBody,
    f"{API}/load_weights": bodies.LoadWeightsBody,
    f"{API}/get_info": bodies.GetInfoBody,
    f"{API}/forward_backward": PASS,
    f"{API}/optim_step": bodies.OptimStepBody,
    f"{API}/save_weights": bodies.SaveWeightsBody,
    f"{API}/save_weights_for_sampler": bodies.SaveWeightsForSamplerBody,
    f"{API}/save_weights_external": bodies.SaveWeightsExternalBody,
    f"{API}/create_custom_loss": bodies.CreateCustomLossBody,
    f"{API}/create_sampling_session": bodies.CreateSamplingSessionBody,
    f"{API}/join_sampling_session": bodies.JoinSamplingSessionBody,
    f"{API}/asample": bodies.SampleBody,
    f"{API}/retrieve_future": bodies.RetrieveFutureBody,
    f"{API}/retrieve_futures": bodies.RetrieveFuturesBody,
    f"{API}/cancel_future": bodies.CancelFutureBody,
    f"{API}/weights_info": bodies.WeightsInfoBody,
    f"{API}/copy_weights": bodies.CopyWeightsBody,
    f"{API}/training_runs/{{run}}/checkpoints/{{checkpoint:path}}/publish": None,
    f"{API}/training_runs/{{run}}/checkpoints/{{checkpoint:path}}/ttl": bodies.TtlBody,
    "/v1/chat/completions": openai_bodies.ChatBody,
    "/v1/completions": openai_bodies.CompletionBody,
}
"""What the routes that read a body read."""
RARE: Final = (
    "weights_access_token", "age_encryption_recipients", "optimizer_params", "optimizer_config", "retrieved_request_ids",
    "target_prompt_logprobs", "stream_options", "best_of", "top_logprobs", "destination_project_id",
)  # fmt: skip
"""Fields whose mere presence ends most requests."""
EITHER: Final[Mapping[str, tuple[Sequence[str], Sequence[str]]]] = {
    "LoadWeightsBody": (("session_id", "model_seq_id"), ("model_id", "seq_id")),
    "SaveWeightsForSamplerBody": (("path",), ("sampling_session_seq_id",)),
    "CreateSamplingSessionBody": (("base_model",), ("model_path",)),
}
"""Fields of which a body mostly has these or those."""
GRAPH: Final = {
    "format": 1,
    "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
        {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "logprobs"}], "kwargs": {}},
        {"op": "call_function", "name": "neg", "target": "operator.neg", "args": [{"ref": "sum_1"}], "kwargs": {}},
        {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "neg"}, {"dict": {}}]}], "kwargs": {}},
    ],
}
LOSSES: Final = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "stable_reinforce", "custom", "gspo", "", "no_such_loss")
TRICKS: Final = (
    "", ".", "..", "../..", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e", "%2e%2e/%2e%2e", "%252e%252e", "a/../../b",
    "/etc/passwd", "\\..\\..", "a\x00b", "%00", "a\r\nx-injected: yes", "%0d%0ax-injected:%20yes", "tinker://", "tinker:///", "tinker://../weights/x",
    "tinker://x/weights/../../y", "file:///etc/passwd", "http://127.0.0.1:1/", "hf://x", "~", "$HOME", "{}", "${7*7}", "%s%n",
    "' OR 1=1 --",
    "\u202e\u0000\ufeff", "\U0001f600" * 8, "\u0661\u0662", "null", "NaN", ":train:0", ":sample:0", "::", "x" * 300, "y" * 5000,
    "z" * 70_000,
)  # fmt: skip
DATES: Final = ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00+14:00", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59")
NUMBERS: Final = (
    0, 1, -1, 2, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**40, 10**400, 0.0, -0.0, 0.5,
    1e-320, 1e30, 1e39, 1.7e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
JUNK: Final[tuple[Json, ...]] = (
    None, True, False, "", "3", [], {}, [[]], [None], {"": None}, {"type": "x"}, "\ud800", "\U0010ffff", [1, "a"], {"a": {"b": [{}]}},
    *NUMBERS,
)  # fmt: skip


@dataclass(slots=True)
class Known:
    """Names that a tenant may put into its requests. Lists are never empty."""

    base_model: str
    sessions: list[str]
    models: list[str]
    samplers: list[str]
    paths: list[str]
    """tinker:// paths."""
    requests: list[str]
    sequences: list[str]
    urls: list[str] = field(default_factory=lambda: ["?expires=1&signature=2"])
    """Queries of signed addresses."""
    next_seq_id: Callable[[str], int] = lambda model_id: 1
    """The number that a model (or sampler) waits for."""


def shapes_are_complete(routes: Sequence[tuple[str, str]]) -> None:
    """Raises: ValueError for a route with a body whose shape is not known here."""
    missing = sorted({path for method, path in routes if method in ("POST", "PUT", "PATCH")} - set(SHAPES))
    if missing:
        raise ValueError(f"scripts/fuzz_requests.py does not know what these routes read: {', '.join(missing)}; add them to SHAPES")
