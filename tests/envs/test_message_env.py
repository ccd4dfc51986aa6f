"""The adapter from messages to tokens, with a renderer whose tokens are the letters of the messages."""

from __future__ import annotations

import asyncio

from ptlab.envs.message_env import EnvFromMessageEnv, MessageEnv, MessageStep
from ptlab.renderers import Message
from ptlab.rl.datums import trajectory_to_datums
from ptlab.rl.types import Trajectory, Transition
from ptlab.types import ModelInput

STOP = ord("|")


class LetterRenderer:
    """u:hi| a:yo| ... ; a prompt ends with "a:". A reply that does not end in "|" is not well-formed."""

    def build_generation_prompt(self, messages):
        return ModelInput.from_ints([ord(c) for m in messages for c in f"{m['role'][0]}:{m['content']}|"] + [ord("a"), ord(":")])

    def parse_response(self, tokens):
        text = "".join(map(chr, tokens))
        return Message(role="assistant", content=text.removesuffix("|")), text.endswith("|")

    def get_stop_sequences(self):
        return [STOP]


class Echo(MessageEnv):
    """Ends when the model says "end"; pays the length of each reply."""

    def __init__(self) -> None:
        self.replies: list[str] = []

    async def initial_observation(self):
        return [Message(role="user", content="go")]

    async def step(self, reply):
        self.replies.append(reply["content"])
        said = reply["content"]
        again = [Message(role="user", content="more")]
        return MessageStep(reward=float(len(said)), done=said == "end", messages=again, metrics={"words": 1.0}, logs={"said": said})


def text(observation: ModelInput) -> str:
    return "".join(map(chr, observation.to_ints()))


def tokens(reply: str) -> list[int]:
    return [ord(c) for c in reply]


def test_replies_become_messages_and_messages_the_next_observation():
    async def play():
        message_env = Echo()
        env = EnvFromMessageEnv(message_env, LetterRenderer())
        observation, stop = await env.initial_observation()
        first = await env.step(tokens("yo|"), extra={"stop_reason": "stop"})
        second = await env.step(tokens("end|"))
        return message_env, observation, stop, first, second

    message_env, observation, stop, first, second = asyncio.run(play())
    assert text(observation) == "u:go|a:" and stop == [STOP]
    assert (first.reward, first.episode_done, first.next_stop_condition) == (2.0, False, [STOP])
    assert text(first.next_observation) == "u:go|a:yo|u:more|a:"
    assert first.metrics == {"cut_off": 0.0, "words": 1.0} and first.logs == {"said": "yo"}
    assert (second.reward, second.episode_done) == (3.0, True)
    assert message_env.replies == ["yo", "end"]


def test_a_renderer_that_extends_gives_one_datum_for_the_conversation():
    env = EnvFromMessageEnv(Echo(), LetterRenderer())

    async def play():
        observation, _ = await env.initial_observation()
        result = await env.step(tokens("yo|"))
        turns = []
        for seen, action in ((observation, tokens("yo|")), (result.next_observation, tokens("end|"))):
            turns.append(
                Transition(
                    observation=seen,
                    action=action,
                    sampling_logprobs_T=[-1.0] * len(action),
                    policy_version=0,
                    stop_reason="stop",
                    reward=0.0,
                    episode_done=False,
                )
            )
        return Trajectory(transitions=turns, stop_reason="done")

    [datum] = trajectory_to_datums(asyncio.run(play()), 1.0)
    assert text(datum.model_input) == "u:go|a:yo|u:more|a:end"
    marked = [chr(t) for t, a in zip(datum.loss_fn_inputs["target_tokens"].data, datum.loss_fn_inputs["advantages"].data, strict=True) if a]
    assert "".join(marked) == "yo|end|"


def test_a_reply_without_its_end_is_judged_apart():
    class Lenient(Echo):
        async def step_cut_off(self, reply):
            return MessageStep(reward=-1.0, done=True, logs={"said": reply["content"]})

    async def last(env: MessageEnv, action: str, reason: str):
        adapter = EnvFromMessageEnv(env, LetterRenderer())
        await adapter.initial_observation()
        return await adapter.step(tokens(action), extra={"stop_reason": reason})

    malformed = asyncio.run(last(Echo(), "yo", "stop"))
    assert (malformed.reward, malformed.episode_done, malformed.metrics["cut_off"]) == (0.0, True, 1.0)
    cut = asyncio.run(last(Lenient(), "yo|", "length"))
    assert (cut.reward, cut.logs) == (-1.0, {"said": "yo"})
