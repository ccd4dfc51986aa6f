"""Reinforcement learning in five steps against the three clients: sample, grade, centre, train, sync.

    python examples/rl_loop.py            # three-digit addition on the CPU, with the model that ptlab makes itself

This is ptlab/recipes/rl.py without configuration, evaluation, checkpoints and logging. Nothing here knows what is behind the clients.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a checkout that was not installed, too

import ptlab as tinker
from ptlab import types
from ptlab.envs.addition import training_problem
from ptlab.model_info import get_recommended_renderer_name
from ptlab.renderers import get_renderer, text_of
from ptlab.rewards.math_answer import math_reward


def datum(prompt: types.ModelInput, sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """Everything shifted by one: position i holds what belongs to the token after model_input[i]."""
    tokens = prompt.to_ints() + sequence.tokens
    before = prompt.length - 1  # positions that predict the prompt itself
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + sequence.logprobs,
            "advantages": [0.0] * before + [advantage] * len(sequence.tokens),
        },
    )


def main(model: str, steps: int, groups_per_step: int, group_size: int, learning_rate: float) -> list[float]:
    """Train; returns the mean reward of each step."""
    service_client = tinker.ServiceClient()
    training_client = service_client.create_lora_training_client(base_model=model, rank=16, seed=0, train_unembed=False)
    renderer = get_renderer(get_recommended_renderer_name(model), training_client.get_tokenizer())
    history: list[float] = []

    for step in range(steps):
        # 1. the current weights, ready to sample from
        sampling_client = training_client.save_weights_and_get_sampling_client()

        # 2. all problems at once, group_size answers each
        problems = [training_problem(0, step, index) for index in range(groups_per_step)]
        prompts = [renderer.build_generation_prompt([{"role": "user", "content": question}]) for question, _ in problems]
        answers = [
            sampling_client.sample(
                prompt=prompt,
                num_samples=group_size,
                sampling_params=types.SamplingParams(max_tokens=64, seed=1000 * step + index, stop=renderer.get_stop_sequences()),
            )
            for index, prompt in enumerate(prompts)
        ]

        # 3. reward 1.0 for the right number in \boxed{}; advantage = reward - mean reward of the group
        data: list[types.Datum] = []
        rewards: list[float] = []
        for (_, truth), prompt, answer in zip(problems, prompts, answers, strict=True):
            sequences = answer.result().sequences
            replies = [text_of(renderer.parse_response(sequence.tokens)[0]) for sequence in sequences]
            group = [math_reward(reply, truth).correct for reply in replies]
            rewards += group
            if len(set(group)) > 1:  # a group that agrees teaches nothing
                data += [datum(prompt, sequence, reward - fmean(group)) for sequence, reward in zip(sequences, group, strict=True)]
        history.append(fmean(rewards))
        print(f"step {step + 1}/{steps}  reward {history[-1]:.3f}  {len(data)} datums", flush=True)
        if not data:
            continue

        # 4. gradient and update: both queued before either is awaited
        trained = training_client.forward_backward(data, loss_fn="importance_sampling")
        updated = training_client.optim_step(types.AdamParams(learning_rate=learning_rate))
        trained.result(), updated.result()

    # 5. keep the result
    print("saved", training_client.save_weights_for_sampler("final").result().path)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ptlab/quickstart")
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    main(args.model, args.steps, groups_per_step=16, group_size=8, learning_rate=1e-3)
