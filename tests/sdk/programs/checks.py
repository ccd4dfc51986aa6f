"""What every program of this folder needs: checks that print one JSON line per client method, and small data for a 512-token model.

suite.py runs the checks of all programs in one process; each also runs alone, `training.py NAME...` only those of these names.
Run by the Python of an SDK's own venv; nothing of ptlab is imported. A line is {"method", "check", "status", "detail"}, status one of
    works     the values were looked at, not only the absence of an exception
    refused   the server or the SDK says in words that it will not do this; detail is that sentence
    failed    anything else; detail is the exception
    public    (suite.py only) the method exists in this SDK; detail is its signature
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

warnings.simplefilter("ignore", FutureWarning)  # 0.38 deprecates every *_async twin; this suite checks that they still work

import tinker  # noqa: E402
from tinker import types  # noqa: E402

OLD_SDK = tinker.__version__ == "0.25.0"
BASE_MODEL = os.environ.get("SDK_BASE_MODEL", "Qwen/Qwen3-8B")
VOCAB_SIZE = 512
EOS_TOKENS = (0, 2)
WAIT_S = 120.0
"""No future of this suite takes this long: one that does hangs."""


class Refused(Exception):
    """The check found that the method is refused, in good order. The message is the reason given."""


@dataclass(frozen=True, kw_only=True)
class Check:
    methods: tuple[str, ...]
    function: Callable[[], Any]
    new_only: bool

    @property
    def program(self) -> str:
        """The file it stands in, without .py."""
        return os.path.basename(self.function.__code__.co_filename).removesuffix(".py")


CHECKS: list[Check] = []


def check(*methods: str, new_only: bool = False) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a check of these client methods ("TrainingClient.forward"); skipped where the first is not in this SDK.

    The function may be async; it asserts, and may return a sentence that says what was looked at.

    Args:
        new_only: uses arguments or types that 0.25.0 does not have.
    """

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        CHECKS.append(Check(methods=methods, function=function, new_only=new_only))
        return function

    return register


def run_checks(only: Iterable[str] = ()) -> None:
    """Run what is registered, in order, and print the lines. Names on the command line choose checks by function name."""
    logging.getLogger("tinker").setLevel(logging.CRITICAL)
    only = set(only) or set(sys.argv[1:])
    public = {name for name, _ in public_methods()}
    failed = 0
    for one in CHECKS:
        name = one.function.__name__
        if one.methods[0] not in public or (only and name not in only) or (one.new_only and OLD_SDK):
            continue
        started = time.monotonic()
        try:
            result = one.function()
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
            status, detail = "works", result or ""
        except Refused as refusal:
            status, detail = "refused", str(refusal)
        except BaseException as error:  # reported, and the process ends with 1
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/programs/" in f.filename]
            where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: " if frames else ""
            status, detail = "failed", f"{where}{type(error).__module__}.{type(error).__name__}: {error}"
            failed += 1
        seconds = round(time.monotonic() - started, 2)
        for method in one.methods:
            if method in public:
                emit(method, status, detail, check=name, program=one.program, seconds=seconds)
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # the SDK's loop thread may still wait for an answer nobody wants


def emit(method: str, status: str, detail: str, **more: Any) -> None:
    print(json.dumps({"method": method, "status": status, "detail": detail, **more}), flush=True)


def refusal_of(action: Callable[[], Any], *, within_s: float = 10.0) -> str:
    """The message with which `action` is refused at once. Raises: AssertionError: it was not refused, or only after a stall."""
    started = time.monotonic()
    try:
        action()
    except (tinker.APIStatusError, tinker.RequestFailedError, ValueError, RuntimeError, TypeError) as error:
        seconds = time.monotonic() - started
        assert seconds < within_s, f"refused only after {seconds:.1f} s of retries: {error}"
        if isinstance(error, tinker.APIStatusError):
            assert 400 <= error.status_code < 500 and error.status_code not in (408, 409, 429), f"HTTP {error.status_code}: {error}"
        if isinstance(error, tinker.RequestFailedError):
            assert str(error.category) == "user", f"category {error.category}: {error}"
        return reason_of(error)
    raise AssertionError("was not refused")


def reason_of(error: BaseException) -> str:
    """The server's own words, without what the SDK writes around them."""
    if isinstance(error, tinker.RequestFailedError):
        return re.sub(r"^Request failed: (.*) for self\.request_id=.*$", r"\1", str(error), flags=re.DOTALL)
    if isinstance(error, tinker.APIStatusError) and isinstance(error.body, dict):
        for key in ("error", "detail", "message"):
            if isinstance(error.body.get(key), str):
                return f"HTTP {error.status_code}: {error.body[key]}"
    return str(error)


def works_or_refused(action: Callable[[], Any]) -> Any:
    """The result of `action`, or Refused with the server's reason when it is refused at once with a 4xx or as the user's error."""
    started = time.monotonic()
    try:
        return action()
    except (tinker.APIStatusError, tinker.RequestFailedError) as error:
        seconds = time.monotonic() - started
        assert seconds < 10.0, f"refused only after {seconds:.1f} s of retries: {error}"
        if isinstance(error, tinker.APIStatusError):
            assert 400 <= error.status_code < 500 and error.status_code not in (408, 409, 429), f"HTTP {error.status_code}: {error}"
        else:
            assert str(error.category) == "user", f"category {error.category}: {error}"
        raise Refused(reason_of(error)) from error


