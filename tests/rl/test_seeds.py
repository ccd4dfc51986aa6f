"""Seeds must be the same in another process and differ wherever two requests differ."""

from __future__ import annotations

import itertools
import subprocess
import sys

from ptlab.rl.seeds import stable_seed


def test_same_parts_same_seed_in_another_process():
    code = "from ptlab.rl.seeds import stable_seed; print(stable_seed(0, 'train', 3, 1))"
    for hash_seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed})
        assert int(done.stdout) == stable_seed(0, "train", 3, 1)


def test_different_places_have_different_seeds():
    places = list(itertools.product((0, 1), ("train", "eval"), range(5), range(5), range(5)))
    assert len({stable_seed(*place) for place in places}) == len(places)


def test_parts_do_not_run_into_each_other():
    assert len({stable_seed(1, 12), stable_seed(11, 2), stable_seed(112), stable_seed("1", 12)}) == 4


def test_seed_plus_sample_index_stays_a_signed_64_bit_number():
    assert all(0 <= stable_seed("x", i) + 4096 < 2**63 for i in range(1000))
