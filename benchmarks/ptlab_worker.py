#!/usr/bin/env python3
"""ptlab's trainer as a benchmark worker: `ptlab_worker.py MODEL ADAPTER SEQUENCES --dtype float32`.

Answers "step" (forward_backward and optim_step on the whole batch) with CPU-seconds, peak memory, loss and gradient norm. It uses what
any client of the trainer may use, and none of its settings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.worker_process import Channel, Meter, resident_mb
from ptlab.benchmarks.work_items import LORA_RANK, read_sequences
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.losses import resolve_loss
from ptlab.types import AdamParams, LoraConfig

ADAM = AdamParams(learning_rate=1e-5, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    args = parser.parse_args()

    channel, meter = Channel(), Meter()
    torch.set_num_threads(1)
    data, loss = read_sequences(args.sequences).datums(), resolve_loss("importance_sampling")
    trainer = PeftTrainer(str(args.model), name="model", dtype=args.dtype, device="cpu")
    trainer.create_adapter("adapter", LoraConfig(rank=LORA_RANK, seed=0, train_unembed=False))
    trainer.load_state("adapter", args.adapter, with_optimizer=False)
    channel.answer({"rest_mb": resident_mb()})
    for _ in channel.commands():
        meter.start()
        output = trainer.forward_backward("adapter", data, loss)
        metrics = trainer.optim_step("adapter", ADAM).metrics
        measured = meter.stop()
        assert metrics is not None
        channel.answer(measured | {"loss": output.metrics["loss:sum"], "grad_norm": metrics["grad_norm:mean"]})


if __name__ == "__main__":
    main()
