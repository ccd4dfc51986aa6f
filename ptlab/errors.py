"""Every error a user can meet.

    PtlabError                       category = "user" | "server"; picklable; no HTTP inside
      ConfigError(ValueError)          yaml: unknown key (with the nearest known one), impossible combination
      InvalidRequestError(ValueError)  a datum, parameter or name that can never work
        NotFoundError(LookupError)       model_id, session, checkpoint
          GoneError                        an answer that was kept for its time, and is no longer
        OrderError                       seq_id from the past with another content
      BusyError                        try again later; the only error meant to be retried
      CheckpointError(RuntimeError)    missing, torn, or written under another base model, rank or alpha
      StoreError(RuntimeError)         the database of a server could not be written or read
      EngineError(RuntimeError)        the trainer or sampler failed; carries engine and operation; __cause__ kept
        EngineLostError                  the engine died with the request and is being replaced; sending it again is safe
        NotServedError                   this engine has no right answer to a valid request; another one has
        WeightSyncError                  the sampler does not hold what the trainer published
      EnvError(RuntimeError)           the environment broke (not: the model answered badly)
        SandboxError
      RemoteError                      SDK names for failures of a remote connection; never raised in-process

A wrong, malformed or over-long answer of the model is a reward and a stop reason, never an exception.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Category = Literal["user", "server"]


class PtlabError(Exception):
    """Root of the tree. The message says where, what was found, what was needed, and what to do."""

    category: ClassVar[Category] = "server"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(PtlabError, ValueError):
    """A config file or command line that cannot be run."""

    category = "user"


class InvalidRequestError(PtlabError, ValueError):
    """A datum, parameter or name that can never work; sending it again gives the same answer."""

    category = "user"


class NotFoundError(InvalidRequestError, LookupError):
    """No such model_id, session, sampler or checkpoint."""


class GoneError(NotFoundError):
    """The answer of a request that was kept for its time, and is no longer."""


class OrderError(InvalidRequestError):
    """A seq_id that was already used for a request with another content."""


class BusyError(PtlabError):
    """Too much is queued; the same request may be sent again later."""


class CheckpointError(PtlabError, RuntimeError):
    """A checkpoint that is missing, torn, or written under another base model, rank or alpha."""

    category = "user"


class StoreError(PtlabError, RuntimeError):
    """The database of a server could not be written or read. What failed changed nothing."""


class EngineError(PtlabError, RuntimeError):
    """The trainer or sampler failed.

    Args:
        engine: which engine ("peft trainer", "torch sampler").
        operation: what it was doing ("forward_backward").
    """

    def __init__(self, message: str, *, engine: str = "", operation: str = "") -> None:
        super().__init__(message)
        self.engine = engine
        self.operation = operation

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_engine_error, (type(self), self.message, self.engine, self.operation))


def _rebuild_engine_error(kind: type[EngineError], message: str, engine: str, operation: str) -> EngineError:
    return kind(message, engine=engine, operation=operation)


class EngineLostError(EngineError):
    """The engine died with the request and is being replaced. Nothing was answered; sending the request again is safe."""


class NotServedError(EngineError):
    """This engine has no right answer to a valid request; another engine has. Nothing was computed."""


class WeightSyncError(EngineError):
    """The sampler does not hold what the trainer published. Nothing was sampled from it."""


class EnvError(PtlabError, RuntimeError):
    """The environment itself broke."""


class SandboxError(EnvError):
    """The sandbox could not be started or held."""


class RemoteError(PtlabError):
    """A failure between a client and a remote server. In-process there is none; the class keeps `except` clauses valid."""


# The official SDK's names, so that `except tinker.APIError:` keeps its meaning under `import ptlab as tinker`.
TinkerError = APIError = APIStatusError = RequestFailedError = PtlabError
BadRequestError = UnprocessableEntityError = InvalidRequestError
ConflictError = OrderError
RateLimitError = BusyError
InternalServerError = EngineError
APIConnectionError = APITimeoutError = APIResponseValidationError = RemoteError
AuthenticationError = PermissionDeniedError = BillingError = RemoteError
