"""The minimal example stays short, correct and runnable."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from ptlab.backend.backend import Backend
from ptlab.client.connection import BackendConnection
from ptlab.client.service import ServiceClient
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.losses import check_datum, resolve_loss
from ptlab.rewards.math_answer import MathReward
from ptlab.rl.datums import trajectory_to_datums
from ptlab.rl.types import Trajectory, Transition
from ptlab.types import ModelInput, SampledSequence

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_loop.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rl_loop_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_fewer_than_a_hundred_lines():
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_its_datum_is_the_one_of_the_library(example):
    prompt = ModelInput.from_ints([5, 6, 7])
    sequence = SampledSequence.from_lists([8, 9], [-0.5, -0.25], stop_reason="stop", sequence_id="s")
    datum = example.datum(prompt, sequence, 2.0)
    check_datum(datum, resolve_loss("importance_sampling"), index=0, vocab_size=10, max_tokens=8)
    transition = Transition(
        observation=prompt,
        action=sequence.tokens,
        sampling_logprobs_T=sequence.logprobs,
        policy_version=0,
        stop_reason="stop",
        reward=1.0,
        episode_done=True,
    )
    [ours] = trajectory_to_datums(Trajectory(transitions=[transition], stop_reason="done"), 2.0)
    assert datum.model_input == ours.model_input
    for name, tensor in ours.loss_fn_inputs.items():
        assert datum.loss_fn_inputs[name].tolist() == tensor.tolist()


def test_its_loop_learns(example, tmp_path, monkeypatch):
    class Renderer:
        def build_generation_prompt(self, messages):
            return ModelInput.from_ints([0, 1])

        def get_stop_sequences(self):
            return []

        def parse_response(self, tokens):
            return {"role": "assistant", "content": "yes" if tokens.count(3) > 9 else "no"}, True

    backend = Backend(
        data_dir=tmp_path / "data",
        scratch_dir=tmp_path / "scratch",
        open_engines=lambda name: Engines(trainer=ScriptedTrainer(), sampler=ScriptedSampler(), tokenizer=None),
        on_metrics=lambda metrics: None,
    )
    connection = BackendConnection(backend)
    monkeypatch.setattr(example.tinker, "ServiceClient", lambda: ServiceClient(connection=connection))
    monkeypatch.setattr(example, "get_renderer", lambda name, tokenizer: Renderer())
    monkeypatch.setattr(example, "math_reward", lambda text, truth: MathReward(0.0, float(text == "yes"), 1.0))
    history = example.main("m", steps=4, groups_per_step=4, group_size=8, learning_rate=0.2)
    connection.submit(backend.close()).result()
    connection.close()
    assert history[-1] > history[0] + 0.1
