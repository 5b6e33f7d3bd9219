"""A writer of evaluation sets."""

import struct

import numpy as np


def write_evalset(path, examples):
    """Write an evaluation set: a header, and per example a context and its completions, each preceded by its length."""
    body, longest = b"", 0
    for example in examples:
        words = [65535, 0, example.index, example.label, len(example.completions)]
        for ids in (example.context, *example.completions):
            words += [len(ids), *ids.tolist()]
        words[1] = 2 * len(words)
        body += np.array(words, "<u2").tobytes()
        longest = max(longest, words[1])
    path.write_bytes(struct.pack("<256i", 20240522, 1, len(examples), longest, *[0] * 252) + body)
