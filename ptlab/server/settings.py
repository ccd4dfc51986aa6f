"""What an operator of `ptlab serve` can set. Every limit is refused with a sentence that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
MIB = 2**20


class ServeSettings(BaseModel):
    """Address, data directory, limits and times of one server. Sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs API keys."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 = any free one."""
    data_dir: Path
    """Checkpoints, runs, requests and keys live here and are found again by the next server."""
    public_url: str | None = None
    """What clients put before /api/v1 when a proxy stands in between; None = the address a request was sent to."""

    max_body_bytes: Positive = 32 * MIB
    """Largest request body as it comes over the network."""
    max_decompressed_bytes: Positive = 64 * MIB
    """Largest zstd-compressed body once decompressed."""
    max_datums: Positive = 4096
    """Datums in one forward_backward request (the SDK sends at most 1024)."""
    max_tokens_per_call: Positive = 4_000_000
    """Tokens of all datums of one forward_backward request together."""
    max_new_tokens: Positive = 131_072
    """Largest max_tokens of a sampling request; the model's context may be smaller."""
    max_num_samples: Positive = 1024
    """Largest num_samples of a sampling request."""
    max_pending_per_key: Positive = 4096
    """Requests of one API key that may wait for their turn; more are answered 429 and sent again by the SDK."""
    max_pending: Positive = 16384
    """The same for all keys together."""
    max_pending_bytes: Positive = 1024 * MIB
    """Bodies of all waiting requests together."""
    max_requests_ahead: Positive = 100_000
    """How far a request's number may be ahead of the one its model waits for."""
    max_open_requests: Positive = 16384
    """HTTP requests that may be open at once; every result that is waited for holds one."""

    long_poll_s: Seconds = 30.0
    """How long retrieve_future is held before it answers "not yet"; the SDK gives up after 45."""
    inline_result_bytes: Positive = 256 * 1024
    """Larger results are announced by their size first, where the client allows it."""
    result_grace_s: Seconds = 3600.0
    """How long a result is kept once it is ready: the answer may have been lost on the way. Later polls are told 410."""
    maintenance_every_s: Seconds = 5.0
    """Time between two looks at what has become idle or old."""
    gap_timeout_s: Seconds = 600.0
    """How long a model waits for a request number that has not come, although later ones have (the SDK sends again for 300)."""
    session_timeout_s: Seconds = 7 * 86400.0
    """Silence after which a session counts as finished: its ephemeral samplers go. Models and checkpoints stay."""
    park_after_s: Seconds = 1800.0
    """Idle time after which a model's adapter and optimizer go to disk; the next request brings them back."""
    sampler_idle_s: Seconds = 1800.0
    """Idle time after which the sampler drops a version; the next request loads it again."""
    sequence_memory_s: Seconds = 86400.0
    """How long sampled sequences are remembered for stable_reinforce."""
    url_lifetime_s: Seconds = 3600.0
    """How long a signed download URL works."""
    shutdown_grace_s: Seconds = 30.0
    """How long open connections may finish after SIGTERM before they are closed."""

    strict_losses: bool = False
    """Refuse losses whose formula the hosted service does not publish (stable_reinforce) instead of using ptlab's own."""
    custom_losses: bool = True
    """Tell clients to upload traced custom losses (create_custom_loss) rather than run them themselves."""
    seed: int | None = None
    """Base of the seeds of samples that bring none; None = fresh randomness."""
    trace: Path | None = None
    """File to append one JSON line per HTTP request to: time, method, path, status, milliseconds, bytes."""
