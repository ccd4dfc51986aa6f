"""What every sampler says of the same mistake, so that a client meets one sentence whichever engine serves it."""

from __future__ import annotations

from ptlab.engines.protocols import AdapterRef
from ptlab.errors import EngineError, PtlabError


def closed(engine: str) -> EngineError:
    return EngineError("the sampler is closed", engine=engine, operation="sample")


def not_loaded(adapter: AdapterRef, engine: str) -> EngineError:
    return EngineError(
        f"adapter {adapter.name!r} version {adapter.version} is not loaded; nothing was sampled", engine=engine, operation="sample"
    )


def name_taken(adapter: AdapterRef, engine: str) -> EngineError:
    """A name stands for one set of weights for ever: caches may go by it."""
    return EngineError(
        f"adapter name {adapter.name!r} is in use for other weights; a new version needs a new name",
        engine=engine,
        operation="load_adapter",
    )


def not_the_files(adapter: AdapterRef, tensor: str, engine: str, *, count: int = 1) -> EngineError:
    """The model holds other values than the adapter's file.

    Args:
        tensor: the first such tensor.
        count: how many there are.
    """
    return EngineError(
        f"adapter {adapter.name!r}: tensor {tensor} in the model is not the one in {adapter.path} ({count} such); "
        f"the adapter was not loaded",
        engine=engine,
        operation="load_adapter",
    )


def as_engine_error(err: Exception, operation: str, engine: str) -> PtlabError:
    """Our own errors as they are; anything else as an EngineError that keeps the cause."""
    if isinstance(err, PtlabError):
        return err
    wrapped = EngineError(f"{operation} failed: {named(err)}", engine=engine, operation=operation)
    wrapped.__cause__ = err
    return wrapped


def named(err: Exception) -> str:
    return f"{type(err).__name__}: {first_line(err)}"


def first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
