"""Checkpoints of a real DeepSpeed engine: the continuation is bit-exact, damage is named, a crash at any instant loses at most one save."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretrain import agreement, durable
from pretrain import checkpoint_files as files
from pretrain.checkpoint import Resumed, layout_of, load_latest, newest_whole, save
from pretrain.errors import BAD_CHECKPOINT_WRITE, Refusal, RunStopped
from pretrain.training_state import TrainingState
from tests.distributed.ranks import ROOT, free_port, rank_environment, run_ranks

CONFIG = {"train": {"seed": 0, "log_every": 10}, "optimizer": {"lr": 1e-2, "betas": [0.9, 0.95]}, "run": {"dir": "here"}}
WEIGHTS = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def make_engine(zero: int = 1, precision: str = "fp32", seed: int = 0) -> Any:
    """A tiny network in a DeepSpeed engine, initial weights by seed. The process group must be up."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel("ERROR")
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": zero, "memory_efficient_linear": False},  # the default replaces F.linear in the whole process
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
    }
    if precision == "bf16" and zero:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    deepspeed.init_distributed("gloo")
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)[0]


def advance(engine: Any, steps: int) -> list[float]:
    """Steps on samples from torch's generator, with noise from Python's and numpy's: returns the losses, which depend on all three."""
    losses = []
    for _ in range(steps):
        noise = random.random() + float(np.random.rand())
        loss = (engine(torch.randn(2, 8).to(next(engine.module.parameters()).dtype)) + noise).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state_at(step: int) -> TrainingState:
    return TrainingState(
        tokens=step * 100,
        config=CONFIG,
        ledger={"flops": 2**70 + step},
        loader={"consumed": step},
        counters={"skipped": 0},
        telemetry={"wandb_id": "abcd1234"},
        probe_loss=0.1 + step,
    )


def load(engine: Any, folder: Path) -> Resumed:
    found = load_latest(engine, folder, config=CONFIG)
    assert found is not None
    assert found.state == state_at(found.step)
    return found


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def engine(group: None) -> Any:
    engine = make_engine()
    advance(engine, 1)
    return engine


