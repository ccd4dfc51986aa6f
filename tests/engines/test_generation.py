from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptlab.engines.base_model import load_base_model, load_tokenizer
from ptlab.engines.generation import Draw, generate, prefill
from ptlab.engines.stop import StopRule, StopTexts

NO_STOP = StopRule(frozenset(), ())


@pytest.fixture(scope="module")
def model(tiny_qwen3_dir: Path) -> Any:
    return load_base_model(str(tiny_qwen3_dir), device="cpu")[0]


@pytest.fixture(scope="module")
def texts(tiny_qwen3_dir: Path) -> StopTexts:
    return StopTexts(load_tokenizer(str(tiny_qwen3_dir)), 512)


def draw(prompt: int = 0, owner: int = 0, stream: int = 0, max_tokens: int = 6, stop: StopRule = NO_STOP) -> Draw:
    return Draw(prompt=prompt, owner=owner, seed=3, stream=stream, temperature=1.0, top_k=-1, top_p=1.0, max_tokens=max_tokens, stop=stop)


def test_chunked_reading_gives_the_logits_of_one_pass(model: Any) -> None:
    """Chunks narrower than the padding too: rows that are all padding must not poison the cache with NaN."""
    prompts = [[9], list(range(30, 53)), [4, 5, 6, 7]]
    with torch.inference_mode():
        whole = prefill(model, prompts, chunk_tokens=10_000)
        chunked = prefill(model, prompts, chunk_tokens=3 * 4)
        for row, prompt in enumerate(prompts):
            plain = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(whole.logits_PV[row], plain, atol=1e-4, rtol=0)
            torch.testing.assert_close(chunked.logits_PV[row], plain, atol=1e-4, rtol=0)


def test_prompt_logits_are_never_all_there_at_once(model: Any) -> None:
    prompts = [list(range(3, 103)), list(range(40, 90))]
    seen: list[tuple[int, torch.Tensor]] = []
    with torch.inference_mode():
        prefill(model, prompts, chunk_tokens=10_000, score=lambda logits, column: seen.append((column, logits)), score_elements=2 * 512 * 7)
        assert max(logits.shape[1] for _, logits in seen) == 7
        assert [column for column, _ in seen] == list(range(0, 100, 7))
        joined = torch.cat([logits for _, logits in seen], dim=1)
        torch.testing.assert_close(joined[0], model(input_ids=torch.tensor([prompts[0]])).logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(joined[1, 50:], model(input_ids=torch.tensor([prompts[1]])).logits[0], atol=1e-4, rtol=0)


def test_rows_that_end_leave_the_batch(model: Any, texts: StopTexts) -> None:
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    draws = [draw(stream=i, max_tokens=1 + i) for i in range(8)]
    drawn = generate(model, [[5, 6]], draws, stop_texts=texts, chunk_tokens=100)
    hook.remove()
    assert sizes == [1, 7, 6, 5, 4, 3, 2, 1]
    assert [len(d.tokens_T) for d in drawn if d is not None] == [1, 2, 3, 4, 5, 6, 7, 8]
    for i in (3, 7):  # and what stays is not disturbed by those who left
        (alone,) = generate(model, [[5, 6]], [draws[i]], stop_texts=texts, chunk_tokens=100)
        assert alone is not None and drawn[i] is not None
        np.testing.assert_array_equal(alone.tokens_T, drawn[i].tokens_T)


def test_long_answers_outgrow_every_block_and_buffer(tmp_path: Path, texts: StopTexts) -> None:
    """More than 256 tokens: the record doubles, uniforms are drawn in several blocks, the cache moves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=1024, initializer_range=0.3, **shape)).eval()
    drawn = generate(model, [[5, 6], [9]], [draw(0, max_tokens=600), draw(1, max_tokens=300)], stop_texts=texts, chunk_tokens=100)
    for prompt, length, one in zip([[5, 6], [9]], [600, 300], drawn, strict=True):
        assert one is not None and len(one.tokens_T) == length and not one.stopped
        full = [*prompt, *one.tokens_T.tolist()]
        with torch.no_grad():
            table = torch.log_softmax(model(input_ids=torch.tensor([full])).logits[0], -1)
        want = table[len(prompt) - 1 : -1].gather(1, torch.tensor(one.tokens_T.tolist())[:, None])[:, 0]
        np.testing.assert_allclose(one.logprobs_T, want.numpy(), atol=1e-4)
        assert len(set(one.tokens_T[:64].tolist()) ^ set(one.tokens_T[64:128].tolist())) > 10  # blocks of uniforms are not repeated


def test_abandoned_owners_get_nothing_and_cost_nothing(model: Any, texts: StopTexts) -> None:
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    draws = [draw(owner=i // 2, stream=i, max_tokens=30) for i in range(4)]
    drawn = generate(model, [[5]], draws, stop_texts=texts, chunk_tokens=100, abandoned=lambda: {0})
    hook.remove()
    assert [d is None for d in drawn] == [True, True, False, False]
    assert sizes[1:8] == [4] * 7 and set(sizes[8:]) == {2}


def test_different_stop_rules_in_one_batch(model: Any, texts: StopTexts) -> None:
    free = generate(model, [[5, 6]], [draw(max_tokens=40)], stop_texts=texts, chunk_tokens=100)[0]
    assert free is not None
    third = int(free.tokens_T[3])
    first_third = free.tokens_T.tolist().index(third)
    rules = [NO_STOP, StopRule(frozenset({third}), ()), StopRule(frozenset(), ("\ue000 never",))]
    ended, by_id, by_text = generate(model, [[5, 6]], [draw(max_tokens=40, stop=r) for r in rules], stop_texts=texts, chunk_tokens=100)
    assert ended is not None and by_id is not None and by_text is not None
    np.testing.assert_array_equal(ended.tokens_T, free.tokens_T)
    np.testing.assert_array_equal(by_text.tokens_T, free.tokens_T)
    np.testing.assert_array_equal(by_id.tokens_T, free.tokens_T[: first_third + 1])
    assert (ended.stopped, by_id.stopped, by_text.stopped) == (False, True, False)
