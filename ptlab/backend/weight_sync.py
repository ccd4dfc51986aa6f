"""From trainer to sampler: immutable versions, verified each time, fail closed.

    publish = capture (adapter and probe log-probabilities under the trainer's thread) -> directory, atomic rename
              -> load in the sampler -> verify -> AdapterRef

Verified are (a) coverage: the sampler registered exactly the tensors that were saved; (b) the probe: on a few dozen fixed tokens the
sampler's log-probabilities agree with the trainer's within twice the noise floor that the two engines showed on the base model at
start-up. A sampler that still serves the base model or an older version fails (b) as soon as these differ by more than the noise.
On a failure the load is tried once more, then the version is unloaded and WeightSyncError raised. Nothing falls back to the base model.

Versions are counted by their users (sampling sessions and requests in flight) and unloaded when nobody is left.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from ptlab.backend.checkpoints import Probe
from ptlab.engines.protocols import AdapterRef, SampleCall, Sampler, Trainer
from ptlab.errors import CheckpointError, EngineError, WeightSyncError
from ptlab.types import ModelInput, SamplingParams

T = TypeVar("T")
WriteVersion = Callable[[Callable[[Path], None], Callable[[], Probe]], AdapterRef]
PROBE_TOKENS, PROBE_SEED = 64, 20261121
DRAWN_PROMPT, DRAWN_TOKENS = 8, 16
"""Where the probe has to be drawn: tokens of its prompt, and of each of its PROBE_TOKENS / DRAWN_TOKENS answers."""
MINIMAL_NOISE_NATS = {"float32": 5e-5, "bfloat16": 5e-2}
"""The floor under the measured floor: a probe of the base alone may show no noise at all where an adapter adds some."""
LARGEST_NOISE_NATS = {"float32": 5e-3, "bfloat16": 1.0}
"""Two engines that differ by more on the base model do not hold the same weights."""
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class _Answers:
    """Log-probabilities of the same tokens: from the sampler, from the trainer, and from the trainer's base model."""

    sampler: list[float]
    trainer: list[float]
    base: list[float]


class RunInTrainer(Protocol):
    def __call__(self, work: Callable[[], T], /, *, urgent: bool = False) -> Awaitable[T]: ...


@dataclass(slots=True)
class _Live:
    """A version that the sampler holds."""

    ref: AdapterRef
    users: int
    tensors: frozenset[str]
    delete_files: bool  # nobody will ask for it again: its directory goes with the last user