@pytest.fixture
def saved(engine: Any, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(engine, tmp_path / "checkpoints", step, state_at(step), keep=3)
    return tmp_path / "checkpoints"


# --- what comes back


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_continuation_is_bit_exact(group: None, tmp_path: Path, zero: int, precision: str) -> None:
    first = make_engine(zero, precision)
    advance(first, 3)
    save(first, tmp_path, 3, state_at(3), keep=1)
    expected = advance(first, 3)
    assert expected != advance(first, 3)

    second = make_engine(zero, precision, seed=1)
    random.seed(5), np.random.seed(5)
    assert load(second, tmp_path).step == 3
    assert advance(second, 3) == expected


def test_state_and_layout_come_back(engine: Any, saved: Path) -> None:
    found = load(engine, saved)
    assert found.step == 20
    assert found.notes == []
    assert found.state.ledger["flops"] == 2**70 + 20
    assert files.verify(saved / "step-00000020").layout == layout_of(engine, None) == {"world_size": 1, "zero": 1}
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-00000010", "step-00000020"]
    assert load_latest(engine, saved.parent / "elsewhere", config=CONFIG) is None


def test_keep_removes_the_oldest_last(engine: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(engine, tmp_path, step, state_at(step), keep=2)
    assert files.checkpoints(tmp_path) == ["step-00000004", "step-00000003"]
    assert load(engine, tmp_path).step == 4


def test_going_back_by_the_pointer_drops_what_lay_ahead(engine: Any, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    (saved / "latest").write_text("step-00000010\n")
    found = load(engine, saved)
    assert found.step == 10
    assert "step-00000020 is newer" in caplog.text
    save(engine, saved, 15, state_at(15), keep=3)
    assert files.checkpoints(saved) == ["step-00000015", "step-00000010"]


def test_a_step_saved_twice_is_replaced(engine: Any, saved: Path) -> None:
    (saved / "step-00000020" / "mark").touch()
    save(engine, saved, 20, state_at(20), keep=3)
    assert not (saved / "step-00000020" / "mark").exists()
    assert load(engine, saved).step == 20
    assert files.leftovers(saved) == []


def test_whole_weights_travel_with_it(engine: Any, saved: Path) -> None:
    weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    path = save(engine, saved, 30, state_at(30), keep=3, weights={"weights.safetensors": weights})
    assert newest_whole(saved) == path
    read = load_file(path / "weights.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    _flip(path / "weights.safetensors")
    assert newest_whole(saved).name == "step-00000020"


def test_readers_touch_nothing_and_say_when_there_is_none(saved: Path, tmp_path: Path) -> None:
    (saved / "step-00000020").rename(saved / ".step-00000020.replaced")
    before = sorted(path.name for path in saved.iterdir())
    assert newest_whole(saved).name == "step-00000010"
    assert sorted(path.name for path in saved.iterdir()) == before
    with pytest.raises(Refusal, match=r"no checkpoint in .* yet"):
        newest_whole(tmp_path / "elsewhere")


# --- damage


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [_flip, _halve, Path.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "state.json", "random_rank_00000.json", "manifest.json"])
def test_a_damaged_newest_is_named_and_the_one_before_used(
    engine: Any, saved: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    damage(saved / "step-00000020" / name)
    found = load(engine, saved)
    assert found.step == 10
    assert len(found.notes) == 1
    assert "step-00000020" in found.notes[0]
    assert name in found.notes[0]
    assert "step-00000010 is used instead" in caplog.text


def test_no_whole_checkpoint_left_is_refused(engine: Any, saved: Path) -> None:
    _flip(saved / "step-00000020" / WEIGHTS)
    (saved / "step-00000010" / "state.json").unlink()
    with pytest.raises(Refusal, match=r"step-00000020 is not whole.*step-00000010 is not whole.*No whole checkpoint is left"):
        load_latest(engine, saved, config=CONFIG)


@pytest.mark.parametrize("pointer", [None, "step-00000099", "", "../elsewhere"])
def test_a_useless_pointer_is_said_and_the_highest_used(
    engine: Any, saved: Path, caplog: pytest.LogCaptureFixture, pointer: str | None
) -> None:
    (saved / "latest").unlink()
    if pointer is not None:
        (saved / "latest").write_text(pointer)
    assert load(engine, saved).step == 20
    assert "latest" in caplog.text
    assert "highest-numbered" in caplog.text


def test_a_leftover_is_named_ignored_and_removed_by_the_next_save(engine: Any, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(saved / "step-00000020", saved / ".step-00000030.partial")
    assert load(engine, saved).step == 20
    assert ".step-00000030.partial" in caplog.text
    save(engine, saved, 30, state_at(30), keep=3)
    assert files.leftovers(saved) == []


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two small files, without an engine."""
    folder = tmp_path_factory.mktemp("plain")
    partial = files.start_partial(folder, 7)
    for name in ("a.pt", "b.json"):
        durable.write_text(partial / name, f"content of {name}")
    entries = [files.describe(partial / name, rank) for rank, name in enumerate(("a.pt", "b.json"))]
    files.write_manifest(partial, files.CheckpointManifest(7, {"world_size": 2, "zero": 1}, {"torch": "2"}, entries))
    return files.publish(folder, 7)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_found(plain_checkpoint: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(plain_checkpoint.iterdir())))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        with pytest.raises(files.BadCheckpoint):
            files.verify(plain_checkpoint)
    finally:
        path.write_bytes(whole)
    files.verify(plain_checkpoint)


def test_names_that_leave_the_folder_are_refused(plain_checkpoint: Path) -> None:
    manifest = files.read_manifest(plain_checkpoint)
    entry = files.FileEntry("../outside", 3, "0", 0)
    with pytest.raises(files.BadCheckpoint, match="not a plain file name"):
        files._check_file(plain_checkpoint, entry, read=True)
    with pytest.raises(OSError, match="all machines must share"):
        files.write_manifest(plain_checkpoint, files.CheckpointManifest(7, {}, {}, [*manifest.files, files.FileEntry("c.pt", 3, "0", 1)]))


# --- another run's checkpoint


def test_another_layout_is_refused_where_nothing_says_what_ranks_held(group: None, saved: Path) -> None:
    """As in checkpoints of before there were pieces; with them see tests/distributed/test_layout_change.py."""
    with pytest.raises(Refusal, match=r"1 rank\(s\) with ZeRO stage 1, .* this run has 1 rank\(s\) with ZeRO stage 2"):
        load_latest(make_engine(zero=2), saved, config=CONFIG)


def test_another_recipe_is_refused_with_the_keys_that_differ(engine: Any, saved: Path) -> None:
    changed = {**CONFIG, "optimizer": {"lr": 2e-2, "betas": [0.9, 0.95], "clip": 1.0}}
    with pytest.raises(Refusal, match=r"optimizer.clip: absent in the checkpoint, 1.0 now; optimizer.lr: 0.01 in the checkpoint, 0.02 now"):
        load_latest(engine, saved, config=changed)
    free = {**CONFIG, "train": {"seed": 0, "log_every": 1, "peak_flops": 1e12}, "run": {"dir": "there"}, "telemetry": {"wandb": "offline"}}
    assert load_latest(engine, saved, config=free) is not None


# --- code in a checkpoint


class _Bomb:
    """Unpickled, it makes the file it was given."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("planted", [WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_planted_pickle_is_refused_and_does_not_run(engine: Any, saved: Path, tmp_path: Path, planted: str, legacy: bool) -> None:
    newest = saved / "step-00000020"
    manifest = files.read_manifest(newest)
    if legacy:
        (newest / planted).write_bytes(pickle.dumps({"module": _Bomb(tmp_path / "ran")}))
    else:
        torch.save({"module": _Bomb(tmp_path / "ran")}, newest / planted)
    entries = [files.describe(newest / entry.name, entry.rank) for entry in manifest.files]
    files.write_manifest(newest, files.CheckpointManifest(20, manifest.layout, manifest.versions, entries))

    with pytest.raises(Refusal, match=f"{planted} holds") as refusal:
        load_latest(engine, saved, config=CONFIG)
    assert legacy or "mkdir" in str(refusal.value)
    with pytest.raises(pickle.UnpicklingError):
        engine.checkpoint_engine.load(str(newest / planted))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_the_manifest_does_not_list_makes_it_bad(engine: Any, saved: Path) -> None:
    torch.save({}, saved / "step-00000020" / "mp_rank_01_model_states.pt")
    assert load(engine, saved).step == 10


def test_what_could_not_be_loaded_again_is_not_saved(engine: Any, tmp_path: Path) -> None:
    engine.optimizer.overflow = Path("a class the loader does not admit")
    try:
        with pytest.raises(TypeError, match="could be saved but not loaded again"):
            save(engine, tmp_path, 1, state_at(1), keep=1)
    finally:
        engine.optimizer.overflow = False
    assert list(tmp_path.iterdir()) == []


# --- a disk that is full, a machine that stops


class _Durably:
    """Counts the operations by which a save reaches the disk, and lets the n-th one fail with `error` (a write: halfway)."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, error
        write, rename, rmtree = durable.write, Path.rename, shutil.rmtree

        def half_write(path: Path, writer: Callable[[Any], object]) -> None:
            write(path, writer)
            if self._due():
                _halve(path)
                raise self.error

        def no_rename(path: Path, target: Path) -> Path:
            if self._due():
                raise self.error
            return rename(path, target)

        def half_removal(path: Path) -> None:
            if self._due():
                next(path.iterdir()).unlink()
                raise self.error
            rmtree(path)

        patch.setattr(durable, "write", half_write)
        patch.setattr(Path, "rename", no_rename)
        patch.setattr(shutil, "rmtree", half_removal)

    def _due(self) -> bool:
        self.count += 1
        return self.count == self.fail_at


class _PowerCut(BaseException):
    """Not an Exception: nothing tidies up after it."""


def _full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def _operations(engine: Any, saved: Path, step: int) -> int:
    """How many a save of that step takes, counted on a copy."""
    copy = saved.with_name(f"copy{step}")
    shutil.copytree(saved, copy)
    with pytest.MonkeyPatch.context() as patch:
        counter = _Durably(patch, -1, _PowerCut())
        save(engine, copy, step, state_at(step), keep=1)
    return counter.count


@pytest.mark.parametrize("step", [30, 20])
def test_power_cut_at_every_operation(engine: Any, saved: Path, step: int) -> None:
    operations = _operations(engine, saved, step)
    assert operations >= 9
    for fail_at in range(1, operations + 1):
        folder = saved.with_name(f"cut{fail_at}")
        shutil.copytree(saved, folder)
        with pytest.MonkeyPatch.context() as patch:
            _Durably(patch, fail_at, _PowerCut())
            with pytest.raises(_PowerCut):
                save(engine, folder, step, state_at(step), keep=1)
        assert load(engine, folder).step in (20, step)
        assert {10, 20, step} >= {files.step_of(name) for name in files.checkpoints(folder)}
        for name in files.checkpoints(folder):
            files.verify(folder / name)
        save(engine, folder, 40, state_at(40), keep=1)
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000040"]


def _save_until_stopped(engine: Any, folder: Path, steps: range) -> RunStopped | None:
    try:
        for step in steps:
            save(engine, folder, step, state_at(step), keep=100)
    except RunStopped as stopped:
        return stopped
    return None


def test_full_disk_at_every_write(engine: Any, saved: Path) -> None:
    refused = 0
    for fail_at in range(1, _operations(engine, saved, 30) + 1):
        folder = saved.with_name(f"full{fail_at}")
        shutil.copytree(saved, folder)
        with pytest.MonkeyPatch.context() as patch:
            _Durably(patch, fail_at, _full())
            stopped = _save_until_stopped(engine, folder, range(30, 31))
        if stopped is not None:
            refused += 1
            assert stopped.code == BAD_CHECKPOINT_WRITE
            assert "No space left on device" in str(stopped)
            assert "step-00000020 is untouched" in str(stopped)
            assert load(engine, folder).step == 20
            assert not files.partial_folder(folder, 30).exists()
        else:
            assert load(engine, folder).step == 30
    assert refused >= 6


def test_a_checkpoint_set_aside_survives_a_save_that_fails(engine: Any, saved: Path) -> None:
    (saved / "step-00000020").rename(saved / ".step-00000020.replaced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "write", _raise_full)
        stopped = _save_until_stopped(engine, saved, range(30, 31))
    assert "step-00000020 is untouched" in str(stopped)
    assert load(engine, saved).step == 20


def _raise_full(path: Path, writer: Callable[[Any], object]) -> None:
    raise _full()


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_torch_save_does_not_hide_what_the_disk_said(tmp_path: Path) -> None:
    with _files_of_at_most(100_000), pytest.raises(OSError, match="File too large"):
        durable.write(tmp_path / "file.pt", lambda file: torch.save(torch.zeros(1_000_000), file))


def test_safetensors_that_do_not_fit_stop_the_run_too(engine: Any, saved: Path) -> None:
    weights = {"weights.safetensors": {"matrix": torch.zeros(1_000_000)}}
    with _files_of_at_most(100_000), pytest.raises(RunStopped, match=r"weights.safetensors.*step-00000020 is untouched"):
        save(engine, saved, 30, state_at(30), keep=3, weights=weights)
    assert load(engine, saved).step == 20


def test_everything_is_on_the_disk_before_it_has_its_name(engine: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def checked_rename(path: Path, target: Path) -> Path:
        parts = [path, *path.iterdir()] if path.suffix == ".partial" and path.is_dir() else [path]
        if path.suffix == ".partial":
            assert {str(part) for part in parts} <= set(synced)
        synced.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", checked_rename)
    save(engine, saved, 30, state_at(30), keep=1)
    folder, pointer, removal = (
        synced.index(text)
        for text in (
            ".step-00000030.partial -> step-00000030",
            ".latest.partial -> latest",
            "step-00000020 -> .step-00000020.removed",
        )
    )
    assert folder < pointer < removal
    assert str(saved) in synced[folder:pointer]
    assert str(saved) in synced[pointer:removal]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(engine: Any, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", tmp_path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr}")
    try:
        folder = tmp_path / "checkpoints"
        stopped = _save_until_stopped(engine, folder, range(1, 100))
        assert stopped is not None
        assert stopped.code == BAD_CHECKPOINT_WRITE
        assert "No space left on device" in str(stopped)
        last = files.checkpoints(folder)[0]
        assert f"{last} is untouched" in str(stopped)
        assert files.leftovers(folder) == []
        assert load(engine, folder).step == files.step_of(last) > 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def _save_for_ever(folder: Path, told: int) -> None:
    """Resumes what is there and saves step after step, telling each finished one, until it is killed."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{os.getpid()}", rank=0, world_size=1)
    engine = make_engine()
    found = load_latest(engine, folder / "checkpoints", config=CONFIG)
    step = found.step if found else 0
    os.write(told, f"resumed {step}\n".encode())
    while True:
        step += 1
        save(engine, folder / "checkpoints", step, state_at(step), keep=2)
        os.write(told, f"saved {step}\n".encode())


def kill_while_saving(folder: Path, times: int) -> list[dict[str, int]]:
    """Forks a saver, kills it at a random moment, and again. For each: the step it found and the last one it had told of."""
    rounds = []
    for _ in range(times):
        hear, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hear)
            _save_for_ever(folder, told)
        os.close(told)
        heard = b""
        while b"saved" not in heard and (more := os.read(hear, 4096)):
            heard += more
        time.sleep(random.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while select.select([hear], [], [], 0)[0] and (more := os.read(hear, 4096)):
            heard += more
        os.close(hear)
        lines = heard.decode().split("\n")[:-1]
        rounds.append({"resumed": int(lines[0].split()[1]), "saved": int(lines[-1].split()[1])})
    return rounds


def test_kill_9_while_saving(engine: Any, tmp_path: Path) -> None:
    program = (
        f"import json, pathlib; from tests.pretrain.test_checkpoint import kill_while_saving;"
        f"print(json.dumps(kill_while_saving(pathlib.Path({str(tmp_path)!r}), 3)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=rank_environment(0, 1, free_port()), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout.splitlines()[-1])
    rounds.append({"resumed": load(engine, tmp_path / "checkpoints").step})
    for before, after in itertools.pairwise(rounds):
        assert before["saved"] <= after["resumed"] <= before["saved"] + 1, rounds


# --- two ranks


def on_two_ranks(folder: str) -> dict[str, Any]:
    """What each of two ranks sees of saves and loads that go well or fail on one of them."""
    checkpoints, one_rank = Path(folder) / "two", Path(folder) / "one"
    engine, rank = make_engine(zero=1), agreement.rank()
    seen: dict[str, Any] = {}
    torch.manual_seed(rank)
    advance(engine, 2)
    for step in (1, 2):
        save(engine, checkpoints, step, state_at(step), keep=3)
    expected = advance(engine, 2)
    seen["resumed"] = load(engine, checkpoints).step
    seen["exact"] = advance(engine, 2) == expected

    with pytest.MonkeyPatch.context() as patch:
        _Durably(patch, 1 if rank == 1 else -1, _full())
        stopped = _save_until_stopped(engine, checkpoints, range(3, 4))
    seen["full"] = [stopped.code, str(stopped)] if stopped else None
    dist.barrier()
    seen["names"] = sorted(path.name for path in checkpoints.iterdir())

    try:
        load_latest(engine, one_rank, config=CONFIG)
    except Refusal as refusal:
        seen["layout"] = str(refusal)
    dist.barrier()
    if rank == 0:
        _flip(checkpoints / "step-00000002" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    dist.barrier()
    found = load(engine, checkpoints)
    seen["damaged"] = [found.step, found.notes[0]]
    return seen


def test_two_ranks_agree(engine: Any, tmp_path: Path) -> None:
    save(engine, tmp_path / "one", 1, state_at(1), keep=1)
    for seen in run_ranks("tests.pretrain.test_checkpoint:on_two_ranks", 2, str(tmp_path)):
        assert seen["resumed"] == 2
        assert seen["exact"]
        code, paragraph = seen["full"]
        assert code == BAD_CHECKPOINT_WRITE
        assert "No space left on device (rank 1)" in paragraph
        assert seen["names"] == ["latest", "step-00000001", "step-00000002"]
        assert "1 rank(s) with ZeRO stage 1, " in seen["layout"]
        assert "this run has 2 rank(s)" in seen["layout"]
        step, note = seen["damaged"]
        assert step == 1
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt does not match its sha256" in note
