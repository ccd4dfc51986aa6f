"""Which environments a config can name. A new one is one file and one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ptlab.envs.addition import AdditionConfig
from ptlab.envs.code_problems import CodeConfig
from ptlab.envs.deepmath import DeepMathConfig
from ptlab.envs.gsm8k import Gsm8kConfig
from ptlab.envs.guess_number import GuessNumberConfig
from ptlab.envs.hendrycks_math import HendrycksMathConfig
from ptlab.envs.polaris import PolarisConfig
from ptlab.envs.preference import PreferenceConfig
from ptlab.envs.text_arena import TextArenaConfig
from ptlab.envs.tic_tac_toe import TicTacToeConfig
from ptlab.envs.tool_env import MathToolsConfig
from ptlab.envs.twenty_questions import TwentyQuestionsConfig

EnvConfig = Annotated[
    AdditionConfig  # three-digit sums, the quickstart
    | Gsm8kConfig
    | HendrycksMathConfig
    | PolarisConfig
    | DeepMathConfig
    | MathToolsConfig  # with a calculator and a Python tool
    | CodeConfig  # programs, judged by tests in a sandbox
    | GuessNumberConfig
    | TwentyQuestionsConfig
    | TicTacToeConfig
    | TextArenaConfig  # any game of the package textarena
    | PreferenceConfig,  # RLHF: replies that a reward model or another judge pays
    Field(discriminator="kind"),
]
"""The section of `env.kind`."""
