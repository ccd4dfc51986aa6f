"""The program in a reply: its last fenced block.

The last block labelled python (py, python3); if none is, the last without a label. Blocks in other languages do not count, nor does one
that is never closed: a reply that was cut off has not answered.
"""

from __future__ import annotations

import re

MAX_PROGRAM_CHARS = 100_000
PYTHON_LABELS = ("python", "py", "python3")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$")


def extract_code(text: str) -> str | None:
    """The program, or None if there is none or it is longer than MAX_PROGRAM_CHARS. Linear in the text."""
    labelled: str | None = None
    plain: str | None = None
    fence, label = "", ""
    held: list[str] = []
    for line in text.split("\n"):
        match = FENCE.match(line)
        if not fence:
            if match is not None:
                fence, label, held = match[1], match[2].lower(), []
        elif match is not None and match[1].startswith(fence) and not match[2]:
            if label in PYTHON_LABELS:
                labelled = "\n".join(held)
            elif not label:
                plain = "\n".join(held)
            fence = ""
        else:
            held.append(line)
    code = labelled if labelled is not None else plain
    return code if code is not None and len(code) <= MAX_PROGRAM_CHARS else None
