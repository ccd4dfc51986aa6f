"""What every Sampler promises. A new engine joins by one line in FACTORIES."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ptlab.engines.base_model import load_tokenizer
from ptlab.engines.protocols import AdapterRef, SampleCall, Sampler
from ptlab.engines.torch_sampler import TorchSampler
from ptlab.errors import EngineError, InvalidRequestError, NotServedError, PtlabError
from ptlab.types import ModelInput, SampleResponse, SamplingParams, TensorData


def vllm_sampler(path: Path) -> Sampler:
    pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, vllm)", exc_type=ImportError)
    from ptlab.engines.vllm_sampler import VllmSampler

    return VllmSampler(str(path), name="tiny")


FACTORIES: dict[str, Callable[[Path], Sampler]] = {
    "torch": lambda path: TorchSampler(str(path), name="tiny", device="cpu"),
    "vllm": vllm_sampler,
}
NATS = 1e-4  # float32: two orders of summation over 64 to 512 terms; measured gaps are about 1e-6
PROMPT = [40, 17, 300, 8, 99, 12]
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(f"tiny_{request.param}_dir")
    return directory


@pytest.fixture(scope="module", params=list(FACTORIES))
def sampler(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Sampler]:
    made = FACTORIES[request.param](model_dir)
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory, write_adapter: Callable[..., Path]) -> list[AdapterRef]:
    """Two adapters with different targets, ranks and weights; the second on the output head as well."""
    root = tmp_path_factory.mktemp("adapters")
    first = write_adapter(model_dir, root / "first", targets=["q_proj", "v_proj", "down_proj"], seed=1)
    second = write_adapter(model_dir, root / "second", targets=ALL_TARGETS, rank=8, seed=2)
    return [
        AdapterRef(name=f"{root.name}.first", version=3, path=first),
        AdapterRef(name=f"{root.name}/second", version=7, path=second),
    ]


def call(prompt: list[int] = PROMPT, n: int = 1, adapter: AdapterRef | None = None, **rest: Any) -> SampleCall:
    """Fields of SamplingParams and of SampleCall together; 12 tokens and no stop unless told."""
    params = {"max_tokens": 12, "seed": 1, "stop": [], **{k: v for k, v in rest.items() if k in SamplingParams.model_fields}}
    others = {k: v for k, v in rest.items() if k not in SamplingParams.model_fields}
    return SampleCall(prompt=ModelInput.from_ints(prompt), num_samples=n, params=SamplingParams(**params), adapter=adapter, **others)


def run(sampler: Sampler, *calls: SampleCall) -> list[SampleResponse]:
    async def gather() -> list[SampleResponse]:
        return list(await asyncio.gather(*(sampler.sample(c) for c in calls)))

    try:
        return asyncio.run(gather())
    except NotServedError as err:  # said, not answered wrongly: all a sampler may do
        pytest.skip(str(err))


class Reference:
    """Plain transformers and PEFT: one sequence, no cache, no padding."""

    def __init__(self, model_dir: Path, adapter: Path | None = None) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        if adapter is not None:
            config = peft.LoraConfig.from_pretrained(str(adapter))
            with warnings.catch_warnings():  # of a head tied to the embeddings, which nobody merges here
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                model = peft.inject_adapter_in_model(config, model, adapter_name="default")
            loaded = peft.set_peft_model_state_dict(model, strip(load_file(adapter / "adapter_model.safetensors")), adapter_name="default")
            assert not loaded.unexpected_keys
        self._model = model

    def logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self._model(input_ids=torch.tensor([tokens])).logits[0]

    def logprobs(self, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
        """[len(tokens), vocabulary]; row i is about position i + 1."""
        return torch.log_softmax(self.logits(tokens) / temperature, dim=-1)


def strip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def expected(reference: Reference, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    table = reference.logprobs(prompt + tokens, temperature)[len(prompt) - 1 : -1]
    return table.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def load(sampler: Sampler, *refs: AdapterRef) -> list[frozenset[str]]:
    async def gather() -> list[frozenset[str]]:
        return [await sampler.load_adapter(ref) for ref in refs]

    return asyncio.run(gather())


# -- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_agree_with_a_plain_forward_pass(sampler: Sampler, model_dir: Path, temperature: float) -> None:
    reference = Reference(model_dir)
    prompts = [[5], PROMPT, list(range(30, 70)), [7, 7, 7]]  # lengths 1, 6, 40, 3: padded together
    responses = run(sampler, *(call(prompt, n=3, seed=i, temperature=temperature) for i, prompt in enumerate(prompts)))
    for prompt, response in zip(prompts, responses, strict=True):
        for sequence in response.sequences:
            assert len(sequence.tokens) == 12
            np.testing.assert_allclose(sequence.logprobs, expected(reference, prompt, sequence.tokens, temperature), atol=NATS)
            assert sequence.policy_version == 0


def test_each_adapter_of_a_mixed_burst_agrees_with_peft(sampler: Sampler, model_dir: Path, adapters: list[AdapterRef]) -> None:
    load(sampler, *adapters)
    choices = [None, adapters[0], adapters[1], adapters[0], None]
    responses = run(sampler, *(call([50 + i, *PROMPT[: i + 1]], n=2, seed=i, adapter=a) for i, a in enumerate(choices)))
    base = Reference(model_dir)
    for i, (adapter, response) in enumerate(zip(choices, responses, strict=True)):
        reference = Reference(model_dir, None if adapter is None else adapter.path)
        for sequence in response.sequences:
            prompt = [50 + i, *PROMPT[: i + 1]]
            np.testing.assert_allclose(sequence.logprobs, expected(reference, prompt, sequence.tokens), atol=NATS)
            assert sequence.policy_version == (0 if adapter is None else adapter.version)
            if adapter is not None:  # and the test could tell
                assert np.abs(np.array(sequence.logprobs) - expected(base, prompt, sequence.tokens)).max() > 0.05


def test_prompt_scores_agree_with_a_plain_forward_pass(sampler: Sampler, model_dir: Path, adapters: list[AdapterRef]) -> None:
    load(sampler, *adapters)
    long = list(range(20, 100))
    calls = [
        call(max_tokens=1, adapter=adapters[1], include_prompt_logprobs=True, topk_prompt_logprobs=3),
        call(long, max_tokens=1, adapter=adapters[1], temperature=0.5, include_prompt_logprobs=True),
    ]
    first, second = run(sampler, *calls)
    reference = Reference(model_dir, adapters[1].path)
    for prompt, response in ((PROMPT, first), (long, second)):
        assert response.prompt_logprobs is not None
        assert response.prompt_logprobs[0] is None
        at_temperature_one = expected(reference, prompt[:1], prompt[1:])
        np.testing.assert_allclose(response.prompt_logprobs[1:], at_temperature_one, atol=NATS)
    table = reference.logprobs(PROMPT)
    assert first.topk_prompt_logprobs is not None
    assert first.topk_prompt_logprobs[0] is None
    best = table.topk(3, dim=-1)
    for i, row in enumerate(first.topk_prompt_logprobs[1:]):
        assert row is not None
        assert [token for token, _ in row] == best.indices[i].tolist()
        np.testing.assert_allclose([logprob for _, logprob in row], best.values[i], atol=NATS)
    assert (second.topk_prompt_logprobs, second.target_prompt_logprobs, second.prompt_alt_tokens) == (None, None, None)


def test_targets_are_scored_at_each_prompt_position(sampler: Sampler, model_dir: Path, adapters: list[AdapterRef]) -> None:
    load(sampler, *adapters)
    targets = np.full((len(PROMPT) - 1, 2), -1, dtype=np.int64)
    targets[0], targets[3, 1] = [4, 9], 511
    (response,) = run(sampler, call(max_tokens=1, adapter=adapters[1], target_prompt_logprobs=TensorData.from_numpy(targets)))
    scored = response.target_prompt_logprobs
    assert scored is not None
    table = Reference(model_dir, adapters[1].path).logprobs(PROMPT)
    want = np.zeros((len(PROMPT) - 1, 2))
    want[0], want[3, 1] = table[0, [4, 9]], table[3, 511]
    assert scored.shape == [len(PROMPT) - 1, 2]
    np.testing.assert_allclose(scored.to_numpy(), want, atol=NATS)


def test_sparse_targets_come_back_in_their_layout(sampler: Sampler, model_dir: Path) -> None:
    rows = len(PROMPT) - 1
    sparse = TensorData([7, 8], dtype="int64", shape=[rows, 6], sparse_crow_indices=[0, 0, 1, 1, 1, 2], sparse_col_indices=[4, 1])
    (response,) = run(sampler, call(max_tokens=1, target_prompt_logprobs=sparse))
    scored = response.target_prompt_logprobs
    assert scored is not None
    assert (scored.shape, scored.sparse_crow_indices, scored.sparse_col_indices) == (sparse.shape, [0, 0, 1, 1, 1, 2], [4, 1])
    table = Reference(model_dir).logprobs(PROMPT)
    np.testing.assert_allclose(scored.data, [table[1, 7], table[4, 8]], atol=NATS)


def test_last_n_scores_only_the_end_of_the_prompt(sampler: Sampler) -> None:
    part, whole = run(
        sampler,
        call(max_tokens=1, include_prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=2),
        call(max_tokens=1, include_prompt_logprobs=True),
    )
    assert part.prompt_logprobs is not None and whole.prompt_logprobs is not None and part.topk_prompt_logprobs is not None
    assert part.prompt_logprobs[:4] == [None] * 4
    np.testing.assert_allclose(part.prompt_logprobs[4:], whole.prompt_logprobs[4:], atol=NATS)
    assert [row is None for row in part.topk_prompt_logprobs] == [True] * 4 + [False] * 2


def test_alternatives_are_draws_from_each_prompt_position(sampler: Sampler, model_dir: Path) -> None:
    (response,) = run(sampler, call(max_tokens=1, temperature=0.5, prompt_alt_tokens_k=200))
    alternatives = response.prompt_alt_tokens
    assert alternatives is not None
    tokens, logprobs = alternatives.tokens.to_numpy(), alternatives.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (len(PROMPT) - 1, 200)
    table = Reference(model_dir).logprobs(PROMPT, temperature=0.5)[:-1]
    np.testing.assert_allclose(logprobs, table.gather(1, torch.from_numpy(tokens)).numpy(), atol=NATS)
    entropy = -(table.exp() * table).sum(-1).numpy()
    assert np.abs(-logprobs.mean(axis=1) - entropy).max() < 0.5  # the mean surprise of draws is the entropy; its error is about 0.1


def test_topk_of_sampled_positions(sampler: Sampler, model_dir: Path) -> None:
    (response,) = run(sampler, call(n=2, topk_sample_logprobs=3))
    reference = Reference(model_dir)
    for sequence in response.sequences:
        assert sequence.topk_logprobs is not None and len(sequence.topk_logprobs) == len(sequence.tokens)
        best = reference.logprobs(PROMPT + sequence.tokens)[len(PROMPT) - 1 : -1].topk(3, dim=-1)
        for i, row in enumerate(sequence.topk_logprobs):
            assert row is not None and [token for token, _ in row] == best.indices[i].tolist()


# -- which tokens


def test_temperature_zero_takes_the_best_token_and_reports_temperature_one(sampler: Sampler, model_dir: Path) -> None:
    (response,) = run(sampler, call(n=2, temperature=0.0, top_k=5, top_p=0.5))
    reference = Reference(model_dir)
    first, second = response.sequences
    assert first.tokens == second.tokens
    table = reference.logprobs(PROMPT + first.tokens)[len(PROMPT) - 1 : -1]
    assert first.tokens == table.argmax(-1).tolist()
    np.testing.assert_allclose(first.logprobs, table.max(-1).values, atol=NATS)


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.4}, {"top_k": 4, "top_p": 0.7, "temperature": 1.5}])
def test_top_k_and_top_p_cut_and_renormalise(sampler: Sampler, model_dir: Path, cut: dict[str, Any]) -> None:
    plain, response = run(sampler, call(n=1), call(n=40, max_tokens=1, **cut))  # a row without cuts beside them
    probs = Reference(model_dir).logprobs(PROMPT, cut.get("temperature", 1.0))[-1].double().exp()
    order = probs.argsort(descending=True).tolist()[: cut.get("top_k", 512)]
    total = sum(float(probs[t]) for t in order)
    allowed: dict[int, float] = {}
    for token in order:
        if sum(allowed.values()) >= cut.get("top_p", 1.0):
            break
        allowed[token] = float(probs[token]) / total
    kept = sum(allowed.values())
    seen = {sequence.tokens[0]: (sequence.logprobs or [math.nan])[0] for sequence in response.sequences}
    assert set(seen) <= set(allowed)
    assert len(seen) > 1
    for token, logprob in seen.items():
        assert logprob == pytest.approx(math.log(allowed[token] / kept), abs=NATS)
    np.testing.assert_allclose(plain.sequences[0].logprobs, expected(Reference(model_dir), PROMPT, plain.sequences[0].tokens), atol=NATS)


def test_draws_follow_the_distribution(sampler: Sampler, model_dir: Path) -> None:
    (response,) = run(sampler, call(n=1500, max_tokens=1, temperature=0.8, seed=3))
    probs = Reference(model_dir).logprobs(PROMPT, 0.8)[-1].exp().double().numpy()
    counts = np.bincount([s.tokens[0] for s in response.sequences], minlength=512)
    common = probs > 0.02
    chi = (counts - 1500 * probs)[common] / np.sqrt(1500 * probs * (1 - probs))[common]
    assert np.abs(chi).max() < 4.5, chi
    assert abs(counts[~common].sum() - 1500 * probs[~common].sum()) < 4.5 * math.sqrt(1500 * 0.25)


def test_a_seed_gives_the_same_draws_whatever_else_is_in_the_batch(sampler: Sampler) -> None:
    (alone,) = run(sampler, call(n=3, seed=11))
    crowd = run(sampler, *(call([9, 9, *range(100, 130 + i)], n=2, seed=i, temperature=0.7) for i in range(5)), call(n=3, seed=11))[-1]
    other, big = run(sampler, call(n=3, seed=12), call(n=3, seed=11 + 2**63))
    tokens = [sequence.tokens for sequence in alone.sequences]
    assert len({tuple(t) for t in tokens}) == 3, "samples of one seed must differ"
    assert [sequence.tokens for sequence in crowd.sequences] == tokens
    assert [sequence.tokens for sequence in other.sequences] != tokens
    assert [sequence.tokens for sequence in big.sequences] == tokens  # folded to 63 bits


def test_without_a_seed_requests_differ(sampler: Sampler) -> None:
    first, second = run(sampler, call(seed=None), call(seed=None))
    assert first.sequences[0].tokens != second.sequences[0].tokens


# -- where it ends


def test_eos_ends_a_draw_and_stays_once_with_its_logprob(sampler: Sampler) -> None:
    (free,) = run(sampler, call(n=40, max_tokens=100, stop=[], temperature=2.0))
    (stopped,) = run(sampler, call(n=40, max_tokens=100, stop=None, temperature=2.0))
    ended = 0
    for long, short in zip(free.sequences, stopped.sequences, strict=True):
        assert (long.stop_reason, len(long.tokens)) == ("length", 100)
        hits = [i for i, token in enumerate(long.tokens) if token in (0, 2)]  # tokenizer's and generation config's
        assert short.tokens == (long.tokens[: hits[0] + 1] if hits else long.tokens)
        assert short.stop_reason == ("stop" if hits else "length")
        assert short.logprobs is not None and len(short.logprobs) == len(short.tokens)
        ended += bool(hits)
    assert 3 < ended < 40, "the test needs draws of both kinds"


def test_stop_ids_and_texts_end_at_their_first_occurrence(sampler: Sampler, model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    (free,) = run(sampler, call(n=30, max_tokens=80, stop=[]))
    text = "e"
    stop_id = free.sequences[0].tokens[5]
    by_id, by_text, by_list = run(
        sampler,
        call(n=30, max_tokens=80, stop=[stop_id]),
        call(n=30, max_tokens=80, stop=text),
        call(n=30, max_tokens=80, stop=[text, "nowhere"]),
    )
    assert by_id.sequences[0].tokens[-1] == stop_id
    assert len(by_id.sequences[0].tokens) <= 6
    ended = 0
    for long, short, same in zip(free.sequences, by_text.sequences, by_list.sequences, strict=True):
        end = next((i for i, t in enumerate(long.tokens) if t in (0, 2) or text in tokenizer.decode(long.tokens[: i + 1])), 79)
        assert short.tokens == same.tokens == long.tokens[: end + 1]
        assert len(short.logprobs or []) == end + 1
        ended += end < 79
    assert ended > 10


def test_the_last_token_may_stop_and_one_token_is_enough(sampler: Sampler) -> None:
    (first,) = run(sampler, call(max_tokens=1))
    (token,) = first.sequences[0].tokens
    (again,) = run(sampler, call(max_tokens=1, stop=[token]))
    assert (first.sequences[0].stop_reason, again.sequences[0].stop_reason) == ("length", "stop")
    assert again.sequences[0].tokens == [token]


def test_no_max_tokens_means_all_the_context_holds(sampler: Sampler) -> None:
    prompt = [i % 500 + 3 for i in range(sampler.info.max_context_length - 5)]
    (response,) = run(sampler, call(prompt, max_tokens=None))
    assert len(response.sequences[0].tokens) == 5


def test_sequence_ids_are_kept_in_order_or_made(sampler: Sampler) -> None:
    named, unnamed = run(sampler, call(n=3, sequence_ids=["a", "b", "c"]), call(n=3))
    assert [s.sequence_id for s in named.sequences] == ["a", "b", "c"]
    assert len({s.sequence_id for s in unnamed.sequences}) == 3


# -- adapters


def test_load_returns_the_names_in_the_file(sampler: Sampler, adapters: list[AdapterRef]) -> None:
    for names, adapter in zip(load(sampler, *adapters), adapters, strict=True):
        assert names == set(load_file(adapter.path / "adapter_model.safetensors"))


def test_an_adapter_that_is_not_loaded_is_refused(sampler: Sampler, adapters: list[AdapterRef]) -> None:
    load(sampler, adapters[0])
    never = AdapterRef(name="never", version=1, path=adapters[0].path)
    newer = AdapterRef(name=adapters[0].name, version=adapters[0].version + 1, path=adapters[0].path)
    for ref in (never, newer):
        with pytest.raises(EngineError, match="not loaded"):
            run(sampler, call(adapter=ref))


def test_unload_waits_for_requests_in_flight_then_refuses(sampler: Sampler, adapters: list[AdapterRef]) -> None:
    async def scenario() -> None:
        await sampler.load_adapter(adapters[0])
        running = asyncio.create_task(sampler.sample(call(n=4, max_tokens=100, adapter=adapters[0])))
        await asyncio.sleep(0)
        await sampler.unload_adapter(adapters[0])
        assert running.done()
        assert len((await running).sequences[3].tokens) == 100
        with pytest.raises(EngineError, match="not loaded"):
            await sampler.sample(call(adapter=adapters[0]))
        await sampler.unload_adapter(adapters[0])  # again: nothing to do
        await sampler.load_adapter(adapters[0])
        await sampler.sample(call(adapter=adapters[0]))

    asyncio.run(scenario())


def test_a_broken_adapter_directory_is_refused_and_leaves_nothing(sampler: Sampler, adapters: list[AdapterRef], tmp_path: Path) -> None:
    empty = AdapterRef(name="empty", version=0, path=tmp_path)
    with pytest.raises(PtlabError):
        load(sampler, empty)
    with pytest.raises(EngineError, match="not loaded"):
        run(sampler, call(adapter=empty))
    load(sampler, *adapters)


# -- refusals and cancellation


def test_a_refused_request_does_not_touch_its_neighbours(sampler: Sampler) -> None:
    async def scenario() -> list[SampleResponse | BaseException]:
        return await asyncio.gather(sampler.sample(call(seed=5)), sampler.sample(call(prompt=[])), return_exceptions=True)

    good, bad = asyncio.run(scenario())
    assert isinstance(bad, InvalidRequestError)
    assert isinstance(good, SampleResponse)


def test_a_cancelled_request_leaves_and_the_others_are_not_disturbed(sampler: Sampler) -> None:
    async def scenario() -> SampleResponse:
        doomed = asyncio.create_task(sampler.sample(call(n=4, max_tokens=200, seed=1)))
        kept = asyncio.create_task(sampler.sample(call(n=2, max_tokens=100, seed=2)))
        await asyncio.sleep(0.05)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await kept

    (alone,) = run(sampler, call(n=2, max_tokens=100, seed=2))
    assert [s.tokens for s in asyncio.run(scenario()).sequences] == [s.tokens for s in alone.sequences]


@pytest.mark.parametrize("factory", list(FACTORIES))
def test_after_close_nothing_hangs(factory: str, tiny_qwen3_dir: Path) -> None:
    made = FACTORIES[factory](tiny_qwen3_dir)

    async def scenario() -> None:
        running = [asyncio.create_task(made.sample(call(n=8, max_tokens=240, seed=i))) for i in range(3)]
        await asyncio.sleep(0.05)
        await made.close()
        results = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(result, SampleResponse | EngineError) for result in results)
        with pytest.raises(EngineError, match="closed"):
            await made.sample(call())
        await made.close()

    asyncio.run(scenario())
