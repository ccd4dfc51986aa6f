#!/usr/bin/env python3
"""TRL's GRPOTrainer as a benchmark worker; runs in TRL's own environment (scripts/setup_trl_venv.sh), without ptlab.

    trl_worker.py MODEL ADAPTER SEQUENCES --dtype float32 --micro-batch 8 --old-logprobs recomputed

It is TRL's own training loop: `train()` runs, and a callback holds it before each optimizer step until a "step" is asked for. Only the
generation is replaced, by TRL's own `rollout_func`, which returns the prepared sequences with their sampling log-probabilities.

What makes the loss ptlab's plain sum of -exp(p - q) A: loss_type "dapo" with its normaliser (the number of tokens) set to 1, clipping
out of reach, beta 0, scale_rewards "none" (advantage = reward minus group mean).

--old-logprobs says where q comes in:
  recomputed   as TRL does when sampling log-probabilities exist (use_vllm, its default correction): one forward pass more for log p_old,
               ratio exp(p_old - q), truncated; the truncation is set out of reach.
  given        q is handed in as log p_old and the second pass is left out. TRL has no such setting; it does leave the pass out where it
               samples with transformers itself and then takes q = p. Its floor.
"""

# mypy: disable-error-code="import-not-found,misc"
# TRL is not in ptlab's environment, where mypy runs; its classes are Any there.

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.worker_process import Channel, Meter, resident_mb

OUT_OF_REACH = 1e9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PreparedTrainer(GRPOTrainer):
    """Trains on prepared sequences; keeps the losses of a step's micro-batches."""

    given_old_logprobs = False

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        output["num_items_in_batch"] = torch.ones_like(output["num_items_in_batch"])
        if self.given_old_logprobs:
            output["old_per_token_logps"] = output.pop("sampling_per_token_logps")
        self.losses: list[torch.Tensor] = []
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class NothingToSync:
    """Stands where vLLM would: the sequences are sampled already."""

    def sync_weights(self) -> None: ...


class StepByStep(TrainerCallback):
    """Waits for a command before each optimizer step and answers after it, inside TRL's own loop."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.commands, self.meter = channel, channel.commands(), Meter()
        self.trainer: PreparedTrainer | None = None
        self.grad_norm: float | None = None
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if next(self.commands, None) is None:
            sys.exit(0)
        self.meter.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.steps == 0:  # the first step is the warm-up, and the one that is compared
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(grads).item()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measured = self.meter.stop()
        assert self.trainer is not None
        losses = torch.stack(self.trainer.losses)
        self.channel.answer(measured | {"loss": losses.double().sum().item(), "grad_norm": self.grad_norm})
        self.steps, self.grad_norm = self.steps + 1, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--dtype", choices=list(DTYPES), required=True, help="bfloat16: TRL's bf16=True, autocast")
    parser.add_argument("--weights", choices=list(DTYPES), default=None, help="of the frozen model; default: as --dtype")
    parser.add_argument("--micro-batch", type=int, required=True, help="sequences in one forward pass")
    parser.add_argument("--old-logprobs", choices=["recomputed", "given"], default="recomputed")
    args = parser.parse_args()

    channel = Channel()
    torch.set_num_threads(1)
    sequences = json.loads(args.sequences.read_text(encoding="utf-8"))
    num_sequences = len(sequences["prompts"])
    weights = DTYPES[args.weights or args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=weights)
    model = PeftModel.from_pretrained(model, str(args.adapter), is_trainable=True)
    config = GRPOConfig(
        output_dir=str(args.sequences.parent / "trl"),
        use_cpu=True,
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,  # its faster setting; the default is True
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=num_sequences // args.micro_batch,
        num_generations=sequences["group_size"],
        max_completion_length=max(map(len, sequences["completions"])),
        loss_type="dapo",
        epsilon=OUT_OF_REACH,
        beta=0.0,
        scale_rewards="none",
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=OUT_OF_REACH,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-12,
        weight_decay=0.0,
        max_grad_norm=OUT_OF_REACH,  # the norm is computed, as ptlab does, and clips nothing
        max_steps=10**6,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        keys = {"prompt_ids": "prompts", "completion_ids": "completions", "logprobs": "sampling_logprobs"}
        return {name: sequences[key] for name, key in keys.items()}

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return list(sequences["rewards"])

    steps = StepByStep(channel)
    trainer = PreparedTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["."] * num_sequences}),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        rollout_func=rollout,
        callbacks=[steps],
    )
    steps.trainer = trainer
    if args.old_logprobs == "given":
        trainer.given_old_logprobs = True
    else:
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, NothingToSync(), -1
    channel.answer({"rest_mb": resident_mb()})
    trainer.train()


if __name__ == "__main__":
    main()
