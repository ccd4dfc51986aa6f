#!/usr/bin/env python3
"""What the model's own forward pass keeps: `forward_worker.py MODEL ADAPTER SEQUENCES --dtype float32`, plain transformers and PEFT.

Answers "step" with the size of the activations of one forward pass of the body (no output head) over the whole batch, with gradients on
and without recomputation: the memory blocks that autograd holds for the backward pass of these tokens, each counted once, weights left
out. The measure that a step's memory is held to. Counted, not read off the resident set: that differed by half from run to run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.worker_process import Channel, resident_mb
from ptlab.benchmarks.work_items import read_sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    args = parser.parse_args()

    channel = Channel()
    torch.set_num_threads(1)
    sequences = read_sequences(args.sequences)
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(sequences.prompts, sequences.completions, strict=True)]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).train()
    body = PeftModel.from_pretrained(model, str(args.adapter), is_trainable=True).get_base_model().model
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    channel.answer({"rest_mb": resident_mb()})
    for _ in channel.commands():
        held: dict[int, torch.UntypedStorage] = {}

        def hold(tensor: torch.Tensor, held: dict[int, torch.UntypedStorage] = held) -> torch.Tensor:
            block = tensor.untyped_storage()  # kept alive here, so that no address is used twice
            held[block.data_ptr()] = block
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            body(input_ids=ids_BL, use_cache=False)
        kept = sum(block.nbytes() for address, block in held.items() if address not in weights)
        channel.answer({"kept_mb": kept / 1e6, "tokens": ids_BL.numel()})


if __name__ == "__main__":
    main()
