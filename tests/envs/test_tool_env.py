"""Attempts with tools: calls are carried out, every kind of bad call is answered, limits hold, and the answer is graded."""

from __future__ import annotations

import asyncio
import json

import pytest

from ptlab.envs.env_section import TaskSetting
from ptlab.envs.math_problems import Problem, ProblemFormat
from ptlab.envs.message_env import EnvFromMessageEnv, MessageStep
from ptlab.envs.tool_env import NO_CALLS_LEFT, MathToolsConfig, ToolEnv, reads_calls
from ptlab.envs.tools import Calculator, ToolSpec
from ptlab.errors import ConfigError, EnvError
from ptlab.renderers import Message, get_renderer


def call(name: str, **arguments: object) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": json.dumps(arguments)}}]}


def says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def unreadable(raw: str) -> Message:
    return {"role": "assistant", "content": raw, "unparsed_tool_calls": [{"raw_text": raw, "error": "not JSON"}]}


def tool_env(*, max_calls: int = 4, **more) -> ToolEnv:
    tools = {"calculator": Calculator()} | more.pop("tools", {})
    return ToolEnv(Problem("What is 47*38?", "1786"), ProblemFormat(), tools=tools, max_calls=max_calls, **more)


def play(env: ToolEnv, *replies: Message) -> list[MessageStep]:
    async def run() -> list[MessageStep]:
        await env.initial_observation()
        return [await env.step(reply) for reply in replies]

    return asyncio.run(run())


def results(step: MessageStep) -> list[str]:
    assert all(message["role"] == "tool" for message in step.messages)
    return [message["content"] for message in step.messages]


def test_a_call_is_carried_out_and_the_answer_after_it_is_graded():
    first, last = play(tool_env(), call("calculator", expression="47*38"), says("so \\boxed{1786}"))
    assert (results(first), first.done, first.reward) == (["1786"], False, 0.0)
    assert first.messages[0]["name"] == "calculator"
    assert (last.done, last.reward) == (True, 1.0)
    assert dict(last.metrics) == {"correct": 1.0, "format": 1.0, "tool_calls": 1, "tool_errors": 0, "tool_used": 1.0}


def test_an_answer_without_a_call_is_graded_at_once():
    [right] = play(tool_env(), says("\\boxed{1786}"))
    [wrong] = play(tool_env(), says("\\boxed{1787}"))
    [none] = play(tool_env(), says("1786"))
    assert [step.reward for step in (right, wrong, none)] == [1.0, 0.0, -0.1]
    assert right.metrics["tool_used"] == 0.0


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (unreadable("<tool_call>{"), "error: the call cannot be read: not JSON"),
        (call("weather", city="Zürich"), "error: there is no tool 'weather'; there is calculator"),
        (call("calculator", code="1"), 'error: calculator needs one argument, the text "expression"; given: code'),
        (call("calculator", expression=["1"]), 'error: calculator needs one argument, the text "expression"; given: expression'),
        (call("calculator", expression="1/0"), "error: no value: "),
        (call("calculator", expression="import os"), "error: no value: "),
        (call("calculator", expression="2+"), "error: cannot read the expression: "),
        (call("calculator", expression="9^9^9^9^9"), "error: no value: "),
        (call("n" * 5000), "error: there is no tool 'nnn"),
    ],
)
def test_a_bad_call_is_answered_by_a_message_that_says_so(reply, answer):
    first, last = play(tool_env(), reply, says("\\boxed{1786}"))
    assert not first.done and len(first.messages) == 1
    assert results(first)[0].startswith(answer) and len(results(first)[0]) < 300
    assert last.reward == 1.0 and last.metrics["tool_errors"] == 1


def test_several_calls_in_one_reply_are_answered_in_order():
    both = call("calculator", expression="1+1")
    both["tool_calls"] += call("calculator", expression="2+2")["tool_calls"]
    both["unparsed_tool_calls"] = unreadable("x")["unparsed_tool_calls"]
    [step] = play(tool_env(), both)
    assert results(step) == ["error: the call cannot be read: not JSON", "2", "4"]


def test_calls_beyond_the_limit_are_refused_once_and_then_end_the_attempt():
    once = call("calculator", expression="1+1")
    env = tool_env(max_calls=2)
    steps = play(env, once, unreadable("x"), once, once)
    assert [results(step) for step in steps[:3]] == [["2"], ["error: the call cannot be read: not JSON"], [NO_CALLS_LEFT]]
    assert [step.done for step in steps] == [False, False, False, True]
    assert steps[3].reward == pytest.approx(-0.1) and steps[3].metrics["tool_calls"] == 2
    answered = play(tool_env(max_calls=1), once, once, says("\\boxed{1786}"))
    assert answered[2].reward == 1.0


