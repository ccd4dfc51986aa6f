"""What the games' tiny models are taught: in the form their environments read, in the shares that are said, and within the context."""

from __future__ import annotations

from random import Random

import pytest

from ptlab.engines.pretrain import _encode, chat_prompt, train_tokenizer
from ptlab.envs.guess_number import GuessNumberEnv, expected_play, parse_guess
from ptlab.envs.tic_tac_toe import parse_move
from ptlab.envs.tic_tac_toe_board import free_squares, is_over, to_move
from ptlab.envs.twenty_questions import parse_answer
from ptlab.envs.twenty_questions import parse_guess as parse_word
from ptlab.envs.twenty_questions_words import WORDS
from ptlab.renderers import ChatmlRenderer, Message, TrainOnWhat
from ptlab.tiny_models import guess_number, tic_tac_toe, twenty_questions
from ptlab.tiny_models.guess_number import guess_model
from ptlab.tiny_models.tic_tac_toe import tic_tac_toe_model
from ptlab.tiny_models.twenty_questions import OTHERS, SPLITTING, WORLD, questions_model

MODELS = [guess_model, tic_tac_toe_model, questions_model]


@pytest.mark.parametrize("make", MODELS)
def test_every_example_fits_the_context_and_ends_with_what_is_learned(make):
    model = make()
    tokenizer = train_tokenizer(model.tokenizer_texts(), model.shape.vocab_size)
    rng = Random(3)
    for stage in model.stages:
        for example in [stage.draw(rng) for _ in range(150)]:
            roles = [turn.role for turn in example.turns]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            assert [turn.learned for turn in example.turns] == [role == "assistant" for role in roles]
            text = "".join(chat_prompt(q.text) + a.text for q, a in zip(example.turns[::2], example.turns[1::2], strict=True))
            assert len(tokenizer(text)["input_ids"]) < model.shape.max_context_length - 50
    assert len(tokenizer("assistant\n")["input_ids"]) == 2  # the header is read every turn: it had better be short
    assert model.digest(0) == make().digest(0) != model.digest(1)


@pytest.mark.parametrize("make", MODELS)
def test_what_is_pretrained_is_what_a_rollout_shows_token_for_token(make):
    model = make()
    tokenizer = train_tokenizer(model.tokenizer_texts(), model.shape.vocab_size)
    renderer = ChatmlRenderer(tokenizer)
    rng = Random(4)
    for stage in model.stages:
        examples = [stage.draw(rng) for _ in range(30)]
        for example, (tokens, learned) in zip(examples, _encode(tokenizer, examples), strict=True):
            messages = [Message(role=turn.role, content=turn.text) for turn in example.turns]
            rendered, weights = renderer.build_supervised_example(messages, TrainOnWhat.ALL_ASSISTANT_MESSAGES)
            assert rendered.to_ints() == tokens and [bool(weight) for weight in weights] == learned
            for number in range(1, len(messages), 2):  # each turn's prompt begins the conversation that was trained on
                prompt = renderer.build_generation_prompt(messages[:number]).to_ints()
                assert tokens[: len(prompt)] == prompt


def replies(example) -> list[str]:
    return [turn.text for turn in example.turns if turn.learned]


def test_the_games_of_numbers_are_games():
    rng = Random(1)
    results = {"blind": [], "interval": []}
    for _ in range(1500):
        said = replies(guess_number.conversation(rng, mixture=guess_number.DEFAULT_MIXTURE, clean=False))
        guesses = [parse_guess(text) for text in said]
        assert None not in guesses and len(said) <= 10
        results["interval" if "-" in said[0] else "blind"].append(len(said))
    blind_share = len(results["blind"]) / 1500
    assert blind_share == pytest.approx(0.55, abs=0.05)  # four standard errors
    blind = expected_play("blind", size=32, tries=10)
    assert sum(results["blind"]) / len(results["blind"]) == pytest.approx(blind.guesses - (1 - blind.solved), abs=0.5)  # no 11th reply
    assert 4.22 < sum(results["interval"]) / len(results["interval"]) < 5.37


