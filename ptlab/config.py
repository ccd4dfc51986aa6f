"""What a run is: RunConfig and its sections, read from YAML plus `--set` overrides.

Frozen, strict about types, unknown keys refused: a config that loads is one that can run, before a GPU is touched. Defaults are those
of the smallest useful run (the quickstart); YAML says only what differs. The string under a field is its documentation.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ptlab.config_messages import describe, sentences
from ptlab.errors import ConfigError
from ptlab.losses import LOSSES, resolve_loss


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversions (an int is a fine float, "3" is not an int)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------------------- model


class ModelConfig(Section):
    name: str = Field(default="ptlab/quickstart", min_length=1)
    """Base model: a Hugging Face hub id, or "ptlab/quickstart", which ptlab makes itself."""
    path: str | None = None
    """Local directory with the weights and tokenizer; None = cache or hub."""
    renderer: str | None = None
    """How messages become tokens ("qwen3", "llama3", ...); None = the one recommended for the model."""


class LoraSection(Section):
    rank: int = Field(default=16, ge=1, le=512)
    """Width of the two LoRA factors."""
    seed: int | None = None
    """Seed of the LoRA initialisation; None = the run's seed."""
    train_mlp: bool = True
    """LoRA on gate, up and down projections (and experts)."""
    train_attn: bool = True
    """LoRA on q, k, v and o projections."""
    train_unembed: bool = True
    """LoRA on the output head."""
    unembed: Literal["auto", "require"] = "auto"
    """What if the sampler cannot serve an adapter on the output head: auto = train without it and warn, require = refuse."""

    @model_validator(mode="after")
    def _something_trains(self) -> LoraSection:
        if not (self.train_mlp or self.train_attn or self.train_unembed):
            raise ValueError("train_mlp, train_attn and train_unembed are all false, so nothing would train; set at least one to true")
        return self


# ---------------------------------------------------------------------------------------------------------------------- env


class GroupsConfig(Section):
    """What every data set has: problems per step, attempts per problem, test problems."""

    groups_per_step: int = Field(default=16, ge=1)
    """Problems per training step (P)."""
    group_size: int = Field(default=8, ge=1)
    """Attempts at each problem (G)."""
    num_test: int = Field(default=250, ge=1)
    """Held-out problems that an evaluation asks, each once."""


class AdditionConfig(GroupsConfig):
    kind: Literal["addition"] = "addition"
    """Three-digit sums; made from the seed, nothing to download."""
    reward: Literal["correct", "random"] = "correct"
    """"random" pays by coin toss: the negative control, which must not learn."""


class Gsm8kConfig(GroupsConfig):
    kind: Literal["gsm8k"] = "gsm8k"
    """Grade-school word problems with a boxed number as the answer."""
    train_path: str | None = None
    """Local JSONL (question, answer), relative to the working directory; None = from the hub."""
    test_path: str | None = None
    """The same for the held-out problems; set both paths or neither."""
    hub_name: str = Field(default="openai/gsm8k", min_length=1)
    """Data set on the Hugging Face hub, used when no paths are set."""
    few_shot: bool = True
    """Put the strawberry example before each question."""
    format_coef: float = Field(default=0.1, ge=0)
    """reward = correct + format_coef x (boxed - 1)."""

    @model_validator(mode="after")
    def _both_paths_or_neither(self) -> Gsm8kConfig:
        if (self.train_path is None) != (self.test_path is None):
            given, absent = ("train_path", "test_path") if self.test_path is None else ("test_path", "train_path")
            raise ValueError(f"{given} is set but {absent} is not; set both (local files) or neither (hub {self.hub_name})")
        return self


