"""A process that prepares a set with two workers, for tests that kill it.

python -m tests.data_pipeline.prepare_process SOURCE TOKENIZER OUT
"""

from __future__ import annotations

import sys

from data_pipeline import encoding, prepare, shards

if __name__ == "__main__":
    source, tokenizer, out = sys.argv[1:]
    encoding.CHUNK, shards.SHARD_BYTES = 2000, 2000
    prepare([source], out, tokenizer=tokenizer, sequence_length=32, validation=0, workers=2)
