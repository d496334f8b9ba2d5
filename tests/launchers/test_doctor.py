"""The doctor's findings, with what it looks at replaced: what is missing is named with its remedy and decides the exit code."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from launchers import doctor
from launchers.cli import app

FACTS: dict[str, Any] = {"version": "2.15.0", "cuda": "13.2", "threads": 2, "devices": [], "cuda_bf16": False, "gloo": None}


@pytest.fixture(autouse=True)
def no_torch_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda: dict(FACTS))


def levels() -> dict[str, str]:
    return {finding.check: finding.level for finding in doctor.examine()}


def test_a_whole_installation_is_healthy() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["healthy"]
    assert {"python", "torch", "deepspeed", "cores", "memory", "/dev/shm", "disk", "gloo", "bf16"} <= {
        one["check"] for one in report["findings"]
    }


def test_everything_not_in_order_has_a_remedy() -> None:
    assert all(finding.remedy for finding in doctor.examine() if finding.level != "ok")


@pytest.mark.parametrize("version", [None, "0.1"])
def test_a_missing_or_outdated_package(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def found(name: str) -> str:
        if name != "typer":
            return "2.0"
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement("typer>=0.20,<1")])
    monkeypatch.setattr(importlib.metadata, "version", found)
    finding = next(finding for finding in doctor.examine() if finding.check == "typer")
    assert finding.level == "missing"
    assert "pip install 'typer" in finding.remedy
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_torch_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda: "ImportError: libcudart.so")
    assert levels()["torch runs"] == "missing"


def test_gloo_that_cannot_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda: {**FACTS, "gloo": "RuntimeError: no interface"})
    finding = next(finding for finding in doctor.examine() if finding.check == "gloo")
    assert finding.level == "missing"
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


def test_accelerators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda: {**FACTS, "devices": [["NVIDIA H100", 80 * 2**30]], "cuda_bf16": True})
    finding = next(finding for finding in doctor.examine() if finding.check == "accelerators")
    assert (finding.level, finding.found) == ("ok", "NVIDIA H100 (80 GiB)")


def test_requirements_are_those_of_the_project() -> None:
    assert {"torch", "deepspeed", "megatron-core", "pydantic"} <= {need.name for need in doctor.requirements()}
    assert "pytest" not in {need.name for need in doctor.requirements()}


def test_the_probe_answers() -> None:
    """The real one, once: torch is imported and gloo tried in a child process."""
    facts = json.loads(json.dumps(_real_probe()))
    assert isinstance(facts, dict), facts
    assert set(facts) == set(FACTS)


_real_probe = doctor._probe