EnvConfig = Annotated[AdditionConfig | Gsm8kConfig, Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------------------------------------- algorithm


class RolloutConfig(Section):
    max_tokens: int = Field(default=64, ge=1)
    """Longest single answer, tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature while training; log-probabilities are exact for the losses at 1.0 only."""
    top_k: int = Field(default=-1, ge=-1)
    """Sample among the k likeliest tokens; -1 or 0 = all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this mass; 1.0 = all."""
    max_turns: int = Field(default=1, ge=1)
    """Most answers per attempt; the quickstart and math tasks end after one."""
    max_steps_off_policy: int = Field(default=0, ge=0)
    """Sample that many steps ahead, while earlier steps train; 0 = sample, train, sample, train. A step then trains on answers of weights
    up to so many steps old, and the loss weighs them by the log-probabilities they were sampled with. See docs/quickstart.md."""


class LossConfig(Section):
    name: str = "importance_sampling"
    """One of ptlab.losses.LOSSES."""
    config: dict[str, float | str] = Field(default_factory=dict)
    """The loss's own numbers, e.g. clip_low_threshold; what is left out has its default."""

    @model_validator(mode="after")
    def _known(self) -> LossConfig:
        resolve_loss(self.name, self.config)
        return self


class GroupCentredConfig(Section):
    kind: Literal["group_centred"] = "group_centred"
    """advantage = reward - mean reward of the group."""


class OptimConfig(Section):
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW step size, at its highest."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(default=1e-12, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """Clip the global gradient norm to this; 0 = off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling towards 0 at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from learning_rate / warmup_steps."""

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0 .. steps - 1 of a run of `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        factor = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * factor


# ---------------------------------------------------------------------------------------------------------------------- machinery

DType = Literal["auto", "float32", "bfloat16"]


class PeftTrainerConfig(Section):
    kind: Literal["peft"] = "peft"
    """transformers + PEFT in this process."""
    dtype: DType = "auto"
    """Compute type of the base; auto = float32 on CPU, bfloat16 on GPU. LoRA weights are float32 always."""
    tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Tokens that go through the model at once; the gradient does not depend on it, memory does."""


class TorchSamplerConfig(Section):
    kind: Literal["torch"] = "torch"
    """The embedded sampler on transformers."""
    dtype: DType = "auto"
    """Compute type; auto = the trainer's."""


class VllmSamplerConfig(Section):
    kind: Literal["vllm"] = "vllm"
    """vLLM: in this process on the CPU, in its own process on a GPU."""
    dtype: DType = "auto"
    """Compute type; auto = the trainer's."""
    max_loras: int | None = Field(default=None, ge=1)
    """Adapter versions that can be in one batch; more take turns. None = 4 on a GPU, up to 32 on a CPU as their memory allows."""
    max_lora_rank: int | None = Field(default=None, ge=1, le=512)
    """Largest rank served; None = lora.rank."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, lt=1)
    """Share of the GPU's memory for vLLM's weights and KV cache; None = ptlab's memory plan decides."""


def _vllm_unless_said(section: Any) -> Any:
    """`engines.sampler.max_loras: 2` alone is about the default sampler."""
    return {"kind": "vllm", **section} if isinstance(section, dict) else section


SamplerConfig = Annotated[VllmSamplerConfig | TorchSamplerConfig, Field(discriminator="kind"), BeforeValidator(_vllm_unless_said)]


class EnginesConfig(Section):
    trainer: PeftTrainerConfig = PeftTrainerConfig()
    """Who computes gradients."""
    sampler: SamplerConfig = VllmSamplerConfig()
    """Who draws answers."""
    scratch_dir: str | None = None
    """Where versions lie that live only while someone samples from them; None = in RAM (/dev/shm) where there is room, else on disk."""


class EvalConfig(Section):
    every: int = Field(default=10, ge=0)
    """Evaluate before every n-th step and after the last; 0 = never."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of eval/accuracy (eval/accuracy_greedy is at 0)."""
    greedy: bool = True
    """Also report eval/accuracy_greedy."""


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=0)
    """Save the full state after every n-th step and after the last; 0 = only after the last and on Ctrl-C."""


