"""The formula by hand, and where the width comes from."""

from __future__ import annotations

import json

import pytest

from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.learning_rates import get_learning_rate, main, read_hidden_size


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 4096, 2.857e-4),  # 5e-4 x (2000/4096)^0.781
        ("meta-llama/Llama-3.3-70B-Instruct", 8192, 1.663e-4),
        ("Qwen/Qwen3-8B", 4096, 4.730e-4),
        ("somebody/model", 2000, 5e-4),
        ("somebody/model", 4096, 4.730e-4),
    ],
)
def test_the_formula(name, width, expected):
    rate = get_learning_rate(name, width)
    assert rate.value == pytest.approx(expected, rel=1e-3)
    assert get_learning_rate(name, width, is_lora=False).value == pytest.approx(expected / 10, rel=1e-3)
    assert rate.family == ("llama" if "llama" in name.lower() else "qwen" if "qwen" in name.lower() else None)


def test_a_width_that_is_none_is_refused():
    with pytest.raises(InvalidRequestError, match="hidden_size is 0"):
        get_learning_rate("x", 0)


def test_the_width_is_read_from_the_model_config(tmp_path, tiny_qwen3_dir):
    assert read_hidden_size(str(tiny_qwen3_dir)) == 64
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1, "text_config": {"hidden_size": 96}}))
    assert read_hidden_size(str(tmp_path)) == 96
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 768}))
    assert read_hidden_size(str(tmp_path)) == 768
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="none of hidden_size"):
        read_hidden_size(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hidden_size(str(tmp_path))


def test_the_command_prints_one_line(tmp_path, capsys):
    directory = tmp_path / "Qwen3-test"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"hidden_size": 4096}))
    assert main([str(directory)]) == 0
    assert capsys.readouterr().out.startswith("0.00047   (family qwen, hidden size 4096")
    assert main([str(directory), "--full"]) == 0 and capsys.readouterr().out.startswith("4.7e-05")
    (directory / "config.json").unlink()
    assert main([str(directory)]) == 2 and "cannot be read" in capsys.readouterr().err
