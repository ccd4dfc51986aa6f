"""The prompt of a reward model in real chat formats, and its score through a sampler whose probabilities are known."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ptlab.errors import InvalidRequestError
from ptlab.renderers import get_renderer
from ptlab.rl.verdict import NO, QUESTION, YES, RewardModel, VerdictPrompt, score_of, scores_of

QWEN = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "qwen3"
CONVERSATION = [{"role": "user", "content": "What is 2+2?"}]
REPLY = {"role": "assistant", "content": "It is 4."}


@pytest.fixture(scope="module")
def chatml(tiny_qwen3_dir):
    return get_renderer("chatml", AutoTokenizer.from_pretrained(tiny_qwen3_dir))


@pytest.fixture(scope="module")
def qwen_tokenizer():
    if not QWEN.exists():
        pytest.skip("../shared/data/tokenizers/qwen3 is not here")
    return AutoTokenizer.from_pretrained(QWEN)


def test_the_prompt_is_the_conversation_the_reply_and_the_question(chatml):
    prompt = VerdictPrompt(chatml)
    text = chatml.tokenizer.decode(prompt.tokens(CONVERSATION, REPLY))
    turns = [("user", "What is 2+2?"), ("assistant", "It is 4."), ("user", QUESTION)]
    wanted = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"
    assert text == wanted
    assert prompt.yes != prompt.no
    assert YES.startswith(chatml.tokenizer.decode([prompt.yes])) and NO.startswith(chatml.tokenizer.decode([prompt.no]))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_disable_thinking", "qwen3_instruct", "chat_template", "role_colon"])
def test_the_verdicts_are_yes_and_no_in_every_format(qwen_tokenizer, name):
    prompt = VerdictPrompt(get_renderer(name, qwen_tokenizer))
    assert (qwen_tokenizer.decode([prompt.yes]).strip(), qwen_tokenizer.decode([prompt.no]).strip()) == ("Yes", "No")
    text = qwen_tokenizer.decode(prompt.tokens(CONVERSATION, REPLY))
    assert "It is 4." in text and QUESTION in text and "Yes" not in text.split(QUESTION)[1]


def test_a_reply_with_thinking_is_judged_by_its_text(chatml):
    prompt = VerdictPrompt(chatml)
    assert prompt.tokens(CONVERSATION, {**REPLY, "thinking": "hm"}) == prompt.tokens(CONVERSATION, REPLY)


def test_a_renderer_that_cannot_tell_the_verdicts_apart_is_refused(chatml, monkeypatch):
    monkeypatch.setattr("ptlab.rl.verdict.NO", YES)
    with pytest.raises(InvalidRequestError, match="same first token"):
        VerdictPrompt(chatml)


def test_the_datum_asks_for_both_verdicts_in_its_last_row(chatml):
    prompt = VerdictPrompt(chatml)
    datum = prompt.datum(CONVERSATION, REPLY)
    tokens = prompt.tokens(CONVERSATION, REPLY)
    assert datum.model_input.to_ints() == tokens
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    assert targets.shape == (len(tokens), 2) and targets[-1].tolist() == [prompt.yes, prompt.no]


def test_the_score_is_the_difference_and_only_the_last_row_learns():
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    score = score_of(logprobs)
    score.backward()
    assert score.item() == -2.5
    assert logprobs.grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]
    assert scores_of([logprobs, torch.zeros(4, 2)]).tolist() == [-2.5, 0.0]
    with pytest.raises(InvalidRequestError, match="shape"):
        score_of(torch.zeros(3))


class KnownSampler:
    """log p of the last token: -1 for Yes, -1 - the number of 4s in the prompt for No."""

    def __init__(self, prompt: VerdictPrompt) -> None:
        self.prompt = prompt
        self.asked: list[list[int]] = []

    def compute_logprobs(self, prompt):
        async def answer():
            tokens = prompt.to_ints()
            self.asked.append(tokens)
            value = -1.0 if tokens[-1] == self.prompt.yes else -1.0 - self.prompt.renderer.tokenizer.decode(tokens).count("4")
            return [None, *[0.0] * (len(tokens) - 2), value]

        return answer()


def test_reward_model_scores_and_compares(chatml):
    prompt = VerdictPrompt(chatml)
    sampler = KnownSampler(prompt)
    model = RewardModel(sampler, chatml)
    replies = [{"role": "assistant", "content": text} for text in ("4 4", "4", "x")]

    async def main():
        return [await model.score(CONVERSATION, reply) for reply in replies], await model.win_matrix(CONVERSATION, replies)

    scores, matrix = asyncio.run(main())
    assert scores == [2.0, 1.0, 0.0]
    assert {tokens[-1] for tokens in sampler.asked} == {prompt.yes, prompt.no}
    assert sampler.asked[0][:-1] == prompt.tokens(CONVERSATION, replies[0])
    assert matrix[0][2] == pytest.approx(1 / (1 + math.exp(-2)))
    assert all(matrix[i][j] + matrix[j][i] == pytest.approx(1.0) for i in range(3) for j in range(3))
