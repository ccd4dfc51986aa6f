"""Tic-tac-toe: endings and rewards by hand, self-play through real rollouts with every kind of failure in every turn (nobody may wait for
ever), opponents, the test's games, and how turns become datums."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from ptlab.envs.env_section import TaskSetting
from ptlab.envs.message_env import EnvFromMessageEnv
from ptlab.envs.tic_tac_toe import (
    Game,
    MinimaxOpponent,
    Payment,
    RandomOpponent,
    SpeakerOpponent,
    TicTacToeConfig,
    TicTacToeGroupBuilder,
    parse_move,
    situation,
)
from ptlab.envs.tic_tac_toe_board import EMPTY_BOARD, best_squares, free_squares
from ptlab.renderers import Message
from ptlab.rl.datums import trajectory_to_datums
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.types import ModelInput, SampledSequence, SampleResponse

STOP = ord("~")
STUCK_S = 20.0
"""After this a game that waits for itself fails its test."""


class LetterRenderer:
    """u:hi~a:yo~...; a prompt ends with "a:". Every prompt extends the one before unless `forgets`: then only the last message is shown."""

    def __init__(self, *, forgets: bool = False) -> None:
        self.forgets = forgets

    def build_generation_prompt(self, messages):
        shown = messages[-1:] if self.forgets else messages
        return ModelInput.from_ints([ord(c) for m in shown for c in f"{m['role'][0]}:{m['content']}~"] + [ord("a"), ord(":")])

    def parse_response(self, tokens):
        text = "".join(map(chr, tokens))
        return Message(role="assistant", content=text.removesuffix("~")), text.endswith("~")

    def get_stop_sequences(self):
        return [STOP]


def seen(prompt: str) -> tuple[str, str]:
    """The newest board of a prompt, in the board's own form, and whose move it is."""
    rows, mark = re.findall(r"(.\|.\|.\n.\|.\|.\n.\|.\|.)\nYou are ([XO])\.", prompt)[-1]
    return re.sub(r"[0-9]", ".", re.sub(r"[|\n]", "", rows)), mark


class Players:
    """Both players' policy: `says(board, mark, turn, seed)` gives the text of a reply, "HANG" for one that takes for ever, and what ends
    in "CUT" comes without its end."""

    def __init__(self, says: Callable[[str, str, int, int], str]) -> None:
        self.says = says

    async def sample(self, prompt, num_samples, sampling_params):
        board, mark = seen("".join(map(chr, prompt.to_ints())))
        sequences = []
        for number in range(num_samples):
            text = self.says(board, mark, board.count(mark), sampling_params.seed + number)
            if text == "HANG":
                await asyncio.sleep(3600)
            tokens = [ord(c) for c in text.removesuffix("CUT")] + ([] if text.endswith("CUT") else [STOP])
            about = {"stop_reason": "length" if text.endswith("CUT") else "stop", "sequence_id": "s", "policy_version": 0}
            sequences.append(SampledSequence.from_lists(tokens, [-0.5] * len(tokens), **about))
        return SampleResponse(sequences=sequences)


def anywhere(board: str, mark: str, turn: int, seed: int) -> str:
    return str(random.Random(seed).choice(free_squares(board)) + 1)


def scripted(moves: str) -> Callable[[str, str, int, int], str]:
    """Both sides' moves in order, as digits."""
    return lambda board, mark, turn, seed: moves[9 - board.count(".")]


def builder(**changes: object) -> TicTacToeGroupBuilder:
    usual = {
        "make_opponent": None,
        "mark": "X",
        "group_size": 1,
        "renderer": LetterRenderer(),
        "payment": Payment(),
        "tag": "t",
        "opening": EMPTY_BOARD,
    }
    return TicTacToeGroupBuilder(**{**usual, "explain": False, **changes})


def roll(builders, says, **settings):
    """The groups, or a failure if they wait for ever."""

    async def run():
        async with asyncio.timeout(STUCK_S):
            return await run_groups(builders, Players(says), RolloutSettings(**{"max_tokens": 9, **settings}), seed=(0, "t"))

    return asyncio.run(run())