def test_intervals_are_what_the_hints_leave():
    env = GuessNumberEnv(20, guess_number.RULES)
    assert guess_number.interval_reply(env.possible, Random(0), halving=True) == "1-32 half 16"
    env.judge(16, "")
    env.judge(26, "")
    assert env.possible == (17, 25) and guess_number.interval_reply(env.possible, Random(0), halving=True) == "17-25 half 21"
    assert {guess_number.interval_reply(env.possible, Random(n), halving=False) for n in range(90)} == {
        f"17-25: {n}" for n in range(17, 26)
    }


def boards_and_replies(rng: Random, *, clean: bool, games: int):
    for _ in range(games):
        example = tic_tac_toe.conversation(rng, mixture=tic_tac_toe.DEFAULT_MIXTURE, clean=clean)
        for asked, said in zip(example.turns[::2], example.turns[1::2], strict=True):
            rows, you = asked.text.rsplit("\n", 1)
            board = "".join("." if c.isdigit() else c for c in rows if c not in "|\n")
            assert you == f"You are {to_move(board)}." and not is_over(board)
            yield board, said.text


def test_careful_moves_win_stop_or_play():
    for board, said in boards_and_replies(Random(1), clean=True, games=300):
        word, square = said.split(" ")[0], parse_move(said)
        mark = to_move(board)
        wins = tic_tac_toe.completing(board, mark)
        threats = tic_tac_toe.completing(board, "O" if mark == "X" else "X")
        assert word == ("win" if wins else "stop" if threats else "play")
        assert square in (wins or threats or free_squares(board))


def test_single_moves_are_boards_with_something_to_see():
    for n in range(200):
        asked, said = tic_tac_toe.one_move(Random(n)).turns
        assert said.text.split(" ")[0] in ("win", "stop", "play") and asked.text.count("|") == 6
        cells = asked.text.rsplit("\n", 1)[0]
        board = "".join("." if c.isdigit() else c for c in cells if c not in "|\n")
        assert not is_over(board) and (tic_tac_toe.completing(board, "X") or tic_tac_toe.completing(board, "O"))
        assert not said.text.startswith("play")


def test_hasty_moves_are_anywhere_and_sometimes_illegal():
    said = list(boards_and_replies(Random(1), clean=False, games=1500))
    hasty = [(board, text) for board, text in said if text.isdigit()]
    first = sum(text.isdigit() for board, text in said if board.count(".") == 9) / sum(board.count(".") == 9 for board, _ in said)
    assert first == pytest.approx(0.70, abs=0.1)
    later = [parse_move(text) in free_squares(board) for board, text in hasty if board.count(".") < 9]
    assert 1 - sum(later) / len(later) == pytest.approx(0.10, abs=0.03)


def test_the_world_is_sixteen_words_that_four_questions_tell_apart():
    assert len(WORLD) == len(set(WORLD)) == 16 and set(WORLD) <= set(WORDS)
    described = {tuple(twenty_questions.answer(word, question) for question in SPLITTING) for word in WORLD}
    assert len(described) == 16
    assert twenty_questions.answer("whale", "animal?") == "yes" and twenty_questions.answer("whale", "fast?") == "no"
    assert twenty_questions.answer("castle", "big?") == "yes" and twenty_questions.answer("canoe", "big?") == "no"
    assert all(sum(twenty_questions.answer(word, question) == "yes" for word in WORLD) == 2 for question in OTHERS)


def test_the_games_of_questions_are_games_with_true_answers():
    rng = Random(2)
    styles = {"wild": 0, "other": 0}
    for _ in range(1200):
        example = twenty_questions.corpus_example(rng, mixture=twenty_questions.DEFAULT_MIXTURE, clean=False)
        if len(example.turns) == 2 and ": " in example.turns[0].text:
            word, question = example.turns[0].text.split(": ")
            assert parse_answer(example.turns[1].text) == (twenty_questions.answer(word, question), True)
            continue
        said = replies(example)
        styles["wild" if all(text.startswith("Guess") for text in said) else "other"] += 1
        assert len(said) <= 8 and all(
            parse_word(text) in WORLD if text.startswith("Guess") else text in (*SPLITTING, *OTHERS) for text in said
        )
    assert styles["wild"] / sum(styles.values()) == pytest.approx(0.48, abs=0.07)  # wandering ones that guess at once and hit count in


def test_a_splitting_player_is_through_after_five():
    for n in range(200):
        said = replies(twenty_questions.game(Random(n), "splitting", twenty_questions.DEFAULT_MIXTURE))
        assert len(said) == 5 and tuple(said[:4]) == SPLITTING
