from __future__ import annotations

import math
from typing import Any

import pytest

from ptlab.engines.protocols import BaseModelInfo, SampleCall
from ptlab.engines.sample_checks import check_call
from ptlab.errors import InvalidRequestError
from ptlab.types import EncodedTextChunk, ImageChunk, ModelInput, SamplingParams, TensorData

INFO = BaseModelInfo(name="tiny", arch="qwen3", vocab_size=512, max_context_length=256, dtype="float32")


def call(prompt: list[int] | None = None, n: int = 1, **rest: Any) -> SampleCall:
    params = {"max_tokens": 12, **{k: v for k, v in rest.items() if k in SamplingParams.model_fields}}
    others = {k: v for k, v in rest.items() if k not in SamplingParams.model_fields}
    tokens = [1, 2, 3, 4, 5, 6] if prompt is None else prompt
    return SampleCall(prompt=ModelInput.from_ints(tokens), num_samples=n, params=SamplingParams(**params), **others)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 512]}, "prompt token 1 is 512"),
        ({"prompt": [-1]}, "prompt token 0 is -1"),
        ({"n": 0}, "num_samples is 0"),
        ({"temperature": -0.1}, r"temperature is -0\.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 251}, r"^Prompt length plus max_tokens exceeds the model's context window: 6 \+ 251 > 256$"),
        ({"prompt": [5] * 256, "max_tokens": None}, r"context window: 256 \+ 1 > 256"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs is -1"),
        ({"topk_sample_logprobs": 513}, "topk_sample_logprobs is 513"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k is -1"),
        ({"prompt_logprobs_last_n": 2}, "set include_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True}, "last_n is 0"),
        ({"target_prompt_logprobs": TensorData([1, 2], dtype="int64", shape=[2, 1])}, r"\[5, K\]"),
        ({"target_prompt_logprobs": TensorData([1.0] * 5, dtype="float32", shape=[5, 1])}, "is float32"),
        ({"target_prompt_logprobs": TensorData([512] * 5, dtype="int64", shape=[5, 1])}, r"512 \.\. 512"),
        ({"target_prompt_logprobs": TensorData([-2] * 5, dtype="int64", shape=[5, 1])}, r"-2 \.\. -2"),
        ({"sequence_ids": ["a", "b"]}, "1 different ids"),
        ({"n": 2, "sequence_ids": ["a", "a"]}, "2 different ids"),
    ],
)
def test_requests_that_can_never_work_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        check_call(call(**bad), INFO)


def test_images_are_refused() -> None:
    prompt = ModelInput(chunks=[EncodedTextChunk(tokens=[5]), ImageChunk(data=b"x", format="png")])
    with pytest.raises(InvalidRequestError, match="chunk 1 is of type 'image'"):
        check_call(SampleCall(prompt=prompt, num_samples=1, params=SamplingParams(max_tokens=1)), INFO)


def test_what_a_valid_call_comes_down_to() -> None:
    two_chunks = ModelInput(chunks=[EncodedTextChunk(tokens=[5, 6]), EncodedTextChunk(tokens=[511])])
    checked = check_call(SampleCall(prompt=two_chunks, num_samples=1, params=SamplingParams()), INFO)
    assert (checked.tokens, checked.max_tokens) == ([5, 6, 511], 253)
    assert check_call(call(max_tokens=250, top_k=1, top_p=1.0, temperature=0.0), INFO).max_tokens == 250
