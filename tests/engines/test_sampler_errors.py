"""The sentences of all samplers."""

from __future__ import annotations

from pathlib import Path

from ptlab.engines.protocols import AdapterRef
from ptlab.engines.sampler_errors import as_engine_error, closed, name_taken, not_loaded, not_the_files
from ptlab.errors import EngineError, InvalidRequestError

REF = AdapterRef(name="run/v3", version=3, path=Path("/versions/v3"))


def test_errors_name_the_adapter_and_the_engine() -> None:
    for error, words in [
        (closed("torch sampler"), ["closed"]),
        (not_loaded(REF, "torch sampler"), ["'run/v3'", "version 3", "not loaded", "nothing was sampled"]),
        (name_taken(REF, "torch sampler"), ["'run/v3'", "new name"]),
        (not_the_files(REF, "q_proj.lora_A", "torch sampler", count=2), ["q_proj.lora_A", "/versions/v3", "2 such", "not loaded"]),
    ]:
        assert error.engine == "torch sampler"
        assert all(word in str(error) for word in words), str(error)


def test_only_foreign_errors_are_wrapped_and_the_cause_is_kept() -> None:
    own = InvalidRequestError("n must be positive")
    assert as_engine_error(own, "sample", "x") is own
    foreign = RuntimeError("\nfirst line\nsecond line")
    wrapped = as_engine_error(foreign, "load", "vllm sampler")
    assert isinstance(wrapped, EngineError) and wrapped.__cause__ is foreign
    assert (str(wrapped), wrapped.engine, wrapped.operation) == ("load failed: RuntimeError: first line", "vllm sampler", "load")
    assert str(as_engine_error(KeyError(), "sample", "x")) == "sample failed: KeyError: KeyError"