@dataclass(slots=True)
class WeightSync:
    """The versions of one base model's adapters in its sampler.

    Args:
        run_in_trainer: awaits a blocking function on the trainer's own thread.
        on_metrics: told the `sync/*` metrics of each publication.
    """

    trainer: Trainer
    sampler: Sampler
    run_in_trainer: RunInTrainer
    on_metrics: Callable[[Mapping[str, float]], None]
    noise_nats: float = 0.0
    _probe_tokens: list[int] = field(default_factory=list)
    _base_logprobs: list[float] = field(default_factory=list)
    _live: dict[str, _Live] = field(default_factory=dict)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # loads and unloads happen one after the other

    async def calibrate(self) -> None:
        """Measure how far two correct engines differ on the base model: the scale of every later comparison."""
        info = self.trainer.info
        count = min(PROBE_TOKENS, info.max_context_length - 1)
        self._probe_tokens = np.random.default_rng(PROBE_SEED).integers(0, info.vocab_size, count).tolist()
        self._base_logprobs = await self._trainer_logprobs(None)
        theirs = await self._sampler_logprobs(None)
        gap = _gap(self._base_logprobs, theirs)
        coarser = max(info.dtype, self.sampler.info.dtype, key=MINIMAL_NOISE_NATS.__getitem__)
        self.noise_nats = max(gap, MINIMAL_NOISE_NATS[coarser])
        if not gap < LARGEST_NOISE_NATS[coarser]:
            raise WeightSyncError(
                f"trainer and sampler disagree on the base model {info.name} by {gap:.3g} nats on {count} fixed tokens; "
                f"they do not hold the same weights",
                engine="weight sync",
                operation="calibrate",
            )

    async def publish(self, model_id: str, write: WriteVersion, *, ephemeral: bool) -> tuple[AdapterRef, Probe]:
        """Make the trainer's current weights samplable; returns once the sampler holds and proves them. The caller is their first user.

        Args:
            write: puts the version's directory in place and names it, given what fills it and what computes the probe; runs on the
                trainer's thread, so no optimizer step can come between the two.
            ephemeral: delete the directory if the sampler refuses it.
        Raises: WeightSyncError if the sampler reports other weights than were published.
        """
        started = time.perf_counter()
        times: dict[str, float] = {}
        probes: list[Probe] = []

        def fill(directory: Path) -> None:
            begun = time.perf_counter()
            self.trainer.save_adapter(model_id, directory)
            times["sync/write_s"] = time.perf_counter() - begun

        def probe() -> Probe:
            begun = time.perf_counter()
            logprobs = _numbers(self.trainer.compute_logprobs(model_id, self._probe_tokens))
            probes.append(Probe(tokens=self._probe_tokens, logprobs=logprobs, base_logprobs=self._base_logprobs))
            times["sync/capture_s"] = time.perf_counter() - begun
            return probes[-1]

        ref: AdapterRef = await self.run_in_trainer(lambda: write(fill, probe), urgent=True)  # reads its model only, whose turn it is
        async with self._changing:
            times |= await self._load_verified(ref, probes[0], ephemeral=ephemeral)
        self.on_metrics(times | {"sync/latency_s": time.perf_counter() - started, "sync/version": float(ref.version)})
        return ref, probes[0]

    async def acquire(self, ref: AdapterRef, probe: Probe | None) -> None:
        """Add a user to a version, loading it from its directory (verified against the probe saved with it) if it is not live."""
        async with self._changing:
            if ref.name in self._live:
                self._live[ref.name].users += 1
            elif probe is None:
                raise WeightSyncError(
                    f"{ref.name}: saved without probe log-probabilities, so what the sampler loads cannot be verified",
                    engine="weight sync",
                    operation="load",
                )
            else:
                await self._load_verified(ref, probe, ephemeral=False)

    def hold(self, ref: AdapterRef) -> None:
        """Add a user to a version that is live (a request in flight on an open sampling session)."""
        self._live[ref.name].users += 1

    async def release(self, ref: AdapterRef, *, delete_files: bool = False) -> None:
        """Take a user away; the last one unloads the version, and deletes its directory if any user said so."""
        live = self._live[ref.name]
        live.delete_files |= delete_files
        live.users -= 1
        if live.users > 0:
            return
        async with self._changing:
            if live.users > 0 or ref.name not in self._live:  # somebody came, or somebody else has unloaded it
                return
            del self._live[ref.name]
            await self.sampler.unload_adapter(ref)
            if live.delete_files:
                shutil.rmtree(ref.path, ignore_errors=True)  # at exit the whole scratch directory may be gone already

    @property
    def trains_head(self) -> bool:
        """Whether a live version changes the output head: in one batch it may disturb how such a sampler scores other prompts."""
        return any("lm_head" in name for live in self._live.values() for name in live.tensors)

    @property
    def live_versions(self) -> list[AdapterRef]:
        return [live.ref for live in self._live.values()]

    async def _load_verified(self, ref: AdapterRef, probe: Probe, *, ephemeral: bool) -> dict[str, float]:
        failures: list[str] = []
        for _ in range(2):
            times: dict[str, float] = {}
            try:
                tensors = await self._load_and_check(ref, probe, times)
            except (EngineError, CheckpointError) as err:
                failures.append(str(err))
            else:
                self._live[ref.name] = _Live(ref, 1, tensors, delete_files=False)
                return times
            await self.sampler.unload_adapter(ref)
        if ephemeral:
            shutil.rmtree(ref.path, ignore_errors=True)
        raise WeightSyncError(
            f"{ref.name}: the sampler was refused twice and samples nothing of this version. First: {failures[0]}. Then: {failures[1]}",
            engine="weight sync",
            operation="publish",
        )

    async def _load_and_check(self, ref: AdapterRef, probe: Probe, times: dict[str, float]) -> frozenset[str]:
        """The tensors that the sampler holds after loading. Raises: WeightSyncError saying what is wrong with them."""
        begun = time.perf_counter()
        registered = await self.sampler.load_adapter(ref)
        times["sync/load_s"] = time.perf_counter() - begun
        _refuse(await asyncio.to_thread(_coverage_fault, ref, registered))
        begun = time.perf_counter()
        if self.sampler.capabilities.prompt_logprobs_with_head:
            answers = _Answers(await self._sampler_logprobs(ref), probe.logprobs, probe.base_logprobs)
        else:
            answers = await self._drawn_answers(ref)
        times["sync/verify_s"] = time.perf_counter() - begun
        times["sync/verify_gap"] = _gap(answers.trainer, answers.sampler)
        _refuse(self._probe_fault(answers))
        return registered

    async def _drawn_answers(self, ref: AdapterRef) -> _Answers:
        """The probe for a sampler whose prompt log-probabilities cannot be trusted with this adapter: it draws a few answers, and the
        trainer scores the drawn tokens under the version's own files."""
        answers = _Answers([], [], [])
        params = SamplingParams(max_tokens=DRAWN_TOKENS, seed=PROBE_SEED, stop=[])
        prompt = self._probe_tokens[:DRAWN_PROMPT]
        drawn = await self.sampler.sample(
            SampleCall(prompt=ModelInput.from_ints(prompt), num_samples=PROBE_TOKENS // DRAWN_TOKENS, params=params, adapter=ref)
        )
        for sequence in drawn.sequences:
            answers.sampler.extend(sequence.logprobs or [])
            for logprobs, adapter in ((answers.trainer, ref), (answers.base, None)):
                call = _scoring([*prompt, *sequence.tokens], adapter)
                scores = await self.run_in_trainer(partial(self.trainer.score_prompt, call), urgent=True)
                assert scores.logprobs_T is not None
                logprobs.extend(scores.logprobs_T[len(prompt) :].tolist())
        return answers

    def _probe_fault(self, answers: _Answers) -> str | None:
        """None if the sampler agrees with the trainer, else what it seems to hold instead."""
        allowed = 2 * self.noise_nats
        gap = _gap(answers.trainer, answers.sampler)
        if gap <= allowed:
            return None
        if _gap(answers.base, answers.sampler) <= allowed:
            suspect = "it answers like the base model, as if no adapter were loaded"
        else:
            suspect = "it holds other weights, perhaps an older version or a damaged copy"
        return f"the sampler's log-probabilities on the probe are {gap:.3g} nats off the trainer's (allowed {allowed:.3g}): {suspect}"

    async def probe_of(self, ref: AdapterRef) -> Probe:
        """The trainer's log-probabilities of the fixed tokens under an adapter in a directory."""
        scores = await self.run_in_trainer(partial(self.trainer.score_prompt, _scoring(self._probe_tokens, ref)), urgent=True)
        assert scores.logprobs_T is not None
        logprobs = [float(value) for value in scores.logprobs_T[1:]]
        return Probe(tokens=self._probe_tokens, logprobs=logprobs, base_logprobs=self._base_logprobs)

    async def _trainer_logprobs(self, model_id: str | None) -> list[float]:
        return _numbers(await self.run_in_trainer(lambda: self.trainer.compute_logprobs(model_id, self._probe_tokens), urgent=True))

    async def _sampler_logprobs(self, ref: AdapterRef | None) -> list[float]:
        return _numbers((await self.sampler.sample(_scoring(self._probe_tokens, ref))).prompt_logprobs or [])


def _scoring(tokens: list[int], adapter: AdapterRef | None) -> SampleCall:
    prompt, params = ModelInput.from_ints(tokens), SamplingParams(max_tokens=1)
    return SampleCall(prompt=prompt, num_samples=1, params=params, adapter=adapter, include_prompt_logprobs=True)


def _refuse(fault: str | None) -> None:
    if fault is not None:
        raise WeightSyncError(fault, engine="weight sync", operation="verify")


def _coverage_fault(ref: AdapterRef, registered: frozenset[str]) -> str | None:
    saved = saved_tensor_names(ref.path)
    if saved == registered:
        return None
    missing, extra = sorted(saved - registered), sorted(registered - saved)
    return (
        f"{len(missing)} of {len(saved)} saved LoRA tensors are not registered (first: {missing[:2]}), "
        f"{len(extra)} are registered that were not saved (first: {extra[:2]})"
    )


def saved_tensor_names(directory: Path) -> frozenset[str]:
    """Tensor names in an adapter's safetensors file, from its header."""
    return frozenset(safetensors_header(directory / ADAPTER_FILE))


def safetensors_header(file: Path) -> dict[str, Any]:
    """What the file says of each tensor (`dtype`, `shape`, ...), by name: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _numbers(logprobs: list[float | None]) -> list[float]:
    """Without the first, which has nothing before it."""
    return [value for value in logprobs if value is not None]


def _gap(ours: list[float], theirs: list[float]) -> float:
    """Largest difference in nats; infinite where the lengths differ or a value is not finite."""
    if len(ours) != len(theirs) or not np.isfinite([*ours, *theirs]).all():
        return float("inf")
    return float(np.abs(np.subtract(ours, theirs)).max())
