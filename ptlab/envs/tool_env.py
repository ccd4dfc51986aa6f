"""Problems that may be solved with tools, called through the chat template's tool format.

The renderer parses calls out of a reply (`tool_calls`, `unparsed_tool_calls`); here they are carried out and answered by tool messages.
A call that cannot be read, an unknown tool, wrong arguments, a failing program: each is answered by a message that says so, never an
exception.
The first reply without a call is the answer and is graded as in math_problems.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from ptlab.envs.deepmath import DeepMathConfig
from ptlab.envs.env_section import TaskSetting
from ptlab.envs.gsm8k import Gsm8kConfig
from ptlab.envs.hendrycks_math import HendrycksMathConfig
from ptlab.envs.math_problems import AttemptMaker, Problem, ProblemEnv, ProblemFormat, ProblemSection
from ptlab.envs.message_env import MessageStep
from ptlab.envs.polaris import PolarisConfig
from ptlab.envs.tools import Calculator, PythonTool, Tool, ToolError, argument_of, tools_prompt
from ptlab.errors import ConfigError
from ptlab.renderers import Message, Renderer, ToolCall
from ptlab.rl.types import Task
from ptlab.sandbox import SandboxConfig, open_sandbox

NO_CALLS_LEFT = "error: no calls are left; answer without one"


class ToolEnv(ProblemEnv):
    """One attempt at one problem, with tools.

    Args:
        tools: by the name under which the model calls them.
        max_calls: calls that are carried out; the first reply that asks for more is told so, the next one ends the attempt.
        announce: put the tools into the system message.
    """

    def __init__(
        self,
        problem: Problem,
        form: ProblemFormat,
        *,
        tools: Mapping[str, Tool],
        max_calls: int,
        announce: bool = True,
        coin_seed: int | None = None,
    ) -> None:
        super().__init__(problem, form, coin_seed=coin_seed)
        self.tools = tools
        self.max_calls = max_calls
        self.announce = announce
        self.num_calls = 0
        self.num_errors = 0
        self.was_refused = False

    async def initial_observation(self) -> list[Message]:
        messages = await super().initial_observation()
        if self.announce:
            messages.insert(0, {"role": "system", "content": tools_prompt([tool.spec for tool in self.tools.values()])})
        return messages

    async def step(self, reply: Message) -> MessageStep:
        calls, unparsed = reply.get("tool_calls", []), reply.get("unparsed_tool_calls", [])
        if self.was_refused or not (calls or unparsed):
            return await self._grade(reply, finished=not (calls or unparsed))
        if self.num_calls + len(calls) + len(unparsed) > self.max_calls:
            self.was_refused = True
            answers: list[Message] = [{"role": "tool", "content": NO_CALLS_LEFT}]
        else:
            self.num_calls += len(calls) + len(unparsed)
            errors = [f"error: the call cannot be read: {call['error']}" for call in unparsed]
            self.num_errors += len(errors)
            answers = [{"role": "tool", "content": text} for text in errors]
            answers += await asyncio.gather(*(self._answer(call) for call in calls))
        return MessageStep(reward=0.0, done=False, messages=answers, logs={"calls": _shown(reply), "results": _contents(answers)})

    async def _answer(self, call: ToolCall) -> Message:
        name = call["function"]["name"]
        try:
            if name not in self.tools:
                raise ToolError(f"there is no tool {name[:80]!r}; there is {', '.join(self.tools)}")
            tool = self.tools[name]
            content = await tool.call(argument_of(tool.spec, json.loads(call["function"]["arguments"])))
        except ToolError as err:
            self.num_errors += 1
            content = f"error: {err}"
        return {"role": "tool", "content": content, "name": name}

    async def _grade(self, reply: Message, *, finished: bool) -> MessageStep:
        step = await super()._grade(reply, finished=finished)
        counts = {"tool_calls": self.num_calls, "tool_errors": self.num_errors, "tool_used": float(self.num_calls > 0)}
        return MessageStep(reward=step.reward, done=True, metrics={**step.metrics, **counts}, logs=step.logs)


def _shown(reply: Message) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in reply.get("tool_calls", [])]
    return "\n".join([*calls, *(call["raw_text"] for call in reply.get("unparsed_tool_calls", []))])


def _contents(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def reads_calls(renderer: Renderer) -> bool:
    """Whether a call in the usual form is a call for this renderer."""
    tokens = renderer.codec.encode('<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>')
    message, _ = renderer.parse_response([*tokens, *(stop for stop in renderer.get_stop_sequences() if isinstance(stop, int))])
    return bool(message.get("tool_calls"))


DATA: Mapping[str, type[ProblemSection]] = {
    "gsm8k": Gsm8kConfig,
    "math": HendrycksMathConfig,
    "polaris": PolarisConfig,
    "deepmath": DeepMathConfig,
}


class MathToolsConfig(ProblemSection):
    kind: Literal["math_tools"] = "math_tools"
    """Problems with boxed answers, with a calculator and Python at hand. Needs a renderer that knows tool calls (the qwen3 family)."""
    data: Literal["gsm8k", "math", "polaris", "deepmath"] = "math"
    """Which problems, with the fields and hub names of that kind."""
    few_shot: bool = False
    """Put the strawberry example before each question."""
    tools: list[Literal["calculator", "python"]] = Field(default=["calculator", "python"], min_length=1)
    """What the model may call."""
    max_calls: int = Field(default=8, ge=1)
    """Calls per attempt; see rollout.max_tokens for the length of each reply and rollout.max_trajectory_tokens for all of them."""
    max_result_chars: int = Field(default=2000, ge=20)
    """Longest result of a program that the model gets to read."""
    announce: bool = True
    """Put the tools into the system message as the chat template does; false for a model that knows them."""
    sandbox: SandboxConfig = SandboxConfig()
    """Where the programs of the Python tool run."""

    @property
    def tag(self) -> str:
        return self.kind

    async def make_task(self, setting: TaskSetting) -> Task:
        """Raises: ConfigError also for a renderer that reads no calls: the model could never make one."""
        if not reads_calls(setting.renderer):
            raise ConfigError(
                f"env.kind 'math_tools': renderer {setting.renderer.name!r} reads no tool calls out of a reply; set model.renderer to "
                "one of the qwen3 family (qwen3_instruct, qwen3_disable_thinking, ...)"
            )
        return await super().make_task(setting)

    def load(self) -> tuple[list[Problem], list[Problem]]:
        return DATA[self.data](train_path=self.train_path, test_path=self.test_path).load()

    def attempt_maker(self) -> AttemptMaker:
        made: dict[str, Tool] = {}
        if "calculator" in self.tools:
            made["calculator"] = Calculator()
        if "python" in self.tools:
            made["python"] = PythonTool(open_sandbox(self.sandbox), limits=self.sandbox.limits, max_chars=self.max_result_chars)

        def attempt(problem: Problem, form: ProblemFormat, coin_seed: int | None) -> ToolEnv:
            return ToolEnv(problem, form, tools=made, max_calls=self.max_calls, announce=self.announce, coin_seed=coin_seed)

        return attempt