def test_a_call_with_an_answer_beside_it_is_a_call():
    """Otherwise the reply pays before its tool has answered."""
    reply = call("calculator", expression="47*38") | {"content": "\\boxed{1786}"}
    [step] = play(tool_env(), reply)
    assert not step.done and step.reward == 0.0


def test_a_reply_that_was_cut_off_ends_the_attempt_without_carrying_anything_out():
    env = tool_env()
    step = asyncio.run(env.step_cut_off(call("calculator", expression="1+1")))
    assert step.done and env.num_calls == 0 and step.reward == pytest.approx(-0.1)


def test_the_tools_are_announced_before_everything_or_not_at_all():
    [system, user] = asyncio.run(tool_env().initial_observation())
    assert system["role"] == "system" and '"name": "calculator"' in system["content"] and user["content"].startswith("What is 47*38?")
    [alone] = asyncio.run(tool_env(announce=False).initial_observation())
    assert alone == user


def test_a_tool_that_breaks_is_no_answer_of_the_model():
    class Broken:
        spec = ToolSpec(name="broken", description="", argument="x", argument_description="")

        async def call(self, argument: str) -> str:
            raise EnvError("the host is out of memory")

    with pytest.raises(EnvError, match="out of memory"):
        play(tool_env(tools={"broken": Broken()}), call("broken", x="1"))


def test_random_rewards_leave_the_metrics_true():
    rewards = set()
    for seed in range(20):
        [step] = play(tool_env(coin_seed=seed), says("\\boxed{1786}"))
        rewards.add(step.reward)
        assert step.metrics["correct"] == 1.0
    assert rewards == {0.0, 1.0}


@pytest.fixture
def config(tmp_path):
    rows = [{"problem": "What is 6*7?", "answer": "42"}, {"problem": "What is 6*8?", "answer": "48"}]
    paths = []
    for name, row in zip(("train", "test"), rows, strict=True):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row), encoding="utf-8")
        paths.append(str(path))
    return lambda **more: MathToolsConfig(train_path=paths[0], test_path=paths[1], **more)


@pytest.fixture(scope="module")
def tokenizer():
    from ptlab.engines.pretrain import train_tokenizer

    return train_tokenizer(["user\nassistant\n calculator name arguments expression"], 264)


def test_a_renderer_without_calls_is_refused(config, tokenizer):
    for name in ("chatml", "role_colon"):
        setting = TaskSetting(renderer=get_renderer(name, tokenizer), seed=0, models=None)  # type: ignore[arg-type]  # no other model
        with pytest.raises(ConfigError, match=f"renderer '{name}' reads no tool calls .*qwen3_instruct"):
            asyncio.run(config(tools=["calculator"]).make_task(setting))
    assert all(reads_calls(get_renderer(name, tokenizer)) for name in ("qwen3", "qwen3_instruct", "qwen3_disable_thinking"))


def test_a_task_gives_its_attempts_their_tools(config, tokenizer):
    setting = TaskSetting(renderer=get_renderer("qwen3_instruct", tokenizer), seed=0, models=None)  # type: ignore[arg-type]
    task = asyncio.run(config(tools=["calculator"], max_calls=3, announce=False).make_task(setting))
    for builder in (task.train.get_batch(0)[0], task.test_P[0]):
        env = asyncio.run(builder.make_envs())[0].message_env
        assert isinstance(env, ToolEnv) and list(env.tools) == ["calculator"] and env.max_calls == 3 and not env.announce
    assert task.test_P[0].problem.question == "What is 6*8?"


def test_programs_run_in_the_sandbox(config):
    maker = config(tools=["python"]).attempt_maker()
    env = maker(Problem("?", "42"), ProblemFormat(), None)
    program = call("python", code="import sys\nprint(sum(range(10)))")
    fails = call("python", code="print('x')\nraise SystemExit(3)")
    first, second, last = play(env, program, fails, says("\\boxed{42}"))
    assert results(first) == ["45"]
    assert results(second)[0].startswith("error: x")
    assert last.reward == 1.0 and last.metrics["tool_calls"] == 2
    env.tools["python"].sandbox.close()


def test_through_the_qwen3_renderer_turns_extend_one_another(tokenizer):
    renderer = get_renderer("qwen3_instruct", tokenizer)
    env = EnvFromMessageEnv(tool_env(announce=False), renderer)
    text = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "47*38"}}\n</tool_call>'
    end = renderer.get_stop_sequences()[0]

    async def run():
        observation, _ = await env.initial_observation()
        action = [*renderer.codec.encode(text), end]
        middle = await env.step(action)
        last = await env.step([*renderer.codec.encode("\\boxed{1786}"), end])
        return observation, action, middle, last

    observation, action, middle, last = asyncio.run(run())
    seen = middle.next_observation.to_ints()
    assert seen[: observation.length + len(action)] == [*observation.to_ints(), *action]
    assert "<tool_response>\n1786\n</tool_response>" in renderer.codec.decode(seen)
    assert last.reward == 1.0 and last.episode_done