def test_the_last_number_is_the_move():
    said = ["5", "I take 3.", "win 7", "9 or rather 1", "", "none", "0", "10", "5 12", "square nine", "1" * 9]
    assert [parse_move(text) for text in said] == [4, 2, 6, 0, None, None, None, None, None, None, None]


def test_what_a_player_reads():
    assert situation("X...O....", "X", explain=False) == "X|2|3\n4|O|6\n7|8|9\nYou are X."
    assert "three in a line win" in situation(EMPTY_BOARD, "X", explain=True) and situation(EMPTY_BOARD, "X", explain=True).endswith("X.")


@pytest.mark.parametrize(
    ("moves", "rewards", "outcomes"),
    [
        ("14253", [1.0, -1.0], ["won", "lost"]),
        ("415273", [-1.0, 1.0], ["lost", "won"]),
        ("152378649", [0.0, 0.0], ["drawn", "drawn"]),
        ("11", [0.0, -1.5], ["walkover", "illegal"]),
        ("152x", [0.0, -1.5], ["walkover", "illegal"]),
        ("155", [-1.5, 0.0], ["illegal", "walkover"]),
    ],
)
def test_games_by_hand(moves, rewards, outcomes):
    [group] = roll([builder()], scripted(moves))
    assert group.rewards_G == rewards and not group.errors
    assert [trajectory.transitions[-1].logs["outcome"] for trajectory in group.trajectories_G] == outcomes
    assert [trajectory.stop_reason for trajectory in group.trajectories_G] == ["done", "done"]
    for metrics, outcome in zip(group.metrics_G, outcomes, strict=True):
        assert metrics["correct"] == metrics["won"] == float(outcome == "won")
        assert metrics["lost"] == float(outcome in ("lost", "illegal")) and metrics["walkover"] == float(outcome == "walkover")
        assert metrics["format"] == 1.0 - metrics["illegal"] == float(outcome != "illegal")
        assert sum(metrics[name] for name in ("won", "drawn", "lost", "walkover")) == 1.0


def test_a_win_with_the_last_square_is_no_draw():
    [group] = roll([builder()], scripted("452398167"))
    assert group.rewards_G == [1.0, -1.0] and [metrics["moves"] for metrics in group.metrics_G] == [5.0, 4.0]


def test_payments_are_what_the_config_says():
    payment = Payment(won=2.0, drawn=0.5, lost=-3.0, format_penalty=0.25, walkover=1.0)
    assert roll([builder(payment=payment)], scripted("14253"))[0].rewards_G == [2.0, -3.0]
    assert roll([builder(payment=payment)], scripted("152378649"))[0].rewards_G == [0.5, 0.5]
    assert roll([builder(payment=payment)], scripted("155"))[0].rewards_G == [-3.25, 1.0]


def test_a_reply_that_was_cut_off_is_no_move():
    [group] = roll([builder()], lambda board, mark, turn, seed: "5" if turn == 0 and mark == "X" else "1CUT")
    assert group.rewards_G == [0.0, -1.5] and [m["illegal"] for m in group.metrics_G] == [0.0, 1.0]


def test_whoever_never_moved_is_paid_the_groups_mean():
    """O's first prompt comes when X has lost already; nothing may be learnt from what O says to it."""

    def says(board, mark, turn, seed):
        return "x" if seed % 2 and board == EMPTY_BOARD else anywhere(board, mark, turn, seed)

    [group] = roll([builder(group_size=12)], says)
    mean = sum(group.rewards_G) / len(group.rewards_G)
    unmoved = [r for r, m in zip(group.rewards_G, group.metrics_G, strict=True) if m["moves"] == 0]
    assert unmoved and unmoved == pytest.approx([mean] * len(unmoved)) and len(set(group.rewards_G)) > 2


def test_many_games_end_and_pay_both_sides():
    groups = roll([builder(group_size=8) for _ in range(8)], anywhere)
    for group in groups:
        for x, o in zip(group.rewards_G[::2], group.rewards_G[1::2], strict=True):
            assert (x, o) in ((1.0, -1.0), (-1.0, 1.0), (0.0, 0.0))
    assert {reward for group in groups for reward in group.rewards_G} == {1.0, 0.0, -1.0}


