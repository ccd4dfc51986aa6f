"""All programs in one process (importing the SDK and torch takes longer than most of them), after a list of what this SDK has."""

from __future__ import annotations

import checkpoints
import errors
import futures
import rest
import sampling
import service
import training
from checks import emit, public_methods, run_checks

PROGRAMS = (service, training, sampling, checkpoints, rest, futures, errors)
"""Imported for the checks they register."""

if __name__ == "__main__":
    for method, signature in public_methods():
        emit(method, "public", signature)
    run_checks()
