"""What the vLLM sampler promises beyond the contract of every sampler: versions side by side, the read-back, and life after a failure."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, vllm)", exc_type=ImportError)

from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.vllm_sampler import VllmSampler, cpu_kv_cache, draw_seed, lora_rank_limit, lora_slots
from ptlab.errors import CheckpointError, ConfigError, EngineError, EngineLostError, InvalidRequestError, NotServedError
from ptlab.types import ModelInput, SampleResponse, SamplingParams, TensorData

NATS = 1e-4  # float32; the largest gap measured here is 1e-5
PROMPT = [40, 17, 300, 8, 99, 12]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = [(8, False), (32, False), (8, True), (32, True), (4, False)]  # rank, with lm_head


@pytest.fixture(scope="module", params=["qwen3", "llama"])  # tied and untied embeddings
def model_dir(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(f"tiny_{request.param}_dir")
    return directory


@pytest.fixture(scope="module")
def sampler(model_dir: Path) -> Iterator[VllmSampler]:
    """Fewer slots and cached adapters than the tests have versions, so that they are evicted and read again."""
    made = VllmSampler(str(model_dir), name="tiny", max_loras=2, max_cpu_loras=3)
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def versions(model_dir: Path, tmp_path_factory: pytest.TempPathFactory, write_adapter: Callable[..., Path]) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("versions")
    return [
        AdapterRef(
            name=f"{root.name}/v{i}",
            version=i,
            path=write_adapter(model_dir, root / f"v{i}", targets=[*LINEAR, "lm_head"] if head else LINEAR[i:], rank=rank, seed=i),
        )
        for i, (rank, head) in enumerate(KINDS)
    ]


def call(prompt: list[int] = PROMPT, n: int = 1, adapter: AdapterRef | None = None, **rest: Any) -> SampleCall:
    params = {"max_tokens": 12, "seed": 1, "stop": [], **{k: v for k, v in rest.items() if k in SamplingParams.model_fields}}
    others = {k: v for k, v in rest.items() if k not in SamplingParams.model_fields}
    return SampleCall(prompt=ModelInput.from_ints(prompt), num_samples=n, params=SamplingParams(**params), adapter=adapter, **others)


def run(sampler: VllmSampler, *calls: SampleCall) -> list[SampleResponse]:
    async def gather() -> list[SampleResponse]:
        return list(await asyncio.gather(*(sampler.sample(c) for c in calls)))

    return asyncio.run(gather())


def load(sampler: VllmSampler, *refs: AdapterRef) -> list[frozenset[str]]:
    async def gather() -> list[frozenset[str]]:
        return [await sampler.load_adapter(ref) for ref in refs]

    return asyncio.run(gather())


def tokens(responses: list[SampleResponse]) -> list[list[list[int]]]:
    return [[sequence.tokens for sequence in response.sequences] for response in responses]


def peft_logprobs(model_dir: Path, adapter: AdapterRef | None, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Log-probability of each token after the first, by plain transformers and PEFT on the files as they are."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is not None:
        with warnings.catch_warnings():  # of a head tied to the embeddings, which nobody merges here
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            model = peft.PeftModel.from_pretrained(model, str(adapter.path))
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0], dim=-1)[:-1]
    return table.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def worker(sampler: VllmSampler) -> Any:
    """The worker of an engine in this process."""
    return sampler._engine._engine.engine_core.engine_core.model_executor.driver_worker.worker


# -- numbers


def test_five_adapters_and_the_base_in_one_batch_agree_with_peft(
    model_dir: Path, versions: list[AdapterRef], capsys: pytest.CaptureFixture[str]
) -> None:
    wide = VllmSampler(str(model_dir), max_loras=5)  # all in one batch indeed
    load(wide, *versions)
    choices = [None, *versions, None]
    calls = [call([60 + i, *PROMPT, *range(5 * i)], n=2, seed=i, adapter=a, include_prompt_logprobs=True) for i, a in enumerate(choices)]
    gaps, away = [], []
    for asked, got in zip(calls, run(wide, *calls), strict=True):
        prompt = asked.prompt.to_ints()
        assert got.prompt_logprobs is not None and got.prompt_logprobs[0] is None
        for sequence in got.sequences:
            want = peft_logprobs(model_dir, asked.adapter, prompt + sequence.tokens)
            have = np.array([*got.prompt_logprobs[1:], *(sequence.logprobs or [])])
            gaps.append(np.abs(have - want).max())
            if asked.adapter is not None:
                away.append(np.abs(have - peft_logprobs(model_dir, None, prompt + sequence.tokens)).max())
    asyncio.run(wide.close())
    assert max(gaps) < NATS
    assert min(away) > 0.05, "the test could not tell an adapter from the base"
    assert capsys.readouterr().out == ""  # and nothing of vLLM's on the terminal


def test_sixty_interleaved_requests_equal_the_one_by_one_run(sampler: VllmSampler, versions: list[AdapterRef]) -> None:
    load(sampler, *versions)
    choices: list[AdapterRef | None] = [*versions, None]
    calls = [call([3 + i, *PROMPT[: 1 + i % 5]], seed=i, adapter=choices[i % 6], temperature=[1.0, 0.0, 0.7][i % 3]) for i in range(60)]
    together = tokens(run(sampler, *calls))
    assert together == [tokens(run(sampler, one))[0] for one in calls]
    assert len({str(t) for t in together}) > 50, "the test could not tell the requests apart"


def test_temperatures_and_cuts_of_neighbours_do_not_mix(sampler: VllmSampler) -> None:
    calls = [call(seed=4, temperature=t, top_k=k, topk_sample_logprobs=top) for t, k, top in [(0.0, -1, 0), (1.3, 5, 7), (1.0, -1, 2)]]
    greedy, cut, plain = (response.sequences[0] for response in run(sampler, *calls))
    alone = [run(sampler, c)[0].sequences[0] for c in calls]
    assert [s.tokens for s in (greedy, cut, plain)] == [s.tokens for s in alone]
    for sequence, one in zip((greedy, cut, plain), alone, strict=True):
        np.testing.assert_allclose(sequence.logprobs, one.logprobs, atol=NATS)
    assert cut.topk_logprobs is not None and [len(row or []) for row in cut.topk_logprobs] == [5] * 12  # two of seven are cut away
    assert (greedy.topk_logprobs, len((plain.topk_logprobs or [[]])[0] or [])) == (None, 2)


def test_what_vllm_cannot_answer_is_refused(sampler: VllmSampler) -> None:
    targets = TensorData.from_numpy(np.full((len(PROMPT) - 1, 1), 3, dtype=np.int64))
    for unserved in ({"prompt_alt_tokens_k": 2}, {"target_prompt_logprobs": targets}):
        with pytest.raises(NotServedError, match=next(iter(unserved))):
            run(sampler, call(**unserved))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"temperature is 0\.001"):  # vLLM would make it 0.01
        run(sampler, call(temperature=0.001))
    assert not sampler.capabilities.arbitrary_prompt_scores
    assert sampler.capabilities.lora_on_head


# -- versions


def test_a_request_keeps_its_version_while_others_load(sampler: VllmSampler, versions: list[AdapterRef]) -> None:
    async def scenario() -> tuple[SampleResponse, bool]:
        await sampler.load_adapter(versions[0])
        running = asyncio.create_task(sampler.sample(call(n=4, max_tokens=240, adapter=versions[0])))
        await asyncio.sleep(0)
        for version in versions[1:]:
            await sampler.load_adapter(version)
            await sampler.sample(call(max_tokens=2, adapter=version))
        overtaken = not running.done()
        return await running, overtaken

    busy, overtaken = asyncio.run(scenario())
    assert overtaken, "the test needs the long request to be running still"
    assert tokens([busy]) == tokens(run(sampler, call(n=4, max_tokens=240, adapter=versions[0])))
    assert {sequence.policy_version for sequence in busy.sequences} == {0}


def test_a_rewritten_directory_never_meets_old_keys(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    ref = AdapterRef(name="same", version=1, path=write_adapter(model_dir, tmp_path / "same", targets=LINEAR, seed=5))
    long = list(range(10, 110))  # full blocks in the prefix cache
    load(sampler, ref)
    (before,) = run(sampler, call(long, temperature=0.0, adapter=ref))
    asyncio.run(sampler.unload_adapter(ref))
    file = ref.path / "adapter_model.safetensors"
    save_file({name: tensor.flip(0) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    load(sampler, ref)
    (after,) = run(sampler, call(long, temperature=0.0, adapter=ref))
    sequence = after.sequences[0]
    assert sequence.tokens != before.sequences[0].tokens
    np.testing.assert_allclose(sequence.logprobs, peft_logprobs(model_dir, ref, long + sequence.tokens)[len(long) - 1 :], atol=NATS)


def test_the_read_back_sees_what_the_model_computes_with(sampler: VllmSampler, versions: list[AdapterRef]) -> None:
    whole = versions[3]  # rank 32, all linears and the head
    (names,) = load(sampler, whole)
    assert names == set(load_file(whole.path / "adapter_model.safetensors"))
    manager = worker(sampler).model_runner.lora_manager._adapter_manager

    def slot(ref: AdapterRef) -> int:
        index: int = manager.lora_index_to_id.index(sampler._engine._loras[ref].lora_int_id)
        return index

    for module, part, name in [
        ("model.layers.1.self_attn.qkv_proj", 2, "layers.1.self_attn.v_proj.lora_B"),
        ("model.layers.0.mlp.gate_up_proj", 0, "layers.0.mlp.gate_proj.lora_B"),
    ]:
        load(sampler, whole)
        manager.modules[module].lora_b_stacked[part][slot(whole)][0, 3, 1] += 0.01  # one number of one tensor
        with pytest.raises(EngineError, match=name.replace(".", r"\.")):
            load(sampler, whole)
    load(sampler, whole)
    manager.modules["lm_head"].lora_b_stacked[slot(whole)].zero_()
    with pytest.raises(EngineError, match=r"lm_head\.lora_B"):
        load(sampler, whole)

    partial = versions[4]  # only gate, up and down
    load(sampler, partial)
    manager.modules["model.layers.0.self_attn.o_proj"].lora_a_stacked[0][slot(partial)].fill_(0.1)  # left over from another adapter
    (names,) = load(sampler, partial)
    assert names - set(load_file(partial.path / "adapter_model.safetensors")) == {"model.layers.0.self_attn.o_proj.lora_A"}
    asyncio.run(sampler.unload_adapter(partial))


def test_adapters_that_can_never_work_are_refused_by_name(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    big = AdapterRef(name="big", version=0, path=write_adapter(model_dir, tmp_path / "big", targets=["q_proj"], rank=33))
    with pytest.raises(InvalidRequestError, match="rank 33; this sampler was started for ranks up to 32"):
        load(sampler, big)
    odd = AdapterRef(name="odd", version=0, path=write_adapter(model_dir, tmp_path / "odd", targets=["q_proj"]))
    file = odd.path / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "z_proj"): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="z_proj"):
        load(sampler, odd)
    assert len(run(sampler, call())[0].sequences[0].tokens) == 12  # and the engine is well


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3", "Mistral"])  # Qwen2 is also the class of Qwen2.5
def test_a_model_without_lora_on_the_head_says_so_and_serves_the_rest(
    family: str, tmp_path: Path, write_adapter: Callable[..., Path], tiny_qwen3_dir: Path
) -> None:
    import transformers

    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    shape = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    other = dict(head_dim=32, max_position_embeddings=256, initializer_range=0.2, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    model_dir = tmp_path / family
    getattr(transformers, f"{family}ForCausalLM")(config(**shape, **other)).save_pretrained(model_dir)
    for file in tiny_qwen3_dir.glob("tokenizer*"):
        shutil.copy(file, model_dir)
    sampler = VllmSampler(str(model_dir))
    try:
        assert not sampler.capabilities.lora_on_head
        head = AdapterRef(name="head", version=0, path=write_adapter(model_dir, tmp_path / "head", targets=["q_proj", "lm_head"]))
        with pytest.raises(InvalidRequestError, match=r"lm_head.*train_unembed=False"):
            load(sampler, head)
        body = AdapterRef(name="body", version=1, path=write_adapter(model_dir, tmp_path / "body", targets=LINEAR, rank=8))
        load(sampler, body)
        for adapter in (None, body):
            (got,) = run(sampler, call(adapter=adapter, include_prompt_logprobs=True))
            assert got.prompt_logprobs is not None
            have = np.array([*got.prompt_logprobs[1:], *(got.sequences[0].logprobs or [])])
            want = peft_logprobs(model_dir, adapter, PROMPT + got.sequences[0].tokens)
            np.testing.assert_allclose(have, want, atol=NATS)
            assert adapter is None or np.abs(want - peft_logprobs(model_dir, None, PROMPT + got.sequences[0].tokens)).max() > 0.05
    finally:
        asyncio.run(sampler.close())


# -- the life of the engine


def test_a_failed_step_fails_its_requests_and_the_engine_serves_again(
    sampler: VllmSampler, versions: list[AdapterRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = AdapterRef(name="gone", version=9, path=tmp_path / "gone")
    shutil.copytree(versions[1].path, gone.path)
    load(sampler, *versions, gone)
    want = tokens(run(sampler, *(call(adapter=a) for a in [None, *versions])))
    shutil.rmtree(gone.path)  # cannot be loaded again
    restarts = sampler.num_restarts

    def broken() -> Any:
        raise RuntimeError("planted")

    async def scenario() -> list[SampleResponse | BaseException]:
        running = [asyncio.create_task(sampler.sample(call(max_tokens=240, adapter=a))) for a in (None, versions[0], versions[2])]
        await asyncio.sleep(0.05)
        monkeypatch.setattr(sampler._engine._engine, "step", broken)
        return await asyncio.gather(*running, return_exceptions=True)

    for failure in asyncio.run(scenario()):
        assert isinstance(failure, EngineLostError) and "planted" in str(failure) and isinstance(failure.__cause__, RuntimeError)
    assert tokens(run(sampler, *(call(adapter=a) for a in [None, *versions]))) == want
    assert sampler.num_restarts == restarts + 1
    with pytest.raises(EngineError, match="'gone' version 9 is not loaded"):
        run(sampler, call(adapter=gone))
    asyncio.run(sampler.unload_adapter(gone))


def test_cancelling_takes_the_request_out_of_the_engine(sampler: VllmSampler) -> None:
    async def scenario() -> None:
        doomed = asyncio.create_task(sampler.sample(call(n=3, max_tokens=240)))
        await asyncio.sleep(0.05)
        assert sampler._engine._engine.get_num_unfinished_requests() == 3
        doomed.cancel()
        deadline = time.monotonic() + 5
        while sampler._engine._engine.has_unfinished_requests():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert not sampler._engine._running


def test_two_engines_share_a_process_and_closing_one_leaves_the_other(sampler: VllmSampler, model_dir: Path) -> None:
    want = tokens(run(sampler, *(call(n=4, seed=i, max_tokens=60) for i in range(4))))
    threads = set(threading.enumerate())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    second = VllmSampler(str(model_dir))  # another base model beside it: test_vllm_child.py

    async def both() -> list[list[SampleResponse]]:
        return [list(await asyncio.gather(*(s.sample(call(n=4, seed=i, max_tokens=60)) for i in range(4) for s in (sampler, second))))]

    (mixed,) = asyncio.run(both())
    assert tokens(mixed[::2]) == tokens(mixed[1::2]) == want
    run(second, call(seed=None))
    assert torch.equal(torch.get_rng_state(), state), "starting and sampling must leave torch's generator alone"
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2, "vLLM replaces torch.set_num_threads"
    torch.set_num_threads(1)
    asyncio.run(second.close())
    assert set(threading.enumerate()) <= threads
    assert tokens(run(sampler, *(call(n=4, seed=i, max_tokens=60) for i in range(4)))) == want


def test_shapes_without_a_kernel_are_found_at_start(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(**shape, head_dim=16)).save_pretrained(tmp_path)
    for file in tiny_llama_dir.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    threads = set(threading.enumerate())
    with pytest.raises(EngineError, match="head_dim=16"):
        VllmSampler(str(tmp_path))
    assert set(threading.enumerate()) <= threads


KILL_SCRIPT = """
import asyncio, json, os, signal, sys
import psutil
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.vllm_sampler import VllmSampler
from ptlab.errors import EngineLostError
from ptlab.types import ModelInput, SamplingParams
from pathlib import Path