class BreakingEnv(EnvFromMessageEnv):
    """Raises in one turn: before or after the move is made, or when it is to begin."""

    def __init__(self, env: EnvFromMessageEnv, turn: int, when: str) -> None:
        super().__init__(env.message_env, env.renderer)
        self.turn, self.when, self.steps = turn, when, 0

    async def initial_observation(self):
        if self.when == "opening":
            raise ValueError("table broke")
        return await super().initial_observation()

    async def step(self, action, *, extra=None):
        self.steps += 1
        if self.steps - 1 != self.turn:
            return await super().step(action, extra=extra)
        if self.when == "after":
            await super().step(action, extra=extra)
        raise ValueError("table broke")


class BreakingBuilder(TicTacToeGroupBuilder):
    """The player on `seat` (0 = X) breaks."""

    async def make_envs(self):
        seat, turn, when = self.tag.split()
        envs = list(await super().make_envs())
        envs[int(seat)] = BreakingEnv(envs[int(seat)], int(turn), when)
        return envs


LONG_GAME = "152378649"  # nine moves, a draw: every turn of both players is reached


@pytest.mark.parametrize("when", ["opening", "before", "after"])
def test_a_player_that_breaks_frees_the_other(when):
    cases = [(seat, turn) for seat in (0, 1) for turn in range(5 - seat)]
    groups = roll([BreakingBuilder(**vars_of(builder(tag=f"{seat} {turn} {when}"))) for seat, turn in cases], scripted(LONG_GAME))
    for (seat, turn), group in zip(cases, groups, strict=True):
        assert [error.error_type for error in group.errors] == ["ValueError"] and len(group.trajectories_G) == 1
        last = when == "after" and 2 * turn + seat >= 7  # its step came back when the game had ended
        other_had_no_turn = group.metrics_G[0]["moves"] == 0
        assert group.metrics_G[0]["walkover"] == float(not last), (seat, turn)
        assert group.rewards_G == [0.0] or other_had_no_turn


def vars_of(made: TicTacToeGroupBuilder) -> dict[str, object]:
    return {name: getattr(made, name) for name in TicTacToeGroupBuilder.__dataclass_fields__}


@pytest.mark.parametrize(("mark", "turn"), [("X", 0), ("X", 2), ("O", 0), ("O", 3)])
def test_time_that_runs_out_frees_both(mark, turn):
    """Their clocks run together: either the slow one leaves first and has lost, or the one who waits, and then nobody has."""

    def says(board, who, count, seed):
        return "HANG" if (who, count) == (mark, turn) else scripted(LONG_GAME)(board, who, count, seed)

    [group] = roll([builder()], says, timeout_s=0.15)
    late = "XO".index(mark)
    assert group.trajectories_G[late].stop_reason == "timeout" and not group.errors
    assert turn == 0 or (group.rewards_G[late] in (-1.0, 0.0) and group.rewards_G[1 - late] == 0.0)
    assert all(metrics["won"] == metrics["drawn"] == 0.0 for metrics in group.metrics_G)


@pytest.mark.parametrize("max_turns", [1, 2, 3, 4])
def test_a_player_out_of_turns_loses_and_the_other_wins_nothing(max_turns):
    [group] = roll([builder()], scripted(LONG_GAME), max_turns=max_turns)
    assert [trajectory.stop_reason for trajectory in group.trajectories_G] == ["max_turns", "done"]
    assert group.rewards_G == [-1.0, 0.0]  # X reaches its limit first, with its next move due
    assert [m["lost"] for m in group.metrics_G] == [1.0, 0.0] == [1.0 - m["walkover"] for m in group.metrics_G]


def test_no_limit_of_tokens_leaves_anybody_waiting():
    for limit in range(1, 260, 7):
        [group] = roll([builder()], scripted(LONG_GAME), max_trajectory_tokens=limit)
        assert not group.errors and len(group.rewards_G) == 2, limit
    assert group.rewards_G == [0.0, 0.0] and [m["drawn"] for m in group.metrics_G] == [1.0, 1.0]


