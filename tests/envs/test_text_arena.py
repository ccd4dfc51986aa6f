"""The adapter around TextArena: with a small game of our own in its place, and with the real package where it is installed."""

from __future__ import annotations

import asyncio
import random
import re
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from ptlab.envs.env_section import TaskSetting
from ptlab.envs.text_arena import ArenaGame, ArenaGroupBuilder, TextArenaConfig, new_environment
from ptlab.errors import ConfigError
from ptlab.renderers import Message
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.types import ModelInput, SampledSequence, SampleResponse

needs_textarena = pytest.mark.skipif(find_spec("textarena") is None, reason="the package textarena is not installed")


class Higher:
    """Each player says a number once (a second try after nonsense); the higher one wins. Draws a secret from the global random numbers."""

    def __init__(self) -> None:
        self.env_id = "Higher-v0-raw"

    def reset(self, num_players, seed=None):
        assert num_players == 2, f"The number of players has to be 2, received {num_players}"
        random.seed(seed)
        self.state = SimpleNamespace(role_mapping={0: "Ann", 1: "Bob", -1: "GAME"})
        self.said, self.whose, self.tries = {}, 0, 0
        self.waiting = {0: [(-1, f"You are Ann. Secret {random.randrange(10**6)}", None)], 1: [(-1, "You are Bob.", None)]}
        self.rewards, self.about = None, {0: {"invalid_move": False}, 1: {"invalid_move": False}}

    def get_observation(self):
        messages, self.waiting[self.whose] = self.waiting[self.whose], []
        return self.whose, messages

    def step(self, action):
        for player in (0, 1):
            self.waiting[player].append((self.whose, action, None))
        found = re.search(r"\d+", action)
        if "boom" in action:
            raise RuntimeError("the table broke")
        if found is None:
            self.tries += 1
            self.waiting[self.whose].append((-1, f"A number, please. {random.randrange(10**6)}", None))
            if self.tries > 1:
                self.rewards = {self.whose: -1, 1 - self.whose: 1}
                self.about[self.whose]["invalid_move"] = True
            return self.tries > 1, {}
        self.said[self.whose] = int(found[0])
        self.whose = 1
        if len(self.said) == 2:
            best = (self.said[0] > self.said[1]) - (self.said[0] < self.said[1])
            self.rewards = {0: best, 1: -best}
        return len(self.said) == 2, {}

    def close(self):
        return self.rewards, self.about


@pytest.fixture
def higher(monkeypatch):
    """A package textarena that knows this one game."""
    package = ModuleType("textarena")

    def make(name):
        if name != "Higher-v0-raw":
            raise ValueError(f"Environment {name} not found in registry.")
        return Higher()

    package.make = make
    monkeypatch.setitem(sys.modules, "textarena", package)


class LetterRenderer:
    def build_generation_prompt(self, messages):
        return ModelInput.from_ints([ord(c) for m in messages for c in f"{m['role'][0]}:{m['content']}~"])

    def parse_response(self, tokens):
        text = "".join(map(chr, tokens))
        return Message(role="assistant", content=text.removesuffix("~")), text.endswith("~")

    def get_stop_sequences(self):
        return [ord("~")]


class Players:
    """Says what `says(prompt, seed)` gives."""

    def __init__(self, says) -> None:
        self.says = says

    async def sample(self, prompt, num_samples, sampling_params):
        texts = [self.says("".join(map(chr, prompt.to_ints())), sampling_params.seed + n) + "~" for n in range(num_samples)]
        about = {"stop_reason": "stop", "sequence_id": "s", "policy_version": 0}
        return SampleResponse(sequences=[SampledSequence.from_lists([ord(c) for c in text], [-0.5] * len(text), **about) for text in texts])


class Speaker:
    def __init__(self, text: str) -> None:
        self.text, self.heard = text, []

    async def reply(self, messages, *, seed):
        self.heard.append([m["content"] for m in messages])
        return self.text


def roll(says, *, game="Higher-v0", num_players=2, opponent=None, player=0, group_size=1, coin_seed=None, **settings):
    builder = ArenaGroupBuilder(
        game=game, num_players=num_players, seed=5, group_size=group_size, renderer=LetterRenderer(), opponent=opponent, player=player,
        coin_seed=coin_seed,
    )  # fmt: skip

    async def run():
        async with asyncio.timeout(20):
            return await run_groups([builder], Players(says), RolloutSettings(**{"max_tokens": 99, **settings}), seed=(0,))

    [group] = asyncio.run(run())
    return group


def by_side(ann: str, bob: str):
    return lambda prompt, seed: ann if "You are Ann" in prompt else bob


def test_two_learners_play_each_other(higher):
    group = roll(by_side("I say 3", "7"))
    assert group.rewards_G == [-1.0, 1.0] and [m["correct"] for m in group.metrics_G] == [0.0, 1.0]
    prompts = ["".join(map(chr, t.transitions[0].observation.to_ints())) for t in group.trajectories_G]
    assert re.fullmatch(r"u:You are Ann. Secret \d+~", prompts[0]) and prompts[1] == "u:You are Bob.\nAnn: I say 3~"