print("main runs")   # once: the engine's processes must not import a script that has no main guard
sampler = VllmSampler(sys.argv[1], mode="process")
ref = AdapterRef(name="a", version=3, path=Path(sys.argv[2]))

def call(max_tokens, adapter=None):
    params = SamplingParams(max_tokens=max_tokens, seed=1, stop=[])
    prompt = ModelInput.from_ints([40, 17, 300, 8])
    return SampleCall(prompt=prompt, num_samples=2, params=params, adapter=adapter, include_prompt_logprobs=True)

def processes():
    # ours but the resource tracker; what has just ended has no command line any more
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess as err:
            if not isinstance(err, psutil.ZombieProcess) or child.ppid() == os.getpid():
                found.append(child)
    return found

def answer(response):
    return [s.tokens for s in response.sequences], response.prompt_logprobs

async def main():
    await sampler.load_adapter(ref)
    before = answer(await sampler.sample(call(12, ref)))
    running = asyncio.create_task(sampler.sample(call(240, ref)))
    await asyncio.sleep(0.05)
    for child in processes():
        os.kill(child.pid, signal.SIGKILL)
    try:
        await running
        error = "none"
    except EngineLostError as err:
        error = str(err)
    after = answer(await sampler.sample(call(12, ref)))
    await sampler.close()
    left = [str(child) for child in processes()]
    print("RESULT " + json.dumps({"before": before, "after": after, "error": error, "left": left, "restarts": sampler.num_restarts}))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_engine_process_is_replaced(tiny_qwen3_dir: Path, tmp_path: Path, write_adapter: Callable[..., Path]) -> None:
    adapter = AdapterRef(name="a", version=3, path=write_adapter(tiny_qwen3_dir, tmp_path / "a", targets=[*LINEAR, "lm_head"], seed=2))
    script = tmp_path / "script.py"
    script.write_text(KILL_SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_qwen3_dir), str(adapter.path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("main runs") == 1
    result = json.loads(done.stdout.split("RESULT ")[1])
    assert "EngineDeadError" in result["error"]
    assert (result["left"], result["restarts"]) == ([], 1)
    want = peft_logprobs(tiny_qwen3_dir, adapter, [40, 17, 300, 8])  # the repair is in place in the engine's process too
    (drawn, before), (drawn_again, after) = result["before"], result["after"]
    assert drawn == drawn_again and len(drawn) == 2
    for prompt_logprobs in (before, after):  # not bit for bit: the two draws may begin in one step or in two
        np.testing.assert_allclose(prompt_logprobs[1:], want, atol=NATS)


def test_without_vllm_the_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("vllm_process", "vllm_engine", "vllm_sampler"):
        monkeypatch.delitem(sys.modules, f"ptlab.engines.{name}")
    with pytest.raises(ConfigError, match="extra 'cpu'"):
        importlib.import_module("ptlab.engines.vllm_sampler")


# -- settings


def test_seeds_of_draws_are_streams_of_their_own() -> None:
    seeds = {draw_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(11, 2) == draw_seed(11 + 2**63, 2)


def test_the_rank_limit_is_one_that_vllm_accepts() -> None:
    assert [lora_rank_limit(rank) for rank in (1, 2, 8, 9, 32, 33, 200)] == [1, 8, 8, 16, 32, 64, 256]
    with pytest.raises(InvalidRequestError, match="512"):
        lora_rank_limit(513)


def test_there_are_as_many_adapter_slots_as_little_memory_holds(model_dir: Path) -> None:
    from transformers import AutoConfig, Qwen3Config

    assert lora_slots(AutoConfig.from_pretrained(model_dir), torch.float32, 32) == 32
    small = Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8)
    # 28 layers of 7 matrices, and vocab_size 151936 on the head and the embeddings: 12.9 M numbers at rank 8, half the bytes in bfloat16
    assert lora_slots(small, torch.float32, 8) == 2**28 // (4 * lora_numbers(small, 8)) > 4
    assert lora_slots(small, torch.bfloat16, 8) == 2**28 // (2 * lora_numbers(small, 8))
    assert lora_slots(small, torch.float32, 64) == 4


def lora_numbers(config: Any, rank: int) -> int:
    """By hand: rank x (inputs + outputs) of each matrix."""
    hidden, inner, query, kv = 1024, 3072, 16 * config.head_dim, 8 * config.head_dim
    layer = (hidden + query) * 2 + (hidden + kv) * 2 + (hidden + inner) * 3
    return rank * (28 * layer + 2 * (hidden + 151936))


def test_the_kv_cache_holds_one_context_and_no_more_than_is_sensible(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3Config

    config = Qwen3Config(num_hidden_layers=4, num_key_value_heads=2, head_dim=64)  # 4 KiB per token in float32
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_AVPHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}[name])  # 4 GiB free
    block = 4 * 2 * 64 * 2 * 4 * 32
    assert cpu_kv_cache(config, torch.float32, 64, 10) == ((3 * 10 + 1) * block, 64)
    size, context = cpu_kv_cache(config, torch.float32, 4096, 256)
    assert (context, size <= 2**30 + block) == (4096, True)
    size, context = cpu_kv_cache(config, torch.float32, 2**22, 256)  # 16 GiB for one context
    assert context < 2**19 and size <= 2**31
