#!/usr/bin/env python3
"""Whole RL steps of TRL's GRPOTrainer as a benchmark worker: `trl_step_worker.py MODEL ITEM --rank 16 --micro-batch 32`.

Runs in TRL's environment (scripts/setup_trl_venv.sh), without ptlab. TRL's own loop with its own transformers generation. The prompts
come as tokens, and the graded answers are paid the prepared rewards, so that every sequence has something to teach: as in
ptlab_step_worker.py. With fixed_length no answer ends before max_tokens.

    sampling   `_generate_single_turn`
    reward     `_calculate_rewards`
    overhead   the rest of preparing a batch: padding, advantages, metrics
    train      all else of the step: forward, backward, clipping, AdamW
    sync       0: it samples from the model that it trains
"""

# mypy: disable-error-code="import-not-found,misc"
# TRL is not in ptlab's environment, where mypy runs; its classes are Any there.

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.worker_process import Channel, Meter, resident_mb

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class SplitTrainer(GRPOTrainer):
    """GRPOTrainer that counts the CPU-seconds of its phases and reads its prompts as tokens."""

    prompts: list[list[int]]

    def __init__(self, **kwargs: Any) -> None:
        self.cpu_s: dict[str, float] = {}
        self.sampled_tokens = 0
        super().__init__(**kwargs)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = work()
        self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - begun
        return result

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return [self.prompts[int(prompt)] for prompt in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completions, logprobs = self.timed("sampling", lambda: super(SplitTrainer, self)._generate_single_turn(*args, **kwargs))
        self.sampled_tokens = sum(map(len, completions))
        return completions, logprobs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        return self.timed("reward", lambda: super(SplitTrainer, self)._calculate_rewards(*args, **kwargs))

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return self.timed("prepare", lambda: super(SplitTrainer, self)._prepare_inputs(*args, **kwargs))


class StepByStep(TrainerCallback):
    """Waits for a command before each optimizer step and answers after it, inside TRL's own loop."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.commands, self.meter = channel, channel.commands(), Meter()
        self.trainer: SplitTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if next(self.commands, None) is None:
            sys.exit(0)
        assert self.trainer is not None
        self.trainer.cpu_s = {}
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measured = self.meter.stop()
        assert self.trainer is not None
        spent = self.trainer.cpu_s
        parts = {"sampling": spent["sampling"], "reward": spent["reward"], "train": measured["cpu_s"] - spent["prepare"], "sync": 0.0}
        parts["overhead"] = spent["prepare"] - spent["sampling"] - spent["reward"]
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.channel.answer(measured | {"parts": parts, "sampled_tokens": self.trainer.sampled_tokens, "sequences": sequences})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("item", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True, help="sequences in one training forward pass")
    args = parser.parse_args()

    channel = Channel()
    torch.set_num_threads(1)
    item = json.loads(args.item.read_text(encoding="utf-8"))
    num_sequences, max_tokens = len(item["rewards"]), item["max_tokens"]
    config = GRPOConfig(
        output_dir=str(args.item.parent / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # its faster setting; the default is True
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=num_sequences // args.micro_batch,
        num_generations=item["group_size"],
        max_completion_length=max_tokens,
        generation_kwargs={"min_new_tokens": max_tokens} if item["fixed_length"] else None,
        beta=0.0,
        scale_rewards="none",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_steps=10**6,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        for prompt, completion in zip(prompts, completions, strict=True):
            found = BOXED.findall(completion)
            float(bool(found) and found[-1].strip() == item["answers"][int(prompt)])
        return list(item["rewards"])

    steps = StepByStep(channel)
    trainer = SplitTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [str(p) for p in range(len(item["prompts"]))]}),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        peft_config=LoraConfig(
            r=args.rank,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
        callbacks=[steps],
    )
    trainer.prompts, steps.trainer = item["prompts"], trainer
    channel.answer({"rest_mb": resident_mb()})
    trainer.train()


if __name__ == "__main__":
    main()