def test_leaving_costs_who_leaves_on_its_turn_and_nobody_otherwise():
    game = Game()
    game.play("X", 4)
    game.leave("X")  # while O thinks
    assert game.outcomes == {"X": "walkover", "O": "walkover"}
    game = Game()
    game.leave("X")
    game.leave("O")  # too late
    assert game.outcomes == {"X": "left", "O": "walkover"}


def test_a_conversation_is_one_datum_where_prompts_extend_and_one_per_turn_where_they_do_not():
    [whole] = roll([builder()], scripted(LONG_GAME))
    [cut] = roll([builder(renderer=LetterRenderer(forgets=True))], scripted(LONG_GAME))
    for index, turns in ((0, 5), (1, 4)):
        [datum] = trajectory_to_datums(whole.trajectories_G[index], 1.0)
        text = "".join(map(chr, datum.model_input.to_ints()))
        assert text.count("You are") == turns
        targets, advantages = datum.loss_fn_inputs["target_tokens"].data, datum.loss_fn_inputs["advantages"].data
        sampled = "".join(chr(token) for token, advantage in zip(targets, advantages, strict=True) if advantage)
        assert sampled == "".join(f"{digit}~" for digit in LONG_GAME[index::2])
        assert len(trajectory_to_datums(cut.trajectories_G[index], 1.0)) == turns


def chosen(opponent, board: str) -> int | None:
    return asyncio.run(opponent.choose(board))


def test_opponents_answer_the_same_board_in_the_same_way():
    boards = ["X........", "X...O...X", "XO......."]
    for kind in (RandomOpponent, MinimaxOpponent):
        assert [chosen(kind(1), board) for board in boards] == [chosen(kind(1), board) for board in boards]
    assert {chosen(RandomOpponent(seed), "X........") for seed in range(200)} == set(range(1, 9))
    assert {chosen(MinimaxOpponent(seed), "........X"[::-1]) for seed in range(50)} == {4}
    assert {chosen(MinimaxOpponent(seed), EMPTY_BOARD) for seed in range(200)} == set(best_squares(EMPTY_BOARD))


def test_a_model_as_opponent_reads_its_own_conversation():
    class Speaker:
        def __init__(self) -> None:
            self.heard = []

        async def reply(self, messages, *, seed):
            self.heard.append(([m["content"] for m in messages], seed))
            return "I take 5"

    speaker = Speaker()
    [group] = roll([builder(make_opponent=lambda: SpeakerOpponent(speaker, 3, explain=True), mark="X")], scripted("1.3"))
    assert group.rewards_G == [0.0] and group.metrics_G[0]["walkover"] == 1.0  # its second 5 was illegal
    first, second = speaker.heard
    assert first[0][0].startswith("We play tic-tac-toe") and first[0][0].endswith("X|2|3\n4|5|6\n7|8|9\nYou are O.")
    assert second[0][1:] == ["I take 5", "X|2|X\n4|O|6\n7|8|9\nYou are O."] and first[1] != second[1]


def test_the_learner_moves_second_where_it_is_o():
    opponents = []

    def make_opponent():
        opponents.append(RandomOpponent(7))
        return opponents[-1]

    [group] = roll([builder(make_opponent=make_opponent, mark="O", group_size=4)], anywhere)
    assert len(opponents) == 4 and len(group.trajectories_G) == 4
    openings = {"".join(map(chr, t.transitions[0].observation.to_ints())) for t in group.trajectories_G}
    assert len(openings) == 1 and openings.pop().count("X") == 1  # all face the same first move


class NoModels:
    def __init__(self) -> None:
        self.opened = []

    async def open(self, *, base_model=None, model_path=None):
        self.opened.append(model_path)
        return Players(anywhere), LetterRenderer()


def make_task(models=None, **keys: object):
    config = TicTacToeConfig.model_validate({"groups_per_step": 4, "group_size": 3, "num_test": 10, "explain": False, **keys})
    setting = TaskSetting(renderer=LetterRenderer(), seed=3, models=models or NoModels(), test_attempts=2)
    return asyncio.run(config.make_task(setting))