def test_a_second_try_is_the_same_players_turn_and_its_own_words_are_not_repeated(higher):
    group = roll(lambda prompt, seed: "4" if "please" in prompt or "Bob" in prompt else "what?")
    assert group.rewards_G == [0.0, 0.0]
    second = "".join(map(chr, group.trajectories_G[0].transitions[1].observation.to_ints()))
    assert re.fullmatch(r"u:You are Ann. Secret \d+~a:what\?~u:A number, please. \d+~", second)


def test_an_invalid_action_ends_it_as_the_game_says_and_who_had_no_turn_learns_nothing(higher):
    group = roll(by_side("what?", "7"))
    assert [m["format"] for m in group.metrics_G] == [0.0, 1.0] and [m["paid"] for m in group.metrics_G] == [-1.0, 1.0]
    assert group.rewards_G == [-1.0, -1.0]  # Bob never had a turn: the mean of those who had


def test_a_game_that_breaks_costs_who_it_broke_for_and_frees_the_other(higher):
    group = roll(by_side("3", "boom"))
    assert [error.error_type for error in group.errors] == ["RuntimeError"]
    assert group.rewards_G == [0.0] and len(group.trajectories_G) == 1


def test_leaving_in_ones_turn_loses(higher):
    group = roll(by_side("what?", "7"), max_turns=1)
    assert group.trajectories_G[0].stop_reason == "max_turns" and group.rewards_G[0] == -1.0


def test_a_speaker_plays_the_other_side(higher):
    speaker = Speaker("I take 9")
    first = roll(by_side("3", "?"), opponent=speaker, player=0, group_size=2)
    assert first.rewards_G == [-1.0, -1.0] and speaker.heard == [["You are Bob.\nAnn: 3"]] * 2
    second = roll(by_side("?", "12"), opponent=Speaker("I take 9"), player=1)
    assert second.rewards_G == [1.0]


def test_games_side_by_side_have_their_own_random_numbers(higher):
    random.seed(1)
    before = random.getstate()
    games = [ArenaGame(new_environment("Higher-v0"), 2, seed) for seed in (5, 6, 5)]
    alone = ArenaGame(new_environment("Higher-v0-raw"), 2, 5)
    for game in (*games, alone):
        assert game.turns.whose == 0
    for game in games:
        game.act(0, "what?")
    alone.act(0, "what?")
    texts = [game.read(0) for game in (*games, alone)]
    assert texts[0] == texts[2] == texts[3] != texts[1]
    assert random.getstate() == before


def test_the_control_does_not_see_the_play(higher):
    paid = [tuple(roll(says, coin_seed=coin).rewards_G) for coin in range(10) for says in (by_side("1", "2"), by_side("2", "1"))]
    assert paid[::2] == paid[1::2] and {reward for pair in paid for reward in pair} == {0.0, 1.0}


class Models:
    async def open(self, *, base_model=None, model_path=None):
        return Players(lambda prompt, seed: "5"), LetterRenderer()


def make_task(**keys: object):
    config = TextArenaConfig.model_validate({"groups_per_step": 3, "group_size": 2, "num_test": 4, **keys})
    return asyncio.run(config.make_task(TaskSetting(renderer=LetterRenderer(), seed=3, models=Models(), test_attempts=1)))


def test_the_task(higher):
    task = make_task(game="Higher-v0")
    batch = task.train.get_batch(2)
    assert [len(asyncio.run(b.make_envs())) for b in batch] == [4] * 3 and all(b.attempts_depend() for b in batch)
    assert [b.seed for b in batch] == [b.seed for b in make_task(game="Higher-v0").train.get_batch(2)] and len({b.seed for b in batch}) == 3
    assert [b.player for b in task.test_P] == [0, 1, 0, 1] and not any(b.attempts_depend() for b in task.test_P)
    assert task.test_P[0].logging_tags() == ["Higher-v0"]
    assert not make_task(game="Higher-v0", opponent="speaker").train.get_batch(0)[0].attempts_depend()


def test_games_that_are_not_there_are_told_before_the_first_step(higher):
    with pytest.raises(ConfigError, match="textarena cannot make it: Environment Chess-v9-raw not found"):
        make_task(game="Chess-v9")
    with pytest.raises(ConfigError, match="is not for num_players 1: The number of players has to be 2"):
        make_task(game="Higher-v0", num_players=1)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(ConfigError, match="pip install textarena"):
        make_task()


@needs_textarena
def test_a_real_game_of_two():
    moves = {0: iter(["[0]", "[1]", "[2]"]), 1: iter(["I take [4]", "[8]"])}
    group = roll(lambda prompt, seed: next(moves[0 if "You are Player 0" in prompt else 1]), game="TicTacToe-v0")
    assert group.rewards_G == [1.0, -1.0] and not group.errors


@needs_textarena
def test_a_real_game_of_one():
    def bisect(prompt: str, seed: int) -> str:
        low, high = 1, 20
        for guess, hint in re.findall(r"a:\[(\d+)\]~u:The target number is (higher|lower)", prompt):
            low, high = (int(guess) + 1, high) if hint == "higher" else (low, int(guess) - 1)
        return f"[{(low + high) // 2}]"

    group = roll(bisect, game="GuessTheNumber-v0", num_players=1, group_size=3)
    assert group.rewards_G == [1.0] * 3 and [m["correct"] for m in group.metrics_G] == [1.0] * 3
