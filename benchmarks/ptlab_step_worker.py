#!/usr/bin/env python3
"""Whole RL steps of ptlab as a benchmark worker: `ptlab_step_worker.py MODEL ITEM --rank 16`. Answers "step" with the split of one step.

The recipe's own calls in the recipe's order (ptlab/recipes/rl.py) through the backend in this process, with the torch sampler; only the
environments are the benchmark's. CPU-seconds of the process, by phase:

    sampling   rollouts less the grading: the sampler, the client, the event loop
    reward     decoding and grading the answers
    train      forward_backward and optim_step
    sync       new weights written, loaded into the sampler and verified
    overhead   all else: advantages, datums, metrics of the step
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.worker_process import Channel, Meter, resident_mb
from ptlab.config import RlConfig
from ptlab.local import open_service
from ptlab.rewards.math_answer import math_reward
from ptlab.rl import datums, diagnostics, rollout
from ptlab.rl.advantages import group_centred
from ptlab.rl.types import Action, ActionExtra, Env, EnvGroupBuilder, Observation, StepResult, StopCondition
from ptlab.types import AdamParams, ModelInput

ADAM = AdamParams(learning_rate=1e-4)


class Grader:
    """Grades every answer and counts what that costs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.cpu_s = tokenizer, 0.0

    def grade(self, action: Action, answer: str) -> float:
        begun = time.process_time()
        graded = math_reward(self.tokenizer.decode(action, skip_special_tokens=True), answer, format_coef=0.0)
        self.cpu_s += time.process_time() - begun
        return graded.correct


class PreparedEnv(Env):
    """One prompt, one answer, graded; it pays the prepared reward, so that every sequence has something to teach."""

    def __init__(self, prompt: list[int], answer: str, reward: float, grader: Grader, stop: StopCondition) -> None:
        self.prompt, self.answer, self.reward, self.grader, self.stop = prompt, answer, reward, grader, stop

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return ModelInput.from_ints(self.prompt), self.stop

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        correct = self.grader.grade(action, self.answer)
        return StepResult(
            reward=self.reward,
            episode_done=True,
            next_observation=ModelInput.empty(),
            next_stop_condition=None,
            metrics={"correct": correct},
        )


class PreparedGroup(EnvGroupBuilder):
    def __init__(self, prompt: list[int], answer: str, rewards_G: Sequence[float], grader: Grader, stop: StopCondition) -> None:
        self.prompt, self.answer, self.rewards_G, self.grader, self.stop = prompt, answer, rewards_G, grader, stop

    async def make_envs(self) -> Sequence[Env]:
        return [PreparedEnv(self.prompt, self.answer, reward, self.grader, self.stop) for reward in self.rewards_G]


async def serve(channel: Channel, item: dict[str, Any], client: Any, model: str, rank: int) -> None:
    training_client = await client.create_lora_training_client(base_model=model, rank=rank, seed=0, train_unembed=False)
    grader = Grader(training_client.get_tokenizer())
    settings, size, meter = rollout.RolloutSettings(max_tokens=item["max_tokens"]), item["group_size"], Meter()
    stop: StopCondition = [] if item["fixed_length"] else None  # [] = nothing but max_tokens; None = the model's end of sequence
    sampling_client = await training_client.save_weights_and_get_sampling_client()
    channel.answer({"rest_mb": resident_mb()})
    for number, _ in enumerate(channel.commands()):
        grader.cpu_s = 0.0
        marks = [time.process_time()]
        meter.start()
        groups = [
            PreparedGroup(prompt, answer, item["rewards"][p * size : (p + 1) * size], grader, stop)
            for p, (prompt, answer) in enumerate(zip(item["prompts"], item["answers"], strict=True))
        ]
        groups_P = await rollout.run_groups(groups, sampling_client, settings, seed=("benchmark", number))
        marks.append(time.process_time())
        data_D = [datum for group in groups_P for datum in datums.group_to_datums(group, group_centred(group.rewards_G))]
        marks.append(time.process_time())
        trained = training_client.forward_backward(data_D, "importance_sampling")
        updated = training_client.optim_step(ADAM)
        output, _ = await trained, await updated
        marks.append(time.process_time())
        sampling_client = await training_client.save_weights_and_get_sampling_client()
        marks.append(time.process_time())
        diagnostics.summarise(groups_P, data_D, output, num_updates=number)
        measured = meter.stop()
        rollouts, _, train, sync = (after - before for before, after in pairwise(marks))
        parts = {"sampling": rollouts - grader.cpu_s, "reward": grader.cpu_s, "train": train, "sync": sync}
        parts["overhead"] = measured["cpu_s"] - sum(parts.values())
        sampled = sum(trajectory.num_sampled_tokens for group in groups_P for trajectory in group.trajectories_G)
        channel.answer(measured | {"parts": parts, "sampled_tokens": sampled, "sequences": len(data_D)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("item", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    args = parser.parse_args()

    channel = Channel()
    torch.set_num_threads(1)
    item = json.loads(args.item.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as root:
        config = RlConfig.model_validate(
            {
                "name": "end_to_end",
                "run_dir": root,
                "model": {"name": "model", "path": str(args.model)},
                "lora": {"rank": args.rank, "train_unembed": False},
                "engines": {"sampler": {"kind": "torch"}},
                "env": {"kind": "addition", "groups_per_step": len(item["prompts"]), "group_size": item["group_size"]},
            }
        )
        with open_service(config) as service:
            asyncio.run(serve(channel, item, service.client, "model", args.rank))


if __name__ == "__main__":
    main()
