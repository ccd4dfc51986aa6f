"""The wire by hand, for what the SDK cannot be made to do: httpx, and protobuf from the server's own schema."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from ptlab.server import wire_pb2
from tests.sdk.harness import API_KEY, BASE_MODEL

SENTENCE = [11, 45, 300, 77, 129, 5, 60, 411]
ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0}


def tensor(values: Sequence[float], dtype: str) -> wire_pb2.Tensor:
    """A dense one-dimensional tensor; dtype "int64" or "float32"."""
    kind = wire_pb2.DTYPE_INT64 if dtype == "int64" else wire_pb2.DTYPE_FLOAT32
    return wire_pb2.Tensor(dense=np.asarray(values, dtype=dtype).tobytes(), dtype=kind, shape=[len(values)])


def datum(tokens: Sequence[int] = SENTENCE, **inputs: Sequence[float]) -> wire_pb2.Datum:
    """A cross-entropy datum of all tokens, or one with these loss_fn_inputs beside target_tokens."""
    inputs = inputs or {"weights": [1.0] * (len(tokens) - 1)}
    made = wire_pb2.Datum(model_input=[wire_pb2.Chunk(encoded_text=wire_pb2.EncodedTextChunk(tokens=np.int32(tokens[:-1]).tobytes()))])
    made.loss_fn_inputs["target_tokens"].CopyFrom(tensor(tokens[1:], "int64"))
    for name, values in inputs.items():
        made.loss_fn_inputs[name].CopyFrom(tensor(values, "float32"))
    return made


class Client:
    """One session of a server."""

    def __init__(self, url: str, key: str = API_KEY) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=60.0)
        self.session_id: str = self.post("create_session", {"tags": [], "sdk_version": "0.38.0", "type": "create_session"})["session_id"]
        self._models = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.http.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A JSON call that must work."""
        response = self.http.post(path, json=body)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        answer: dict[str, Any] = response.json()
        return answer

    def model(self, *, rank: int = 8, seed: int = 1) -> str:
        """The id of a new model, ready."""
        lora = {"rank": rank, "seed": seed, "train_unembed": True, "train_mlp": True, "train_attn": True}
        body = {"session_id": self.session_id, "model_seq_id": self._models, "base_model": BASE_MODEL, "lora_config": lora}
        self._models += 1
        accepted = self.post("create_model", body)
        return str(self.result(accepted["request_id"])["model_id"])

    def sampler(self) -> str:
        """The id of a new sampling session of the base model."""
        body = {"session_id": self.session_id, "sampling_session_seq_id": 1000 + self._models, "base_model": BASE_MODEL}
        self._models += 1
        return str(self.post("create_sampling_session", body)["sampling_session_id"])

    def forward_backward(
        self,
        model_id: str,
        seq_id: int,
        data: Sequence[wire_pb2.Datum] | None = None,
        *,
        loss_fn: str = "cross_entropy",
        forward_only: bool = False,
    ) -> httpx.Response:
        request = wire_pb2.ForwardBackwardRequest(
            model_id=model_id, seq_id=seq_id, data=[datum()] if data is None else data, loss_fn=loss_fn, forward_only=forward_only
        )
        return self.post_proto(request.SerializeToString())

    def post_proto(self, body: Any, **headers: str) -> httpx.Response:
        """`body` (bytes, or an iterator of bytes: sent without a length) to forward_backward."""
        return self.http.post("forward_backward", content=body, headers={"content-type": "application/x-protobuf", **headers})

    def optim_step(self, model_id: str, seq_id: int) -> httpx.Response:
        return self.http.post("optim_step", json={"model_id": model_id, "seq_id": seq_id, "adam_params": ADAM, "type": "optim_step"})

    def sample(self, sampling_session_id: str, seq_id: int, *, tokens: Sequence[int] = SENTENCE, **params: Any) -> httpx.Response:
        body = {
            "sampling_session_id": sampling_session_id,
            "seq_id": seq_id,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]},
            "sampling_params": {"max_tokens": 4, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": 1, **params},
            "type": "sample",
        }
        return self.http.post("asample", json=body)

    def poll(self, request_id: str) -> httpx.Response:
        """One retrieve_future."""
        return self.http.post("retrieve_future", json={"request_id": request_id, "allow_metadata_only": False})

    def answer(self, request_id: str, *, timeout_s: float = 60.0) -> httpx.Response:
        """The answer of a future, once it is there."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            response = self.poll(request_id)
            if response.status_code != 408:
                return response
        raise TimeoutError(f"{request_id} has no answer after {timeout_s} s")

    def result(self, request_id: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """A JSON answer that is not a failure."""
        response = self.answer(request_id, timeout_s=timeout_s)
        assert response.status_code == 200, f"{response.status_code} {response.text}"
        found: dict[str, Any] = json.loads(response.content)
        assert "error" not in found, found
        return found

    def failure(self, accepted: httpx.Response) -> str:
        """The message of a request that was accepted and failed as the user's error."""
        assert accepted.status_code == 200, f"{accepted.status_code} {accepted.text}"
        response = self.answer(accepted.json()["request_id"])
        found = json.loads(response.content)
        assert response.status_code == 200 and found["category"] == "user", found
        return str(found["error"])

    def logprobs(self, model_id: str, seq_id: int) -> np.ndarray:
        """log p of SENTENCE under the model, by a forward of this number."""
        accepted = self.forward_backward(model_id, seq_id, forward_only=True)
        assert accepted.status_code == 200, accepted.text
        output = wire_pb2.ForwardBackwardOutput.FromString(self.answer(accepted.json()["request_id"]).content)
        return np.frombuffer(output.loss_fn_outputs[0].fields["logprobs"].data, dtype=np.float32)


def output_of(response: httpx.Response) -> wire_pb2.ForwardBackwardOutput:
    """A forward_backward answer, decoded."""
    assert response.headers["content-type"] == "application/x-protobuf", f"{response.headers['content-type']}: {response.text}"
    return wire_pb2.ForwardBackwardOutput.FromString(response.content)
