"""Checks of this machine and installation, each with what is wrong and how to mend it. Imports torch in a child process only.

A finding is `ok`, `note` (works, but worth knowing) or `missing` (something required; the command then exits with 1).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
_PROBE_SECONDS = 120
_SHM_WANTED = 1 << 30
_DISK_WANTED = 5 << 30

Level = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it stands, what was found and, unless ok, the remedy."""

    check: str
    level: Level
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All checks, quick ones first. Takes seconds, because torch is imported once (elsewhere)."""
    checks: list[Callable[[], list[Finding]]] = [_python, _packages, _machine, _shared_memory, _disk, _port, _wandb, _torch]
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    return [Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")]


def requirements() -> list[Requirement]:
    """What the distribution needs, from its installed metadata or, in a checkout that was never installed, pyproject.toml."""
    try:
        lines = importlib.metadata.requires("attractor") or []
    except importlib.metadata.PackageNotFoundError:
        lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    parsed = [Requirement(line) for line in lines]
    return [need for need in parsed if need.marker is None or need.marker.evaluate({"extra": ""})]


def _packages() -> list[Finding]:
    return [_package(need) for need in requirements()]


def _package(need: Requirement) -> Finding:
    mend = f"pip install '{need.name}{need.specifier}'"
    try:
        version = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(need.name, "missing", "not installed", mend)
    if not need.specifier.contains(version, prereleases=True):
        return Finding(need.name, "missing", f"{version}, outside {need.specifier}", mend)
    return Finding(need.name, "ok", version)


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Finding("cores", "ok", str(cores)), Finding("memory", "ok", f"{memory / 2**30:.1f} GiB")]


def _shared_memory() -> list[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return [Finding("/dev/shm", "missing", "absent", "The data loader and NCCL need it: mount a tmpfs there.")]
    total = shutil.disk_usage(folder).total
    found = f"{total / 2**30:.2f} GiB"
    if total < _SHM_WANTED:
        return [Finding("/dev/shm", "note", found, "Small for ranks with loader workers: start the container with --shm-size=8g.")]
    return [Finding("/dev/shm", "ok", found)]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 2**30:.1f} GiB free in {Path.cwd()}"
    if free < _DISK_WANTED:
        return [Finding("disk", "note", found, "Checkpoints and shards may fill it: set run.dir and --out to another disk.")]
    return [Finding("disk", "ok", found)]


def _port() -> list[Finding]:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return [Finding("free port", "ok", str(listener.getsockname()[1]))]
    except OSError as error:
        return [Finding("free port", "missing", str(error), "Ranks meet on a local TCP port: allow this user to bind one on 127.0.0.1.")]


def _wandb() -> list[Finding]:
    mode = os.environ.get("WANDB_MODE", "as the recipe says (telemetry.wandb, off by default)")
    return [Finding("wandb mode", "ok", mode)]


_PROBE = """
import json, os, sys
out = os.dup(1); os.dup2(2, 1)
import torch, torch.distributed as dist
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
facts["devices"] = [[device.name, device.total_memory] for device in devices]
facts["cuda_bf16"] = bool(facts["devices"]) and torch.cuda.is_bf16_supported()
try:
    import datetime
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1, timeout=datetime.timedelta(seconds=20))
    dist.all_reduce(torch.ones(1)); dist.destroy_process_group()
    facts["gloo"] = None
except Exception as error:
    facts["gloo"] = f"{type(error).__name__}: {error}".splitlines()[0]
os.write(out, json.dumps(facts).encode())
"""


def _probe() -> dict[str, Any] | str:
    """What torch says of itself in a child process, or why it says nothing."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {_PROBE_SECONDS} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return dict(json.loads(done.stdout))


def _torch() -> list[Finding]:
    facts = _probe()
    if isinstance(facts, str):
        return [Finding("torch runs", "missing", facts, "Reinstall the ordinary build: pip install --force-reinstall torch")]
    build = f"{facts['version']}, {'CUDA ' + facts['cuda'] if facts['cuda'] else 'CPU only'}, {facts['threads']} threads"
    findings = [Finding("torch runs", "ok", build)]
    if not facts["cuda"]:
        findings = [Finding("torch runs", "note", build, "A CPU-only build may break `import streaming`: install the ordinary one.")]
    findings.append(_accelerators(facts))
    findings.append(_bf16(facts))
    if facts["gloo"] is None:
        findings.append(Finding("gloo", "ok", "a process group of one works"))
    else:
        remedy = "Ranks cannot meet: export GLOO_SOCKET_IFNAME=lo (or your interface), and check that this host's name resolves."
        findings.append(Finding("gloo", "missing", facts["gloo"], remedy))
    return findings


def _accelerators(facts: dict[str, Any]) -> Finding:
    devices = facts["devices"]
    if devices:
        return Finding("accelerators", "ok", ", ".join(f"{name} ({memory / 2**30:.0f} GiB)" for name, memory in devices))
    return Finding("accelerators", "note", "none", "Training runs on the CPU: right for the demo and tests, slow beyond.")


def _bf16(facts: dict[str, Any]) -> Finding:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    native = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if facts["cuda_bf16"]:
        return Finding("bf16", "ok", "on the accelerator")
    if native:
        return Finding("bf16", "ok", f"on the CPU, natively ({', '.join(native)})")
    return Finding("bf16", "note", "on the CPU, emulated", "Slower than fp32 here: use train.precision=fp32.")
