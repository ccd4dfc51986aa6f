"""NUMBER sampling clients of one process, one request of each in flight at once; prints what each drew, in order."""

from __future__ import annotations

import json
import sys
import time

from checks import BASE_MODEL, SENTENCES, WAIT_S, prompt_of, ready, service
from tinker import types


def main(number: int) -> None:
    clients = [ready(one) for one in [service().create_sampling_client(base_model=BASE_MODEL) for _ in range(number)]]
    started = time.monotonic()
    params = [types.SamplingParams(max_tokens=16, seed=i % 7, stop=[]) for i in range(number)]
    futures = [c.sample(prompt_of(SENTENCES[i % 7 % len(SENTENCES)]), 1, p) for i, (c, p) in enumerate(zip(clients, params, strict=True))]
    drawn = [list(f.result(WAIT_S * 2).sequences[0].tokens) for f in futures]
    print(json.dumps({"drawn": drawn, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
