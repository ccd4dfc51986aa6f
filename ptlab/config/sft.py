"""SftConfig: supervised fine-tuning on conversations, recipes/sft.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ptlab.config.rl import EvalConfig, RolloutConfig
from ptlab.config.run import RunConfig
from ptlab.envs.table import EnvConfig
from ptlab.section import Section


class ConversationsConfig(Section):
    kind: Literal["conversations"] = "conversations"
    """Rows with `messages`, ShareGPT `conversations`, or `prompt` and `completion` (envs/conversations.py)."""
    train_path: str | None = None
    """Local file (JSONL, JSON list, parquet), relative to the working directory; None = from the hub."""
    test_path: str | None = None
    """The same for the held-out conversations; None with a train_path: the last num_test rows of train_path."""
    hub_name: str = Field(default="allenai/tulu-3-sft-mixture", min_length=1)
    """Data set on the Hugging Face hub, used when train_path is not set."""
    subset: str | None = None
    """Configuration of the hub data set ("main", ...)."""
    split: str = Field(default="train", min_length=1)
    """Split of the hub data set to train on."""
    test_split: str | None = None
    """Split of the held-out conversations; None = the last num_test rows of `split`."""
    num_train: int | None = Field(default=None, ge=1)
    """Use only the first rows; None = all."""
    num_test: int = Field(default=250, ge=1)
    """Held-out conversations."""

    @model_validator(mode="after")
    def _test_needs_train(self) -> ConversationsConfig:
        if self.test_path is not None and self.train_path is None:
            raise ValueError(f"test_path is set but train_path is not; set both (local files) or neither (hub {self.hub_name})")
        return self

    def files(self) -> Mapping[str, str | None]:
        return {"train_path": self.train_path, "test_path": self.test_path}


class MadeSumsConfig(Section):
    kind: Literal["sums"] = "sums"
    """Three-digit sums with careful answers, column by column; made from the seed, nothing to download (envs/made_sums.py)."""
    num_train: int = Field(default=2000, ge=1)
    """Conversations to train on."""
    num_test: int = Field(default=250, ge=1)
    """Held-out conversations, on pairs that are in no training conversation."""
    answers: Literal["right", "shuffled"] = "right"
    """"shuffled" deals the answers out to other questions: the negative control, which must not learn to add."""

    def files(self) -> Mapping[str, str | None]:
        return {}


SftDataConfig = Annotated[ConversationsConfig | MadeSumsConfig, Field(discriminator="kind")]


class BatchConfig(Section):
    conversations: int | None = Field(default=None, ge=1)
    """Conversations per step; None = as `tokens` says, or 32 if neither is set."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens per step, prompts included: as many conversations as fit, at least one."""

    @model_validator(mode="after")
    def _one_of_two(self) -> BatchConfig:
        if self.conversations is not None and self.tokens is not None:
            raise ValueError(f"conversations is {self.conversations} and tokens is {self.tokens}; set one of the two")
        return self


class SftEvalConfig(EvalConfig):
    env: EnvConfig | None = None
    """Also ask a task's held-out problems, with generation: eval/accuracy. None = eval/nll and eval/perplexity only."""
    rollout: RolloutConfig = RolloutConfig()
    """How `env` is sampled."""


class SftConfig(RunConfig):
    """Everything that decides the result of supervised fine-tuning."""

    recipe: Literal["sft"] = "sft"
    """Imitate conversations."""
    data: SftDataConfig = MadeSumsConfig()
    """What to imitate."""
    train_on_what: Literal[
        "last_assistant_message",
        "last_assistant_turn",
        "all_assistant_messages",
        "all_messages",
        "all_tokens",
        "all_user_and_system_messages",
        "customized",
    ] = "all_assistant_messages"
    """Which tokens have weight 1: what these authors write and where they end; "customized": messages with trainable: true."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens kept of each conversation, from its start; None = as the model's context allows."""
    batch: BatchConfig = BatchConfig()
    """How much a step trains on."""
    eval: SftEvalConfig = SftEvalConfig()
    """When and how held-out conversations are scored."""

    def files(self) -> Mapping[str, str | None]:
        env_files = {} if self.eval.env is None else {f"eval.env.{key}": path for key, path in self.eval.env.files().items()}
        return {**{f"data.{key}": path for key, path in self.data.files().items()}, **env_files}
