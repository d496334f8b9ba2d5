"""The tiny run that several tests train: its text, its settings, its golden losses.

    python -m tests.pretrain.tiny_run > tests/pretrain/golden_losses.txt

writes the golden losses anew, after a change that is meant to alter training.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from data_pipeline import prepare
from tests.distributed.ranks import run_ranks

STEPS, BATCH, LENGTH = 20, 4, 16
SETTINGS = [
    f"train.tokens={STEPS * BATCH * LENGTH}",
    f"data.sequence_length={LENGTH}",
    "train.micro_batch=2",
    f"train.global_batch={BATCH}",
    "train.log_every=1",
    "model.vocabulary_size=320",
    "model.width=32",
    "model.heads=2",
    "model.backbone_layers=2",
    "attractor.gate_initial=0.5",  # of its own: the golden losses must not follow the demo
    "evaluation.every=7",
    "evaluation.tokens=256",
    "evaluation.iterations=[0,1,auto]",
    "checkpoint.every=1000",
    "optimizer.ema=0.9",
]
TARGET = "tests.distributed.training_ranks:interrupted_run"
GOLDEN = Path(__file__).with_name("golden_losses.txt")


def prepare_text(folder: Path, *, sequence_length: int = LENGTH, validation: float = 0.2) -> Path:
    """24 windows of 16 an epoch, the last of them short: a run of 80 samples passes several ends of an epoch."""
    text = "\n<|endoftext|>\n".join(f"Document {n} says that {n} times {n} is {n * n}, and little else." for n in range(24))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text(text)
    prepare([str(folder / "corpus.txt")], folder / "prepared", vocabulary_size=300, sequence_length=sequence_length, validation=validation)
    return folder / "prepared"


def golden_losses() -> list[float]:
    """The stored losses, by step."""
    return [float(line.split()[1]) for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]


def _main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_text(Path(folder, "data"))
        seen = run_ranks(TARGET, 1, f"{folder}/run", str(data), [], False, SETTINGS)[0]["seen"]
    print("# step, loss of the tiny run in fp32 on one CPU rank; made by: python -m tests.pretrain.tiny_run")
    for step, _, loss, _ in seen:
        print(step, f"{loss:.7f}")


if __name__ == "__main__":
    _main()
