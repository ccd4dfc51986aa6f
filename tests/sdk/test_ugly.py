"""What goes wrong between a client and a server: lost, doubled, late, broken, hostile and far too large requests; killed processes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tests.sdk import harness, raw
from tests.sdk.proxy import Proxy

MIB = 2**20
STEPS = 6


@pytest.fixture
def client(server: harness.Server) -> Iterator[raw.Client]:
    with raw.Client(server.url) as opened:
        yield opened


def request_id(accepted: httpx.Response) -> str:
    assert accepted.status_code == 200, f"{accepted.status_code} {accepted.text}"
    return str(accepted.json()["request_id"])


def trained_logprobs(client: raw.Client, *, steps: int = 1) -> np.ndarray:
    """log p after so many steps on SENTENCE, everything in order."""
    model = client.model()
    for step in range(steps):
        client.forward_backward(model, 2 * step + 1)
        client.result(request_id(client.optim_step(model, 2 * step + 2)))
    return client.logprobs(model, 2 * steps + 1)


# ---- order -------------------------------------------------------------------------------------------------------------------------


def test_requests_that_come_out_of_order_run_in_order(client: raw.Client) -> None:
    model = client.model()
    late = request_id(client.forward_backward(model, 4, forward_only=True))
    step = request_id(client.optim_step(model, 3))
    second = request_id(client.forward_backward(model, 2))
    with pytest.raises(httpx.ReadTimeout):
        client.http.post("retrieve_future", json={"request_id": step}, timeout=2.0)  # waits for number 1
    first = request_id(client.forward_backward(model, 1))
    client.result(step)
    before = raw.output_of(client.answer(first)).metrics["loss:sum"]
    assert raw.output_of(client.answer(second)).metrics["loss:sum"] == pytest.approx(before, rel=1e-5)
    after = raw.output_of(client.answer(late)).metrics["loss:sum"]
    assert after < before - 0.1
    plain = client.model()  # two gradients, then one step
    client.forward_backward(plain, 1), client.forward_backward(plain, 2)
    client.result(request_id(client.optim_step(plain, 3)))
    np.testing.assert_allclose(-client.logprobs(plain, 4).sum(), after, rtol=1e-4)


def test_a_refused_request_uses_its_number_up(client: raw.Client) -> None:
    model = client.model()
    assert "made_up" in client.failure(client.forward_backward(model, 1, loss_fn="made_up"))
    refused = client.http.post("optim_step", json={"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": "fast"}})
    assert refused.status_code in (200, 400)
    client.forward_backward(model, 3)
    client.result(request_id(client.optim_step(model, 4)), timeout_s=10.0)
    np.testing.assert_allclose(client.logprobs(model, 5), trained_logprobs(client), atol=1e-5)


def test_the_same_post_twice_is_one_request(client: raw.Client) -> None:
    model = client.model()
    assert request_id(client.forward_backward(model, 1)) == request_id(client.forward_backward(model, 1))
    steps = [request_id(client.optim_step(model, 2)) for _ in range(3)]
    client.result(steps[0])
    steps.append(request_id(client.optim_step(model, 2)))  # also after the answer was fetched
    assert len(set(steps)) == 1 and client.result(steps[3]) == client.result(steps[0])
    np.testing.assert_allclose(client.logprobs(model, 3), trained_logprobs(client), atol=1e-5)
    other = client.forward_backward(model, 2)  # the number of the step, with another content
    assert other.status_code == 400 and "2" in other.json()["error"], other.text


def test_the_same_post_from_many_connections_at_once_is_one_request(server: harness.Server, client: raw.Client) -> None:
    model = client.model()
    client.forward_backward(model, 1)
    with ThreadPoolExecutor(16) as pool:
        ids = set(pool.map(lambda _: request_id(client.optim_step(model, 2)), range(16)))
    assert len(ids) == 1
    client.result(ids.pop())
    np.testing.assert_allclose(client.logprobs(model, 3), trained_logprobs(client), atol=1e-5)


def test_an_answer_can_be_fetched_again(client: raw.Client) -> None:
    model = client.model()
    future = request_id(client.forward_backward(model, 1))
    first = client.answer(future)
    for _ in range(3):
        again = client.poll(future)
        assert (again.status_code, again.content) == (200, first.content)
    sampler = client.sampler()
    drawn = client.answer(request_id(client.sample(sampler, 0)))
    assert client.poll(request_id(client.sample(sampler, 0))).content == drawn.content
    unknown = client.poll("nobody:train:0:optim_step:7")
    assert unknown.status_code == 404 and unknown.json()["category"] == "user"


# ---- content -----------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_on_fails_its_own_request(client: raw.Client) -> None:
    model = client.model()
    n = len(raw.SENTENCE) - 1
    nan = [0.0] * (n - 1) + [float("nan")]
    policy, likelihood = "importance_sampling", "cross_entropy"
    good = {policy: raw.datum(logprobs=[-1.0] * n, advantages=[1.0] * n), likelihood: raw.datum()}
    bad = [
        ("advantages", policy, raw.datum(logprobs=[-1.0] * n, advantages=nan)),
        ("logprobs", policy, raw.datum(logprobs=[float("-inf")] * n, advantages=[1.0] * n)),
        ("weights", likelihood, raw.datum(weights=[float("inf")] * n)),
        ("model_input", likelihood, raw.datum([5])),  # nothing to predict: an input without tokens
        ("made_up_input", likelihood, raw.datum(made_up_input=[1.0] * n, weights=[1.0] * n)),
    ]
    for seq_id, (name, loss, one) in enumerate(bad, start=1):
        message = client.failure(client.forward_backward(model, seq_id, [good[loss], one], loss_fn=loss))
        assert name in message and "datum 1" in message, message
    last = len(bad) + 1
    client.forward_backward(model, last)
    client.result(request_id(client.optim_step(model, last + 1)))
    np.testing.assert_allclose(client.logprobs(model, last + 2), trained_logprobs(client), atol=1e-5)


def test_a_completion_of_no_tokens_teaches_nothing(client: raw.Client) -> None:
    """What RL code sends for an empty answer: the prompt alone, every advantage 0."""
    model = client.model()
    n = len(raw.SENTENCE) - 1
    client.forward_backward(model, 1, [raw.datum(logprobs=[0.0] * n, advantages=[0.0] * n)], loss_fn="importance_sampling")
    client.forward_backward(model, 2)
    client.result(request_id(client.optim_step(model, 3)))
    np.testing.assert_allclose(client.logprobs(model, 4), trained_logprobs(client), atol=1e-5)


def test_no_datums_at_all(client: raw.Client) -> None:
    model = client.model()
    client.failure(client.forward_backward(model, 1, []))
    client.result(request_id(client.optim_step(model, 2)))


@pytest.mark.parametrize("body", [b"", b"\xff" * 200, b"\x0a\xff\xff\xff\xff\x0f", b"{}", bytes(range(256)) * 40])
def test_bytes_that_are_no_message_are_refused(client: raw.Client, body: bytes) -> None:
    response = client.post_proto(body)
    assert response.status_code in (400, 404) and response.json()["error"], response.text


@pytest.mark.parametrize("path", ["create_model", "optim_step", "asample", "retrieve_future", "create_session", "weights_info"])
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"model_id": 5}', b'{"a":' * 5000, b'{"x": NaN}', b"\xff\xfe"])
def test_json_that_is_none_is_refused(client: raw.Client, path: str, body: bytes) -> None:
    response = client.http.post(path, content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500 or (path == "create_session" and response.status_code == 200), response.text
    assert response.status_code != 409 and response.json()


# ---- size --------------------------------------------------------------------------------------------------------------------------


def test_a_body_of_50_mb_is_refused_and_not_kept(server: harness.Server, client: raw.Client) -> None:
    before = server.rss_bytes()
    started = time.monotonic()
    response = client.post_proto(bytes(50_000_000))
    assert response.status_code == 413 and "bytes" in response.json()["error"], response.text

    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield bytes(1_000_000)

    try:
        response = client.post_proto(pieces())  # no Content-Length
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # closed before all of it was sent: refused as well
    assert time.monotonic() - started < 20.0
    assert server.rss_bytes() - before < 200 * MIB
    client.model()


def test_many_large_bodies_at_once(server: harness.Server, client: raw.Client) -> None:
    before = server.rss_bytes()
    with ThreadPoolExecutor(8) as pool:
        codes = set(pool.map(lambda _: client.post_proto(bytes(40 * MIB)).status_code, range(16)))
    assert codes == {413}
    assert server.rss_bytes() - before < 400 * MIB


def bomb(size: int, *, with_size: bool) -> bytes:
    """`size` zero bytes as one zstd frame that says its size, or does not."""
    compressor = zstandard.ZstdCompressor(level=3).compressobj(size if with_size else -1)
    zeros = bytes(16 * MIB)
    return b"".join([*(compressor.compress(zeros) for _ in range(size // len(zeros))), compressor.flush()])


@pytest.mark.parametrize("with_size", [True, False])
def test_a_zip_bomb_is_refused_before_it_bursts(server: harness.Server, client: raw.Client, with_size: bool) -> None:
    body = bomb(2048 * MIB, with_size=with_size)
    assert len(body) < MIB
    before = server.rss_bytes()
    started = time.monotonic()
    response = client.post_proto(body, **{"content-encoding": "zstd"})
    assert response.status_code == 413, f"{response.status_code} {response.text}"
    assert time.monotonic() - started < 10.0
    assert server.rss_bytes() - before < 300 * MIB
    for wrong in (b"not zstd at all", body[: len(body) // 2], b""):
        refused = client.post_proto(wrong, **{"content-encoding": "zstd"})
        assert refused.status_code in (400, 404, 413), f"{refused.status_code} {refused.text}"
    assert client.post_proto(b"x", **{"content-encoding": "br"}).status_code in (400, 415)


def test_a_compressed_request_is_the_same_request(client: raw.Client) -> None:
    model = client.model()
    plain = raw.wire_pb2.ForwardBackwardRequest(model_id=model, seq_id=1, data=[raw.datum()], loss_fn="cross_entropy").SerializeToString()
    compressed = zstandard.ZstdCompressor().compress(plain)
    accepted = client.post_proto(compressed, **{"content-encoding": "zstd"})
    assert raw.output_of(client.answer(request_id(accepted))).metrics["loss:sum"] > 0


# ---- other settings of the client ----------------------------------------------------------------------------------------------------

OTHER_SETTINGS = {
    "parallel_fwdbwd_chunks": True,  # the first chunk comes last
    "fwdbwd_max_chunk_len": 3,
    "proto_compress_fwdbwd": True,  # zstd
    "sample_use_retrieve_futures": True,  # one long poll for all samples of a client
    "sample_join_sampling_session": False,  # clones number themselves
    "sample_cancel_enabled": True,
}


@pytest.mark.parametrize("version", harness.VERSIONS)
@pytest.mark.parametrize("program", ["training", "sampling"])
def test_a_client_with_every_other_setting(server: harness.Server, program: str, version: str) -> None:
    """What the server does not ask for, but a client may do: compressed chunks out of order, samples polled together."""
    checks = {
        "training": [  # not the ones with hundreds of datums: three in a request make hundreds of requests
            "gradients_accumulate_until_the_step",
            "requests_run_in_the_order_of_the_calls",
            "a_traced_loss_has_the_gradient_of_the_built_in_one",
            "a_custom_loss_has_the_gradient_of_the_built_in_one",
        ],
        "sampling": [
            "several_samples_differ_and_a_seed_repeats_them",
            "many_requests_at_once",
            "a_cancelled_sample_frees_its_place",
            "what_cannot_be_sampled_is_refused_at_once",
            "a_pickled_client_works_in_another_process",
        ],
    }[program]
    proxy = Proxy(server.url, settings=OTHER_SETTINGS)
    with proxy.serving() as url:
        lines = harness.run_program(program, version=version, url=url, directory=server.directory, arguments=checks)
    assert {line["status"] for line in lines} == {"works"}, [line for line in lines if line["status"] != "works"]
    if version != "0.25.0" and program == "sampling":
        assert proxy.seen["retrieve_futures"] > 0 and proxy.seen["cancel_future"] > 0, proxy.seen


# ---- many at once ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", harness.VERSIONS)
def test_200_sampling_clients_at_once(server: harness.Server, version: str) -> None:
    [line] = harness.run_program("samplers", version=version, url=server.url, directory=server.directory, arguments=["200"])
    drawn = line["drawn"]
    assert len(drawn) == 200 and all(len(tokens) == 16 for tokens in drawn)
    assert all(drawn[i] == drawn[i % 7] for i in range(200)), "the same prompt and seed must draw the same in any company"


def test_training_goes_on_beside_200_sampling_requests(client: raw.Client) -> None:
    wanted = trained_logprobs(client, steps=3)
    sampler = client.sampler()
    futures = [request_id(client.sample(sampler, i, max_tokens=64, seed=i, stop=[])) for i in range(200)]
    np.testing.assert_allclose(trained_logprobs(client, steps=3), wanted, atol=1e-5)
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(client.answer, futures))
    assert {a.status_code for a in answers} == {200} and all(a.headers["content-type"] == "application/x-protobuf" for a in answers)


# ---- broken connections and processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(server: harness.Server) -> list[dict[str, Any]]:
    """The lines of the loop when nothing breaks."""
    lines = harness.run_program("loop", version=harness.VERSIONS[0], url=server.url, directory=server.directory, arguments=[str(STEPS)])
    assert len(lines) == STEPS + 2
    return lines


def assert_same_run(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [sorted(line) for line in found] == [sorted(line) for line in wanted]
    for one, other in zip(found[1:-1], wanted[1:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["drawn"] == other["drawn"], f"step {one['step']}"
    np.testing.assert_allclose(found[-1]["end"], wanted[-1]["end"], atol=1e-5)


@pytest.mark.parametrize("version", harness.VERSIONS)
def test_lost_answers_change_nothing(server: harness.Server, unbroken: list[dict[str, Any]], version: str) -> None:
    """Every third answer to a POST that does something, and every fifth to a poll, is lost on the wire."""
    doing = {"forward_backward", "optim_step", "asample", "save_weights_for_sampler", "save_weights", "create_model"}
    proxy = Proxy(server.url, lambda path, n: (path in doing and n % 3 == 0) or (path == "retrieve_future" and n % 5 == 0))
    with proxy.serving() as url:
        lines = harness.run_program("loop", version=version, url=url, directory=server.directory, arguments=[str(STEPS)])
    assert proxy.lost["optim_step"] >= 2 and proxy.lost["forward_backward"] >= 2 and proxy.lost["retrieve_future"] >= 4, proxy.lost
    assert_same_run(lines, unbroken)


def test_a_killed_client_leaves_nothing_behind_that_stops_others(server: harness.Server, client: raw.Client) -> None:
    program = harness.Program(
        name="loop", version=harness.VERSIONS[0], url=server.url, directory=server.directory, arguments=["50"]
    ).start()
    lines = program.lines()
    model = next(lines)["model_id"]
    next(lines), next(lines)
    program.end()
    np.testing.assert_allclose(trained_logprobs(client), trained_logprobs(client), atol=1e-5)
    run = client.http.get(f"training_runs/{model}")
    assert run.status_code == 200 and not run.json()["corrupted"]


def test_a_connection_cut_in_the_middle_of_a_body(server: harness.Server, client: raw.Client) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            head = f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nX-API-Key: {harness.API_KEY}\r\nContent-Length: 1000\r\n\r\n"
            half.sendall(head.encode() + b"only this")
    trained_logprobs(client)


@pytest.mark.slow
@pytest.mark.parametrize("version", harness.VERSIONS)
def test_a_server_killed_in_the_middle_is_exactly_once(
    tmp_path: Path, model_directory: Path, unbroken: list[dict[str, Any]], version: str
) -> None:
    """kill -9 three times, a moment after a line of the loop: in the middle of what comes next. The SDK's retries finish the run."""
    (tmp_path / "Qwen").symlink_to(model_directory / "Qwen")
    server = harness.Server(directory=tmp_path).start()
    program = harness.Program(name="loop", version=version, url=server.url, directory=tmp_path, arguments=[str(STEPS)]).start()
    late = threading.Timer(harness.PROGRAM_S, program.end)
    late.start()
    found = []
    try:
        for number, line in enumerate(program.lines()):
            found.append(line)
            if (delay := {1: 0.02, 3: 0.1, 5: 0.2}.get(number)) is not None:
                time.sleep(delay)
                server.kill()
                server.start()
        assert len(found) == STEPS + 2, f"{program.errors()}\n{server.tail()}"
        assert_same_run(found, unbroken)
    finally:
        late.cancel()
        program.end()
        server.kill()