class LoggingConfig(Section):
    tensorboard: bool = False
    """Also write TensorBoard events into the run directory (needs the package tensorboard)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""
    transcripts: int = Field(default=4, ge=0)
    """Trajectories per step that go to transcripts.jsonl."""


class RunConfig(Section):
    """Everything that decides a run's result, and where it is written."""

    recipe: Literal["rl"] = "rl"
    """Which loop of ptlab.recipes runs."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Name of the run directory: letters, digits, '.', '_', '-'. Default: the config file's name."""
    seed: int = Field(default=0, ge=0)
    """Seeds data order, sampling and (unless lora.seed is set) the LoRA initialisation."""
    steps: int = Field(default=30, ge=1)
    """Training steps."""
    run_dir: str = Field(default="runs", min_length=1)
    """Folder that holds the run directories."""
    model: ModelConfig = ModelConfig()
    """The frozen base model."""
    lora: LoraSection = LoraSection()
    """The weights that train."""
    env: EnvConfig = AdditionConfig()
    """The task."""
    rollout: RolloutConfig = RolloutConfig()
    """How answers are drawn while training."""
    loss: LossConfig = LossConfig()
    """What forward_backward computes."""
    advantage: GroupCentredConfig = GroupCentredConfig()
    """How rewards become advantages."""
    optim: OptimConfig = OptimConfig()
    """How gradients become weights."""
    engines: EnginesConfig = EnginesConfig()
    """What computes, and with which settings."""
    eval: EvalConfig = EvalConfig()
    """When and how held-out accuracy is measured."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved."""
    logging: LoggingConfig = LoggingConfig()
    """What is written beside metrics.jsonl."""

    @model_validator(mode="after")
    def _can_learn(self) -> RunConfig:
        if "advantages" not in LOSSES[self.loss.name].inputs:
            usable = ", ".join(name for name, loss in LOSSES.items() if "advantages" in loss.inputs)
            raise ValueError(f"loss {self.loss.name!r} takes no advantages, so recipe 'rl' cannot train with it; usable: {usable}")
        if self.advantage.kind == "group_centred" and self.env.group_size < 2:
            raise ValueError(
                f"env.group_size is {self.env.group_size}, advantage.kind 'group_centred' needs at least 2: "
                "an attempt alone in its group has advantage 0 and nothing trains"
            )
        if self.optim.warmup_steps > self.steps:
            raise ValueError(f"optim.warmup_steps is {self.optim.warmup_steps}, steps is {self.steps}; the warm-up must end within the run")
        return self

    @property
    def directory(self) -> Path:
        """Where this run is written."""
        return Path(self.run_dir) / self.name

    def to_yaml(self) -> str:
        """Every field, defaults included; load_config reads it back to an equal RunConfig."""
        return yaml.dump(self.model_dump(), Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------------------------------- loading


class _Yaml12Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 4e-5 is a float, `no` and 2026-11-21 are text; a key given twice is refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Yaml12Dumper(yaml.SafeDumper):
    """Quotes text that a reader of either YAML version would take for something else."""


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.?)(?:[eE][-+]?[0-9]+)?$", list("-+0123456789.")),
    ("float", r"^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", list("-+.")),
):
    for _class in (_Yaml12Loader, _Yaml12Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply `section.key=value` overrides (values are YAML), check all of it.

    The run's name defaults to the file's. Raises: ConfigError, one sentence for each mistake.
    """
    raw = _read_file(Path(path))
    raw.setdefault("name", Path(path).stem)
    changed = [_apply_override(raw, override) for override in overrides]
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as err:
        raise ConfigError("\n".join(sentences(err, RunConfig, raw, source=str(path), changed=changed))) from None
    _check_files(config, str(path))
    return config


def config_warnings(config: RunConfig) -> list[str]:
    """Settings that run but bias what is learnt; one sentence each."""
    rollout = config.rollout
    found = [
        text
        for value, neutral, text in (
            (rollout.temperature, (1.0,), f"rollout.temperature is {rollout.temperature}"),
            (rollout.top_k, (-1, 0), f"rollout.top_k is {rollout.top_k}"),
            (rollout.top_p, (1.0,), f"rollout.top_p is {rollout.top_p}"),
        )
        if value not in neutral
    ]
    reason = "the sampler's log-probabilities are then of a changed distribution, the trainer's are at temperature 1: ratios are biased"
    return [f"{text}: {reason}" for text in found]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" (did you mean {path.with_name(near[0])}?)" if near else ""
        raise ConfigError(f"{path}: cannot read the config file: {err.strerror}{hint}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text at byte {err.start}; needed a YAML file") from err
    raw = parse_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: found {describe(raw)} at the top, needed `key: value` pairs")
    return raw


def parse_yaml(text: str, where: str) -> Any:
    """One YAML value. Raises: ConfigError that begins with `where`."""
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except yaml.MarkedYAMLError as err:
        line = f" line {err.problem_mark.line + 1}:" if err.problem_mark is not None else ""
        raise ConfigError(f"{where}:{line} not valid YAML: {err.problem}") from err
    except (yaml.YAMLError, ValueError) as err:
        raise ConfigError(f"{where}: {err}") from err


def _apply_override(raw: dict[str, Any], override: str) -> str:
    """Set one dotted key in raw; returns the dotted key."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: needed section.key=value, e.g. --set optim.learning_rate=4e-5")
    node = raw
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[:depth])} is {describe(child)}, not a section")
        node = child
    node[keys[-1]] = parse_yaml(text, f"--set {override}")
    return ".".join(keys)


def _check_files(config: RunConfig, source: str) -> None:
    env = config.env
    paths = [("model.path", config.model.path)]
    if isinstance(env, Gsm8kConfig):
        paths += [("env.train_path", env.train_path), ("env.test_path", env.test_path)]
    for key, value in paths:
        if value is None:
            continue
        path = Path(value)
        if not path.exists():
            raise ConfigError(
                f"{source}: {key}: {value} does not exist (looked at {path.absolute()}); paths are relative to the working directory"
            )
        if (key == "model.path") != path.is_dir():
            wanted, found = ("a model directory", "a file") if key == "model.path" else ("a JSONL file", "a directory")
            raise ConfigError(f"{source}: {key}: {value} is {found}, needed {wanted}")
