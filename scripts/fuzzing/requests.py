"""Requests for scripts/fuzz_server.py: valid ones, nearly valid ones, and garbage, from a random generator and the names that are known.

JSON bodies follow the JSON schema of the pydantic model that the route reads, with names of things that exist in the fields of that name;
then values, texts and bytes of them are damaged.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import zstandard
from pydantic import BaseModel

from ptlab.server import wire_pb2
from scripts.fuzzing.names import DATES, EITHER, GRAPH, JUNK, LOSSES, NUMBERS, PASS, RARE, SHAPES, TRICKS, Json, Known


class Maker:
    """Makes the parts of one request.

    Args:
        known: what exists; names of others among it.
    """

    def __init__(self, rng: random.Random, known: Known) -> None:
        self.rng = rng
        self.known = known
        self._model: str | None = None

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # -- names

    def name(self, what: Sequence[str]) -> str:
        """A known name, mostly as it is."""
        if self.chance(0.04):
            return self.rng.choice(TRICKS)
        name = self.rng.choice(what)
        if self.chance(0.05):
            at = self.rng.randrange(len(name) + 1)
            return name[:at] + self.rng.choice(TRICKS[:-2]) + name[at + self.rng.randrange(3) :]
        return name

    def model(self) -> str:
        self._model = self.name(self.known.models)
        return self._model

    def seq_id(self) -> int:
        """Mostly the number whose turn it is."""
        fate = self.rng.random()
        if fate < 0.7:
            return self.known.next_seq_id(self._model or self.known.models[0])
        return self.rng.randrange(12) if fate < 0.9 else self.rng.choice((0, 1, 99_000, 2**31 - 1, 2**40, 2**63 - 1))

    def number(self) -> int:
        return self.rng.randrange(40) if self.chance(0.9) else self.rng.choice((10**9, 2**63 - 1))

    def path(self) -> str:
        return self.name(self.known.paths)

    def base_or_path(self) -> str:
        return self.known.base_model if self.chance(0.7) else self.path()

    def _named(self) -> dict[str, Callable[[], Json]]:
        known, rng = self.known, self.rng
        return {
            "session_id": lambda: self.name(known.sessions),
            "last_session_id": lambda: self.name(known.sessions),
            "model_id": self.model,
            "sampling_session_id": self.sampler,
            "request_id": lambda: self.name(known.requests),
            "seq_id": self.seq_id,
            "model_seq_id": self.number,
            "sampling_session_seq_id": self.number,
            "custom_loss_seq_id": self.number,
            "cloned_sampler_id": lambda: rng.randrange(2),
            "path": lambda: self.path() if self.chance(0.5) else f"name-{rng.randrange(30)}",
            "tinker_path": self.path,
            "source_path": self.path,
            "model_path": self.path,
            "base_model": lambda: known.base_model if self.chance(0.9) else rng.choice(TRICKS),
            "model": self.base_or_path,
            "ttl_seconds": lambda: rng.choice((None, 60, 3600, 10**6, 1)),
            "tokens": lambda: [rng.randrange(8) for _ in range(rng.randrange(1, 6))],
            "max_tokens": lambda: rng.randrange(1, 24),
            "num_samples": lambda: rng.randrange(1, 4),
            "n": lambda: rng.randrange(1, 4),
            "rank": lambda: rng.choice((0, 1, 1, 2, 2, 8)),
            "chunks": lambda: [
                {"type": "encoded_text", "tokens": [rng.randrange(8) for _ in range(n)]} for n in range(1, rng.randrange(2, 4))
            ],
            "top_p": lambda: rng.choice((1.0, 0.9, 1e-9)),
            "seed": lambda: rng.randrange(2**40),
            "temperature": lambda: rng.choice((0.0, 0.5, 1.0, 2.0)),
            "timeout": lambda: rng.choice((0.0, 0.01, 0.2)),
            "kind": lambda: "snapshot",
            "graph": lambda: GRAPH,
            "project_id": lambda: f"project-{rng.randrange(9)}",
            "user_metadata": lambda: {f"k{rng.randrange(4)}": rng.choice(("v", "\u00e9\U0001f600", "")) for _ in range(rng.randrange(3))},
        }

    def sampler(self) -> str:
        self._model = self.name(self.known.samplers)
        return self._model

    # -- JSON

    def json_of(self, kind: type[BaseModel]) -> dict[str, Json]:
        """A body that is mostly valid."""
        schema = kind.model_json_schema()
        made: dict[str, Json] = self._value(schema, schema.get("$defs", {}), 0)
        return made

    def _value(self, schema: Mapping[str, Json], defs: Mapping[str, Json], depth: int) -> Json:
        rng = self.rng
        if "$ref" in schema:
            return self._value(defs[schema["$ref"].rpartition("/")[2]], defs, depth + 1)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self._value(rng.choice(schema[union]), defs, depth + 1)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                return self._object(schema, defs, depth)
            case "array":
                few = max(schema.get("minItems", 0), 0 if depth > 6 else rng.randrange(4))
                return [self._value(schema.get("items", {}), defs, depth + 1) for _ in range(few)]
            case "integer":
                return rng.choice((1, 2, 5)) if self.chance(0.8) else rng.choice(NUMBERS)
            case "number":
                return rng.choice((0.0, 0.1, 1.0)) if self.chance(0.8) else rng.choice(NUMBERS)
            case "boolean":
                return self.chance(0.5)
            case "null":
                return None
            case "string" if schema.get("format") == "date-time":
                return rng.choice(DATES)
            case "string":
                return rng.choice(("a", "name", "1+2=", "aGVsbG8=")) if self.chance(0.8) else rng.choice(TRICKS)
            case _:
                return rng.choice(JUNK)

    def _object(self, schema: Mapping[str, Json], defs: Mapping[str, Json], depth: int) -> dict[str, Json]:
        named, required = self._named(), list(schema.get("required", ()))
        left_out: Sequence[str] = ()
        made: dict[str, Json] = {}
        if schema.get("title") in EITHER and self.chance(0.9):
            these, those = EITHER[schema["title"]]
            needed, left_out = (these, those) if self.chance(0.5) else (those, these)
            required += needed
        # a body's number belongs to the model or sampler that it names: that one is drawn first
        for key, part in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] == "seq_id"):
            if key in left_out or (key not in required and not self.chance(0.05 if key in RARE else 0.5)):
                continue
            made[key] = named[key]() if key in named and self.chance(0.95) else self._value(part, defs, depth + 1)
        return made

    def damaged(self, value: Json) -> Json:
        """The value with one thing in it changed."""
        rng = self.rng
        if isinstance(value, dict) and value and self.chance(0.85):
            copy, key = dict(value), rng.choice(sorted(value))
            fate = rng.random()
            if fate < 0.25:
                del copy[key]
            elif fate < 0.35:
                copy[rng.choice(TRICKS)] = copy.pop(key)
            elif fate < 0.45:
                copy[rng.choice(("", "type", "model_config", "__class__", "\ud800", key + " "))] = rng.choice(JUNK)
            else:
                copy[key] = self.damaged(value[key])
            return copy
        if isinstance(value, list) and value and self.chance(0.7):
            at = rng.randrange(len(value))
            if self.chance(0.15):
                return value * rng.choice((2, 300))
            return [*value[:at], self.damaged(value[at]), *value[at + 1 :]]
        return rng.choice(TRICKS) if self.chance(0.3) else rng.choice(JUNK)

    def as_text(self, value: Json) -> bytes:
        """JSON, sometimes in a way that parsers disagree on."""
        text = json.dumps(value, ensure_ascii=self.chance(0.7))
        encoded = text.encode("utf-8", "surrogatepass")
        match self.rng.randrange(40):
            case 0:
                return b"\xef\xbb\xbf" + encoded
            case 1:
                return text.encode("utf-16", "surrogatepass")
            case 2:
                return encoded + self.rng.choice((b"x", b"{}", b"\x00", b" \n\t"))
            case 3:
                return encoded[: self.rng.randrange(len(encoded) + 1)]
            case 4:
                return encoded[:-1] + b"," + encoded[1:]  # every key twice
            case 5:
                return encoded.replace(b":", b": ", 1).replace(b"1", b"1e999", 1)
            case 6:
                return self.flipped(encoded)
            case _:
                return encoded

    def garbage(self) -> bytes:
        """A body that is no JSON object."""
        rng = self.rng
        match rng.randrange(8):
            case 0:
                return b""
            case 1:
                return rng.randbytes(rng.randrange(1, 400))
            case 2:
                return b"[" * rng.choice((10, 500, 100_000))
            case 3:
                return b'{"a":' * rng.choice((10, 500, 60_000)) + b"1"
            case 4:
                return b'{"model_id": "' + b"\xff\xfe\xc0\x80" + b'"}'
            case 5:
                return b'{"session_id": ' + b"9" * rng.choice((20, 5000)) + b"}"
            case 6:
                return b'"' + b"\\ud83d" * rng.randrange(1, 200) + b'"'
            case _:
                return json.dumps(rng.choice(JUNK)).encode("utf-8", "surrogatepass")

    def flipped(self, data: bytes) -> bytes:
        """The bytes with a few bits turned, cut off, doubled, or with something in between."""
        rng, changed = self.rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            if not changed:
                break
            at = rng.randrange(len(changed))
            match rng.randrange(6):
                case 0:
                    del changed[at:]
                case 1:
                    changed[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 2:
                    del changed[at : at + rng.randrange(1, 9)]
                case 3:
                    changed[at:at] = changed[: rng.randrange(64)]
                case _:
                    changed[at] ^= 1 << rng.randrange(8)
        return bytes(changed)

    # -- protobuf

    def training_pass(self) -> bytes:
        """A ForwardBackwardRequest that is mostly valid."""
        rng = self.rng
        message = wire_pb2.ForwardBackwardRequest(model_id=self.model() or "m", loss_fn=rng.choice(LOSSES), forward_only=self.chance(0.3))
        message.seq_id = max(-(2**31), min(self.seq_id(), 2**31 - 1))
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            self._add_datum(message)
        if self.chance(0.3):
            message.loss_fn_config_v2[rng.choice(("loss_id", "clip_low_threshold", "kl_coeff", "x"))].number = float(
                rng.choice(NUMBERS[:15])
            )
        if self.chance(0.1):
            message.loss_fn_config_v2["loss_id"].text = rng.choice(TRICKS[:20])
        return bytes(message.SerializeToString())

    def _add_datum(self, message: Any) -> None:
        rng, datum = self.rng, message.data.add()
        length = rng.choice((1, 3, 3, 7, 40))
        tokens = [rng.randrange(8) if self.chance(0.99) else rng.choice((-1, 8, 2**31 - 1)) for _ in range(length)]
        datum.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
        if self.chance(0.03):
            datum.model_input.add().image.data = rng.randbytes(9)
        if self.chance(0.02):
            datum.model_input.add().dmel.dmel = rng.randbytes(9)
        for name in ("target_tokens", *rng.choice((("weights",), ("advantages", "logprobs"), ("advantages", "logprobs"), ("nonsense",)))):
            if self.chance(0.95):
                self._fill(datum.loss_fn_inputs[name], name, length if self.chance(0.95) else rng.randrange(9))
        if self.chance(0.25):
            for spans in (datum.model_input_spans, datum.loss_fn_input_spans):
                span = spans.add()
                part = span.sampled_tokens if self.chance(0.5) else span.prompt_tokens
                part.sequence_id, part.offset = self.name(self.known.sequences), rng.choice((0, 0, 1, -1, 2**62))
                part.length = rng.choice((length, length, 1, 0, -5, 2**62))

    def _fill(self, tensor: Any, name: str, length: int) -> None:
        rng, is_tokens = self.rng, name == "target_tokens"
        if is_tokens:
            values = np.array([rng.randrange(8) for _ in range(length)], "<i8")
        else:
            values = np.array(
                [rng.choice((0.0, 1.0, -1.0, -0.5)) if self.chance(0.99) else rng.choice(NUMBERS[-9:]) for _ in range(length)]
            )
            with np.errstate(over="ignore"):
                values = values.astype("<f4")
        tensor.dtype = (2 if is_tokens else 1) if self.chance(0.97) else rng.randrange(5)
        if self.chance(0.05):
            tensor.sparse_csr.values = values.tobytes()
            tensor.sparse_csr.crow_indices = np.array([0, *range(1, length + 1)][: rng.choice((1, 2, length + 1))], "<i8").tobytes()
            tensor.sparse_csr.col_indices = np.array([rng.choice((0, 0, 1, -1, 2**40)) for _ in range(length)], "<i8").tobytes()
            tensor.shape.extend(rng.choice(((length, 1), (length, 8), (2**31, 2**31), (length,), (-1, 3), ())))
            return
        tensor.dense = values.tobytes() if self.chance(0.97) else rng.randbytes(rng.randrange(40))
        if self.chance(0.1):
            tensor.shape.extend(rng.choice(((length,), (length, 1), (0,), (-1,), (2**62, 4), (1,) * 40)))

    def zstd(self, body: bytes) -> bytes:
        """The body compressed, sometimes damaged, several times over, or a bomb."""
        rng = self.rng
        match rng.randrange(12):
            case 0:
                return self.flipped(zstandard.compress(body))
            case 1:
                return zstandard.compress(bytes(rng.choice((10**5, 10**7, 5 * 10**7))))
            case 2:
                return zstandard.compress(zstandard.compress(body))
            case 3:
                return zstandard.compress(body) * 2
            case 4:
                return zstandard.ZstdCompressor(write_content_size=False).compress(body)
            case 5:
                return b"\x28\xb5\x2f\xfd" + rng.randbytes(rng.randrange(40))
            case _:
                return bytes(zstandard.compress(body))

    # -- the whole

    def body(self, template: str) -> tuple[bytes, str]:
        """(body, content type) for a route."""
        shape, fate = SHAPES.get(template), self.rng.random()
        if shape == PASS:
            made = self.training_pass()
            return (made if fate < 0.6 else self.flipped(made) if fate < 0.9 else self.rng.randbytes(self.rng.randrange(300))), (
                "application/x-protobuf"
            )
        if not isinstance(shape, type) or fate < 0.1:
            return (self.garbage() if self.chance(0.5) else b""), "application/json"
        value = self.json_of(shape)
        while fate > 0.6 and self.chance(0.7):
            value = self.damaged(value)
        return (self.as_text(value) if fate > 0.5 else json.dumps(value).encode("utf-8", "surrogatepass")), "application/json"

    def target(self, template: str) -> str:
        """Path and query of a request line; every byte that HTTP does not allow there is escaped."""
        path = template
        for parameter, names in {
            "{run}": self.known.models,
            "{session_id}": self.known.sessions,
            "{sampling_session_id}": self.known.samplers,
            "{checkpoint:path}": [path.partition("://")[2].partition("/")[2] for path in self.known.paths],
            "{model:path}": [self.known.base_model, *self.known.paths],
            "{path:path}": ["x", "usage/2026"],
        }.items():
            if parameter in path:
                path = path.replace(parameter, self._escaped(self.name(names)))
        if "{" in path.replace(template, ""):
            raise ValueError(f"no names for the parameters of {template}")
        if self.chance(0.02):
            path = self.rng.choice((path + "/", "/" + path, path.replace("/", "//"), path.upper(), path + "/../healthz", path + ";x=1"))
        return path + self._query(template)

    def _escaped(self, name: str) -> str:
        """With the percent signs that are there left alone, and slashes as they are or escaped."""
        return quote(name.encode("utf-8", "surrogatepass"), safe=":%-._~" + ("/" if self.chance(0.8) else ""))

    def _query(self, template: str) -> str:
        rng = self.rng
        if template.endswith("/download"):
            query = rng.choice(self.known.urls)
            return query if self.chance(0.3) else quote(self.flipped(query.encode()), safe="?&=%:/._-")
        if self.chance(0.6):
            return ""
        keys = ("limit", "offset", "access_scope", "project_id", "checkpoint_type", "x", "owner", "key", "limit")
        values = (
            "0",
            "1",
            "100",
            "-1",
            "1e9",
            "100000",
            "99999999999999999999",
            "owned",
            "accessible",
            "",
            "null",
            "%00",
            "\u0661",
            "a%2fb",
        )
        pairs = [f"{rng.choice(keys)}={quote(rng.choice((*values, *TRICKS[:30])), safe='%')}" for _ in range(rng.randrange(1, 4))]
        return "?" + "&".join(pairs)