def raises(kind: type[BaseException], action: Callable[[], Any], *words: str) -> BaseException:
    """The error of `action`, which is of this kind and says these words."""
    try:
        action()
    except kind as error:
        for word in words:
            assert word in str(error), f"the message lacks {word!r}: {error}"
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


# ---- the public surface ------------------------------------------------------------------------------------------------------------


def public_classes() -> dict[str, type]:
    """The client and future classes of this SDK, by name."""
    from tinker.lib import public_interfaces
    from tinker.lib.public_interfaces.rest_client import RestClient

    names = [
        "ServiceClient",
        "TrainingClient",
        "SamplingClient",
        "AdminClient",
        "APIFuture",
        "BackcompatTrainingClientFuture",
        "BackcompatSamplingClientFuture",
        "LossHandle",
    ]
    found = {name: value for name in names if (value := vars(tinker).get(name) or vars(public_interfaces).get(name)) is not None}
    return {**found, "RestClient": RestClient}


def public_methods() -> list[tuple[str, str]]:
    """("Class.method", signature) of everything public that can be called or read, inherited methods of the future classes included."""
    methods = []
    for class_name, cls in public_classes().items():
        for name in sorted(n for n in dir(cls) if not n.startswith("_")):
            value = inspect.getattr_static(cls, name)
            if isinstance(value, property):
                methods.append((f"{class_name}.{name}", "(property)"))
            elif callable(getattr(cls, name)):
                methods.append((f"{class_name}.{name}", str(inspect.signature(getattr(cls, name)))))
    auth = vars(tinker).get("auth")
    for name in auth.__all__ if auth else []:
        methods.append((f"auth.{name}", str(inspect.signature(getattr(auth, name)))))
    return methods


# ---- clients -----------------------------------------------------------------------------------------------------------------------


@functools.cache
def service() -> Any:
    """One ServiceClient for the whole program."""
    return tinker.ServiceClient(user_metadata={"suite": "sdk", "program": os.path.basename(sys.argv[0])})


@functools.cache
def rest() -> Any:
    return service().create_rest_client()


def ready(client_or_future: Any) -> Any:
    """The client itself: 0.38 gives a future that acts as the client, 0.25 the client."""
    return client_or_future if OLD_SDK else client_or_future.result(WAIT_S)


def make_training_client(*, rank: int = 8, seed: int = 1, **options: Any) -> Any:
    return ready(service().create_lora_training_client(BASE_MODEL, rank=rank, seed=seed, **options))


def make_sampling_client(**options: Any) -> Any:
    return ready(service().create_sampling_client(**(options or {"base_model": BASE_MODEL})))


# ---- data --------------------------------------------------------------------------------------------------------------------------

SENTENCES = [
    [11, 45, 300, 77, 129, 5, 60, 411],
    [20, 21, 22, 23, 24, 25],
    [499, 3, 480, 4, 470, 6, 460, 7, 450, 8],
    [100, 101, 100, 101, 100, 101, 100],
]
"""Token ids, no EOS among them; lengths differ so that padding shows."""


def prompt_of(tokens: Iterable[int]) -> Any:
    return types.ModelInput.from_ints(list(tokens))


def cross_entropy_datum(tokens: list[int], weights: list[float] | None = None) -> Any:
    """Every token is predicted from those before it; weights are one per predicted token, 1.0 by default."""
    return types.Datum(
        model_input=prompt_of(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights or [1.0] * (len(tokens) - 1)},
    )


def rl_datum(tokens: list[int], *, logprobs: list[float], advantages: list[float], **more: Any) -> Any:
    return types.Datum(
        model_input=prompt_of(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "logprobs": logprobs, "advantages": advantages, **more},
    )


def data() -> list[Any]:
    return [cross_entropy_datum(tokens) for tokens in SENTENCES]


def logprobs_of(output: Any) -> list[np.ndarray]:
    """The target log-probabilities of each datum, in order, in the shape of its target_tokens."""
    return [one["logprobs"].to_numpy() for one in output.loss_fn_outputs]


def scores(training_client: Any, sentences: list[list[int]] | None = None) -> np.ndarray:
    """log p of every token after the first of all sentences under the client's weights, one after the other. Changes nothing."""
    batch = [cross_entropy_datum(tokens) for tokens in sentences or SENTENCES]
    return np.concatenate(logprobs_of(training_client.forward(batch, "cross_entropy").result(WAIT_S)))


def adam(learning_rate: float = 1e-2, **options: Any) -> Any:
    return types.AdamParams(learning_rate=learning_rate, **options)


def train_a_step(training_client: Any, batch: list[Any] | None = None, *, learning_rate: float = 1e-2) -> Any:
    """forward_backward and optim_step, both submitted before either is awaited. Gives the forward_backward output."""
    trained = training_client.forward_backward(batch or data(), "cross_entropy")
    updated = training_client.optim_step(adam(learning_rate))
    output = trained.result(WAIT_S)
    updated.result(WAIT_S)
    return output


def close(found: Any, wanted: Any, *, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64), atol=atol, rtol=rtol)


def far(found: np.ndarray, other: np.ndarray, *, by: float = 1e-3) -> None:
    """The two differ clearly: the weights behind them are not the same."""
    distance = float(np.abs(np.asarray(found) - np.asarray(other)).max())
    assert distance > by, f"differ by {distance:.2e} only, expected more than {by}"
