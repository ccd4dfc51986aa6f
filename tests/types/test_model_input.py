"""ModelInput and its chunks."""

from __future__ import annotations

import base64
import copy
import json
import pickle

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ptlab.types import DmelChunk, EncodedTextChunk, ImageAssetPointerChunk, ImageChunk, ModelInput


def test_tokens_there_and_back() -> None:
    prompt = ModelInput.from_ints([1, 2]).append_int(3).append(EncodedTextChunk(tokens=(4, 5)))
    assert prompt.to_ints() == [1, 2, 3, 4, 5] and prompt.length == 5 and len(prompt.chunks) == 3
    assert ModelInput.empty().to_ints() == [] and ModelInput.empty().length == 0


def test_appending_leaves_the_original() -> None:
    prompt = ModelInput.from_ints([1])
    assert prompt.append_int(2) != prompt and prompt.to_ints() == [1]


def test_tokens_must_be_integers_in_a_sequence() -> None:
    assert ModelInput.from_ints([np.int64(3), 4.0]).to_ints() == [3, 4]  # type: ignore[list-item]
    for wrong in (np.array([1, 2]), torch.tensor([1, 2]), [1.5], ["a"]):
        with pytest.raises(ValidationError):
            ModelInput.from_ints(wrong)  # type: ignore[arg-type]


def test_it_is_a_value_with_equality_and_without_a_hash() -> None:
    prompt = ModelInput.from_ints([1, 2])
    assert prompt == ModelInput.from_ints([1, 2]) != ModelInput.from_ints([1, 3])
    assert pickle.loads(pickle.dumps(prompt)) == copy.deepcopy(prompt) == prompt
    with pytest.raises(TypeError):
        hash(prompt)
    with pytest.raises(ValidationError, match="frozen"):
        prompt.chunks = []
    with pytest.raises(ValidationError, match="extra"):
        ModelInput(chunks=[], token=1)  # type: ignore[call-arg]


def test_chunks_are_known_by_their_type() -> None:
    prompt = ModelInput.model_validate(
        {"chunks": [{"type": "encoded_text", "tokens": [1]}, {"type": "image", "data": "aGk=", "format": "png"}]}
    )
    assert isinstance(prompt.chunks[0], EncodedTextChunk) and isinstance(prompt.chunks[1], ImageChunk)
    assert prompt.chunks[1].data == b"hi"
    with pytest.raises(ValidationError):
        ModelInput.model_validate({"chunks": [{"type": "video"}]})


def test_images_have_a_length_only_if_it_is_expected() -> None:
    image = ImageChunk(data=b"\x89PNG", format="png", expected_tokens=7)
    assert ModelInput(chunks=[EncodedTextChunk(tokens=[1]), image]).length == 8
    for unknown in (ImageChunk(data=b"", format="jpeg"), ImageAssetPointerChunk(format="png", location="x")):
        with pytest.raises(ValueError, match="expected_tokens"):
            _ = unknown.length
    with pytest.raises(ValueError, match="chunk 0 is 'image'"):
        ModelInput(chunks=[image]).to_ints()


def test_bytes_travel_as_base64_in_json() -> None:
    image = ImageChunk(data=b"\xff\x00", format="png")
    assert json.loads(image.model_dump_json())["data"] == base64.b64encode(b"\xff\x00").decode()
    assert ImageChunk.model_validate_json(image.model_dump_json()) == image


@pytest.mark.parametrize(
    ("header", "length"),
    [(bytes([0, 2, 5, 3]), 5), (bytes([254, 7, 1, 0x80 | 44, 2]), 300)],  # 0b10_0101100 = 300 in two varint bytes
)
def test_audio_length_is_the_first_dimension_of_its_header(header: bytes, length: int) -> None:
    assert DmelChunk(dmel=header + b"payload").length == length


@pytest.mark.parametrize("header", [b"", bytes([254]), bytes([8, 1, 1]), bytes([0, 2, 0x85]), bytes([0, 0]), bytes([0, 1] + [0xFF] * 10)])
def test_a_broken_audio_header_is_refused(header: bytes) -> None:
    with pytest.raises(ValueError, match="DmelChunk"):
        _ = DmelChunk(dmel=header).length