def test_self_play_makes_two_players_a_game_and_says_that_they_wait():
    batch = make_task().train.get_batch(0)
    assert [len(asyncio.run(made.make_envs())) for made in batch] == [6] * 4 and all(made.attempts_depend() for made in batch)


def test_openings_are_random_boards_that_a_group_shares():
    assert {made.opening for step in range(5) for made in make_task().train.get_batch(step)} == {EMPTY_BOARD}
    task = make_task(opening_marks=3)
    openings = [made.opening for step in range(40) for made in task.train.get_batch(step)]
    assert openings == [made.opening for step in range(40) for made in make_task(opening_marks=3).train.get_batch(step)]
    assert {9 - board.count(".") for board in openings} == {0, 1, 2, 3} and len(set(openings)) > 60
    assert {made.opening for made in task.test_P} == {EMPTY_BOARD}
    [group] = roll([builder(opening="X........", group_size=3)], anywhere)  # O begins
    assert not group.errors and [m["moves"] >= 1 for m in group.metrics_G] == [True] * 6
    [group] = roll([builder(opening="X...O....", make_opponent=lambda: RandomOpponent(1), mark="O")], anywhere)
    first = seen("".join(map(chr, group.trajectories_G[0].transitions[0].observation.to_ints())))
    assert first[1] == "O" and first[0].count("X") == 2


def test_the_test_is_half_random_half_perfect_from_both_sides():
    tests = make_task().test_P
    assert [made.logging_tags() for made in tests] == [["vs_random"]] * 5 + [["vs_minimax"]] * 5
    assert [made.mark for made in tests] == list("XOXOXOXOXO") and not any(made.attempts_depend() for made in tests)
    groups = roll(tests, anywhere)
    assert [len(group.trajectories_G) for group in groups] == [2] * 10
    again = roll(make_task().test_P, anywhere)
    assert [group.rewards_G for group in groups] == [group.rewards_G for group in again]


def test_perfect_play_never_loses_a_test_game_and_beats_the_random_player():
    groups = roll(make_task(num_test=120).test_P, lambda board, mark, turn, seed: str(best_squares(board)[0] + 1))
    rewards = [group.rewards_G[0] for group in groups]
    assert min(rewards) == 0.0 and sum(rewards[:60]) > 45 and set(rewards[60:]) == {0.0}


@pytest.mark.parametrize("opponent", ["random", "minimax", "speaker"])
def test_training_against_others(opponent):
    models = NoModels()
    speaker = {"speaker": {"kind": "model", "path": "tinker://v7"}} if opponent == "speaker" else {}
    task = make_task(models, opponent=opponent, **speaker)
    batch = task.train.get_batch(1)
    assert [made.mark for made in batch] == list("XOXO") and not any(made.attempts_depend() for made in batch)
    assert models.opened == (["tinker://v7"] if opponent == "speaker" else [])
    rewards = [group.rewards_G for group in roll(batch, anywhere)]
    assert rewards == [group.rewards_G for group in roll(make_task(models, opponent=opponent, **speaker).train.get_batch(1), anywhere)]
    assert all(reward in (1.0, 0.0, -1.0) for group in rewards for reward in group) and all(len(group) == 3 for group in rewards)


def test_the_control_does_not_see_the_play_and_metrics_do():
    task = make_task(reward="random")
    paid = [group.rewards_G for step in range(3) for group in roll(task.train.get_batch(step), anywhere)]
    again = [group.rewards_G for step in range(3) for group in roll(task.train.get_batch(step), lambda *_: "x")]
    assert {reward for group in paid for reward in group} == {1.0, -1.0}
    assert [group[::2] for group in paid] == [group[::2] for group in again]  # O never moves in the second
    assert all(made.coin_seed is None for made in task.test_P)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"opponent": "speaker"}, "opponent is 'speaker' and speaker is not set"),
        ({"speaker": {"kind": "model"}}, "opponent is 'self' and speaker is set"),
        ({"drawn": 2.0}, "a win must not pay less than a draw"),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        TicTacToeConfig.model_validate(keys)


def test_moving_out_of_turn_is_a_mistake_of_the_code():
    with pytest.raises(AssertionError, match="O moves out of turn"):
        Game().play("O", 4)