def test_checkpoints_and_samplers_outlive_the_server(tmp_path: Path, model_directory: Path) -> None:
    (tmp_path / "Qwen").symlink_to(model_directory / "Qwen")
    server = harness.Server(directory=tmp_path).start()
    try:
        with raw.Client(server.url) as client:
            model = client.model()
            client.forward_backward(model, 1)
            client.result(request_id(client.optim_step(model, 2)))
            client.forward_backward(model, 3)  # a gradient that is not applied yet
            saving = client.http.post("save_weights", json={"model_id": model, "seq_id": 4, "path": "kept"})
            named = client.result(request_id(saving))["path"]
            sampler = client.sampler()
            drawn = client.answer(request_id(client.sample(sampler, 0))).content
            pending = request_id(client.forward_backward(model, 6))  # number 5 has not come
            assert server.stop() == 0
            server.start()
            assert client.post("weights_info", {"tinker_path": named})["lora_rank"] == 8
            assert client.answer(request_id(client.sample(sampler, 1))).content == drawn, "the same seed draws the same"
            client.result(request_id(client.optim_step(model, 5)))
            raw.output_of(client.answer(pending))
            np.testing.assert_allclose(client.logprobs(model, 7), trained_logprobs(client, steps=2), atol=1e-5)
    finally:
        server.kill()
