"""Configs: what loads, what is refused, and that every refusal is one sentence that names the place and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from ptlab.config import CONFIGS as CLASSES
from ptlab.config import OptimConfig, TorchSamplerConfig, VllmSamplerConfig, load_config
from ptlab.envs.addition import AdditionConfig
from ptlab.envs.gsm8k import Gsm8kConfig
from ptlab.errors import ConfigError
from ptlab.section import Section

RECIPES = ("rl", "sft", "reward_model", "dpo", "offline", "on_policy_distill", "prompt_distill")
CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert caught.value.category == "user"
    return caught.value.message


def test_an_empty_file_is_the_smallest_useful_run_named_after_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "", "first-try.yaml"))
    assert (config.name, config.recipe, config.directory) == ("first-try", "rl", Path("runs/first-try"))
    assert isinstance(config.env, AdditionConfig)
    assert (config.model.name, config.loss.name) == ("ptlab/quickstart", "importance_sampling")


@pytest.mark.parametrize("text", ["4e-5", "4.0e-5", "4E-5", ".00004", "0.00004", "+4e-05"])
def test_floats_need_no_dot_as_yaml_1_1_would(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, f"optim: {{learning_rate: {text}}}")).optim.learning_rate == 4e-5
    assert load_config(write(tmp_path, ""), [f"optim.learning_rate={text}"]).optim.learning_rate == 4e-5


def test_words_that_yaml_1_1_takes_for_booleans_and_dates_stay_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "name: 2026-11-21\nmodel: {name: no}")).model.name == "no"
    assert load_config(write(tmp_path, "name: 2026-11-21")).name == "2026-11-21"


def test_an_int_serves_as_a_float_but_nothing_else_is_converted(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "rollout: {temperature: 2}")).rollout.temperature == 2.0
    assert refusal(tmp_path, "lora: {rank: 1.5}").endswith("run.yaml: lora.rank: found 1.5, needed a whole number")
    assert refusal(tmp_path, "lora: {rank: true}").endswith("lora.rank: found true, needed a whole number")
    assert refusal(tmp_path, "lora: {rank: '8'}").endswith("lora.rank: found the text '8', needed a whole number")
    assert refusal(tmp_path, "optim: {learning_rate: fast}").endswith("found the text 'fast', needed a number")
    assert refusal(tmp_path, "lora: {train_mlp: 1}").endswith("found 1, needed true or false")
    assert refusal(tmp_path, "optim: {learning_rate: .inf}").endswith("found inf, needed a finite number")
    assert refusal(tmp_path, "seed:").endswith("seed: found nothing (null), needed a whole number")
    assert refusal(tmp_path, "optim: 3").endswith("optim: found 3, needed a section of `key: value` pairs")


def test_overrides_change_one_key_and_are_parsed_as_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {learning_rate: 1e-3, beta1: 0.5}")
    config = load_config(
        path, ["loss.name=cispo", "loss.config.clip_high_threshold=3", "optim.beta2=0.99", "lora.seed=null", "logging.tensorboard=true"]
    )
    assert (config.loss.name, config.loss.config) == ("cispo", {"clip_high_threshold": 3.0})
    assert (config.optim.learning_rate, config.optim.beta1, config.optim.beta2) == (1e-3, 0.5, 0.99)
    assert config.lora.seed is None
    assert config.logging.tensorboard is True


def test_the_last_of_two_overrides_holds(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), ["steps=3", "steps=5"]).steps == 5


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    assert refusal(tmp_path, "optim: {learning_rat: 1}").endswith("run.yaml: optim.learning_rat: unknown key (did you mean learning_rate?)")
    assert refusal(tmp_path, "", "optim.learning_rat=1") == "--set optim.learning_rat: unknown key (did you mean learning_rate?)"
    assert refusal(tmp_path, "engines: {trainer: {dtpye: x}}").endswith("engines.trainer.dtpye: unknown key (did you mean dtype?)")


def test_a_key_in_the_wrong_section_is_shown_its_place(tmp_path: Path) -> None:
    assert refusal(tmp_path, "learning_rate: 1").endswith("learning_rate: unknown key (did you mean optim.learning_rate?)")


def test_an_unlike_key_is_shown_what_the_section_knows(tmp_path: Path) -> None:
    assert "known here: every, temperature, greedy" in refusal(tmp_path, "eval: {zzz: 1}")


def test_keys_of_one_env_are_unknown_to_another(tmp_path: Path) -> None:
    message = refusal(tmp_path, "env: {kind: addition, hub_name: x}")
    assert "env.hub_name: unknown key (known here: " in message and "env.addition" not in message


def test_kinds_and_choices_name_the_known_ones(tmp_path: Path) -> None:
    wrong = refusal(tmp_path, "env: {kind: gsm8}")
    assert "env.kind: found 'gsm8', needed one of 'addition', 'gsm8k'," in wrong and wrong.endswith("(did you mean gsm8k?)")
    assert "env.kind: missing, needed one of 'addition', 'gsm8k'," in refusal(tmp_path, "env: {group_size: 8}")
    assert refusal(tmp_path, "recipe: rll").endswith(
        "recipe: found the text 'rll', needed one of " + ", ".join(RECIPES) + " (did you mean rl?)"
    )
    assert "optim.schedule: found the text 'lineer', needed 'constant', 'linear' or 'cosine' (did you mean linear?)" in refusal(
        tmp_path, "optim: {schedule: lineer}"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lora: {rank: 0}", "lora.rank: found 0, needed at least 1"),
        ("steps: 0", "steps: found 0, needed at least 1"),
        ("optim: {beta1: 1}", "optim.beta1: found 1, needed less than 1"),
        ("optim: {learning_rate: 0}", "optim.learning_rate: found 0, needed more than 0"),
        ("rollout: {top_p: 1.5}", "rollout.top_p: found 1.5, needed at most 1"),
        ("rollout: {temperature: 0}", "rollout.temperature: found 0, needed more than 0"),
        ("name: a/b", "name: found the text 'a/b', needed letters, digits, '.', '_' or '-', starting with a letter or digit"),
        ("name: ..", "name: found the text '..', needed letters, digits, '.', '_' or '-', starting with a letter or digit"),
    ],
)
def test_bounds_say_what_was_found_and_needed(tmp_path: Path, text: str, sentence: str) -> None:
    assert refusal(tmp_path, text).endswith(f"run.yaml: {sentence}")


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, "steps: 0\nlora: {rank: 0}\nloss: {config: {beta: [1]}}").splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "lora: {train_mlp: false, train_attn: false, train_unembed: false}",
            "lora: train_mlp, train_attn and train_unembed are all false",
        ),
        ("env: {kind: addition, group_size: 1}", "env.group_size is 1, advantage.kind 'group_centred' needs at least 2"),
        ("optim: {warmup_steps: 4}\nsteps: 3", "optim.warmup_steps is 4, steps is 3"),
        ("loss: {name: pppo}", "unknown loss 'pppo' (did you mean 'ppo'?)"),
        ("loss: {name: ppo, config: {beta: 1}}", "loss 'ppo': unknown config key 'beta'"),
        ("loss: {name: cross_entropy}", "loss 'cross_entropy' takes no advantages"),
        ("env: {kind: gsm8k, train_path: a.jsonl}", "env: train_path is set but test_path is not"),
    ],
)
def test_impossible_combinations_are_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


def test_data_files_are_looked_up_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "env: {kind: gsm8k, train_path: data/a.jsonl, test_path: data/b.jsonl}"
    message = refusal(tmp_path, text)
    assert f"env.train_path: data/a.jsonl does not exist (looked at {Path.cwd()}/data/a.jsonl)" in message
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    env = load_config(write(tmp_path, text)).env
    assert isinstance(env, Gsm8kConfig) and env.train_path == "data/a.jsonl"
    assert "model.path: data/a.jsonl is a file, needed a model directory" in refusal(tmp_path, "model: {path: data/a.jsonl}")
    assert "env.train_path: data is a directory, needed a JSONL file" in refusal(
        tmp_path, "env: {kind: gsm8k, train_path: data, test_path: data}"
    )


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"quikstart\.yaml: cannot read .*No such file.*did you mean .*quickstart\.yaml\?"):
        load_config(tmp_path / "quikstart.yaml")


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    assert "run.yaml: line 2: not valid YAML" in refusal(tmp_path, "steps: 3\noptim: {")
    assert "line 2: key 'steps' is given twice" in refusal(tmp_path, "steps: 3\nsteps: 4")
    assert "found a list at the top" in refusal(tmp_path, "- 1")
    assert "--set steps=[1: line 1: not valid YAML" in refusal(tmp_path, "", "steps=[1")


def test_malformed_overrides_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "steps") == "--set steps: needed section.key=value, e.g. --set optim.learning_rate=4e-5"
    assert "needed section.key=value" in refusal(tmp_path, "", "optim..beta1=1")
    assert refusal(tmp_path, "steps: 3", "steps.x=1") == "--set steps.x=1: steps is 3, not a section"


def test_a_config_is_immutable(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""))
    with pytest.raises(ValidationError):
        config.steps = 4  # type: ignore[misc]


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "loss: {name: ppo, config: {clip_low_threshold: 0.7}}\nname: '1e5'\nmodel: {name: 'no'}\noptim: {eps: 1e-9}")
    )
    assert load_config(write(tmp_path, config.to_yaml(), "resolved.yaml")) == config


def test_learning_rate_schedules() -> None:
    constant, linear = OptimConfig(learning_rate=1.0, warmup_steps=4), OptimConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
    assert [constant.learning_rate_at(step, 10) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert [linear.learning_rate_at(step, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert OptimConfig(learning_rate=2.0, schedule="cosine").learning_rate_at(5, 10) == pytest.approx(1.0, rel=1e-12)  # half way: cos = 0


def test_biased_sampling_is_warned_of(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "rollout: {top_k: 0, top_p: 1.0}")).warnings() == []
    warnings = load_config(write(tmp_path, "rollout: {temperature: 0.7, top_k: 50, top_p: 0.9}")).warnings()
    assert [warning.split(" is ")[0] for warning in warnings] == ["rollout.temperature", "rollout.top_k", "rollout.top_p"]


def test_every_field_of_every_config_is_documented() -> None:
    todo: list[type[Section]] = list(CLASSES.values())
    seen: set[type[Section]] = set()
    undocumented = []
    while todo:
        section = todo.pop()
        if section in seen:
            continue
        seen.add(section)
        for name, field in section.model_fields.items():
            undocumented += [] if field.description else [f"{section.__name__}.{name}"]
            todo += sections_in(field.annotation)
    assert undocumented == []
    assert {Gsm8kConfig, AdditionConfig, OptimConfig, TorchSamplerConfig, VllmSamplerConfig} <= seen


def sections_in(annotation: object) -> list[type[Section]]:
    """Sections in an annotation, also within unions, lists and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_configs_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    if "../shared/" in path.read_text(encoding="utf-8") and not Path("../shared/data").exists():
        pytest.skip("../shared/data is not beside this checkout")
    config = load_config(path)
    assert config.name == path.stem + ("_smoke" if path.parent.name == "smoke" else "")
    assert config.warnings() == []


def test_a_setting_of_the_default_sampler_needs_no_kind(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    assert load_config(tmp_path / "c.yaml", ["engines.sampler.max_loras=2"]).engines.sampler == VllmSamplerConfig(max_loras=2)
    assert load_config(tmp_path / "c.yaml", ["engines.sampler.kind=torch"]).engines.sampler == TorchSamplerConfig()
    with pytest.raises(ConfigError, match=r"engines\.sampler\.max_loras: unknown key"):
        load_config(tmp_path / "c.yaml", ["engines.sampler.kind=torch", "engines.sampler.max_loras=2"])
