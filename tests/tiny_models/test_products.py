"""The texts of ptlab/tiny-tools: calls as the renderer writes them, results as the environment answers them; and the shipped rows."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from random import Random

from ptlab.engines.pretrain import train_tokenizer
from ptlab.envs.math_problems import Problem, ProblemFormat
from ptlab.envs.tool_env import MathToolsConfig, ToolEnv
from ptlab.envs.tools import Calculator
from ptlab.renderers import Message, get_renderer
from ptlab.tiny_models import products
from ptlab.tiny_models.products import DEFAULT_MIXTURE, example, is_held_out, tokenizer_texts, tools_model

DATA = Path(__file__).parents[2] / "configs/smoke/data"


def test_every_example_is_a_conversation_that_the_environment_and_the_renderer_would_have_made():
    """The turns that are not learned are what ToolEnv answers to those that are; the whole is what qwen3_instruct renders."""
    renderer = get_renderer("qwen3_instruct", train_tokenizer(tokenizer_texts(), tools_model().shape.vocab_size))
    rng = Random(3)
    kinds = Counter[str]()
    for _ in range(400):
        turns = example(rng, mixture=DEFAULT_MIXTURE, clean=False).turns
        form = ProblemFormat(suffix="")
        env = ToolEnv(Problem(turns[0].text, "0"), form, tools={"calculator": Calculator()}, max_calls=2, announce=False)
        conversation: list[Message] = asyncio.run(env.initial_observation())
        for turn in turns[1:]:
            if turn.role == "assistant":
                reply = renderer.parse_text(turn.text)
                step = asyncio.run(env.step(reply))
                conversation += [reply, *step.messages]
        kinds["guess" if len(turns) == 2 else "broken" if env.num_errors else "sum" if "+" in turns[1].text else "product"] += 1
        written = "\n".join(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>" for turn in turns)
        assert renderer.codec.decode(renderer.build_supervised_example(conversation)[0].to_ints()) == written
    shares = {kind: count / 400 for kind, count in kinds.items()}
    wanted = {"guess": 0.55, "sum": 0.20, "broken": 0.15, "product": 0.10}
    assert all(abs(shares[kind] - share) < 0.08 for kind, share in wanted.items()), shares


def test_clean_examples_call_well():
    rng = Random(4)
    for _ in range(200):
        asked, call, result, answer = example(rng, mixture=DEFAULT_MIXTURE, clean=True).turns
        a, b = map(int, asked.text.removeprefix("What is ").removesuffix("?").split("*"))
        assert not is_held_out(a, b)
        assert f'"{a}*{b}"' in call.text and f"\n{a * b}\n" in result.text and answer.text == f"\\boxed{{{a * b}}}"
        assert [turn.learned for turn in (asked, call, result, answer)] == [False, True, False, True]


def test_a_tenth_of_the_pairs_is_held_out_whatever_their_order():
    pairs = [(a, b) for a in range(11, 100) for b in range(11, 100)]
    assert abs(sum(is_held_out(a, b) for a, b in pairs) / len(pairs) - 0.1) < 0.02
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)


def test_the_shipped_rows_are_those_that_the_command_writes(tmp_path):
    products.write_rows(tmp_path)
    for name in ("train", "test"):
        file = f"products_{name}.jsonl"
        assert (DATA / file).read_bytes() == (tmp_path / file).read_bytes(), f"{file}: write it again (see the module's first lines)"
    paths = {"train_path": str(DATA / "products_train.jsonl"), "test_path": str(DATA / "products_test.jsonl")}
    train, test = MathToolsConfig(**paths).load()
    assert (len(train), len(test)) == (800, 200)
    for part, held_out in ((train, False), (test, True)):
        for problem in part:
            a, b = map(int, problem.question.removeprefix("What is ").removesuffix("?").split("*"))
            assert problem.answer == str(a * b) and is_held_out(a, b) == held_out
