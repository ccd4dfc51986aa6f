"""A training loop that draws, trains and saves, for tests that break its server, its connection, or its process.

loop.py STEPS prints {"step": i, ...} after each step and {"end": [...]} with the final log-probabilities. Nothing here knows that anything
may break: what goes on after a break is the SDK's own retry loop.
"""

from __future__ import annotations

import json
import sys

from checks import SENTENCES, WAIT_S, adam, data, make_training_client, prompt_of, ready, scores
from tinker import types


def main(steps: int) -> None:
    client = make_training_client()
    print(json.dumps({"model_id": client.model_id}), flush=True)
    for step in range(steps):
        trained = client.forward_backward(data(), "cross_entropy")
        updated = client.optim_step(adam(3e-3))
        loss = trained.result(WAIT_S * 2).metrics["loss:sum"]
        updated.result(WAIT_S * 2)
        sampler = ready(client.save_weights_and_get_sampling_client())
        params = types.SamplingParams(max_tokens=48, seed=step, stop=[])
        answers = [sampler.sample(prompt_of(s), 2, params) for s in SENTENCES]
        drawn = [list(q.tokens) for a in answers for q in a.result(WAIT_S * 2).sequences]
        if step % 3 == 2:
            client.save_state(f"step-{step}").result(WAIT_S * 2)
        print(json.dumps({"step": step, "loss": loss, "drawn": drawn}), flush=True)
    print(json.dumps({"end": scores(client).tolist()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
