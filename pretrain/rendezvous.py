"""The ranks of a run find each other within a time, or each says in one paragraph what is in the way.

    rank 0 serves a store on MASTER_ADDR:MASTER_PORT; every rank writes into it who it is; rank 0 waits for all of them, compares,
    writes its verdict; every rank reads it, and all go on or all refuse.

Why not torch's own way alone: it waits without bound where something else listens on the port, prints pages of C++ frames before it
raises, tells a number of ranks and not which are missing, and lets worlds of unequal size or device run into a hang.
Refused: variables that are missing or no numbers, a port in use, an address nobody answers at, ranks that do not come, that come
twice, that were started for another number of ranks, or that compute on another kind of device.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from pretrain.errors import Refusal, name_ranks

_POLL = 0.1
_LINGER = 1.0
"""Seconds rank 0 keeps its store after a refusal, for the others to read it."""
_MARGIN = 5.0
"""Seconds the others wait longer for rank 0's verdict than rank 0 waits for them."""
_STDERR = 2
_VERDICT = "start/verdict"
_TIMEOUT = "train.hang_timeout sets how long ranks wait for each other."


class Place(NamedTuple):
    """This rank's number among `ranks`, and where rank 0's store is."""

    rank: int
    ranks: int
    host: str
    port: int

    @property
    def store(self) -> str:
        """The address of the store, as a user writes it."""
        return f"{self.host}:{self.port}"

    @property
    def me(self) -> str:
        """This rank, as messages name it."""
        return f"rank {self.rank} on {socket.gethostname()}"

    @property
    def serves(self) -> bool:
        """Whether this rank serves the store; under torchrun its agent does."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


class Meeting(NamedTuple):
    """What torch's process group is made of."""

    store: dist.Store
    rank: int
    ranks: int


def meet(device: str, seconds: float) -> Meeting:
    """The store of this run, once every rank has come. `device` is this rank's kind, cpu or cuda; each wait takes `seconds` at most.

    Raises Refusal, on every rank that runs.
    """
    place = place_of(os.environ)
    with _native_messages_held_back():
        if not place.serves:
            _wait_for_listener(place, seconds)
        store = _open_store(place, seconds)
        try:
            _check_in(store, place, device, seconds)
        except dist.DistError as error:
            raise Refusal(
                f"{place.me} lost rank 0, whose store is at {place.store}, while the ranks were meeting ({_first_line(error)}). Look at "
                f"what rank 0 says; it has most likely ended."
            ) from error
    return Meeting(store, place.rank, place.ranks)


def place_of(environment: Mapping[str, str]) -> Place:
    """The place that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name. Raises Refusal for what they leave out or get wrong."""

    def text(name: str) -> str:
        if not environment.get(name):
            raise Refusal(
                f"{name} is not set on {socket.gethostname()}. A rank wants RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: let `attractor "
                f"train`, deepspeed or torchrun start it, or set all four."
            )
        return environment[name]

    def number(name: str, least: int, most: int, why: str) -> int:
        word = text(name)
        if not word.isdecimal() or not least <= int(word) <= most:
            raise Refusal(f"{name}={word} on {socket.gethostname()} is wrong: it must be a whole number from {least} to {most} ({why}).")
        return int(word)

    ranks = number("WORLD_SIZE", 1, 1 << 20, "all processes of the run")
    rank = number("RANK", 0, ranks - 1, f"WORLD_SIZE={ranks}, and ranks count from 0")
    return Place(rank, ranks, text("MASTER_ADDR"), number("MASTER_PORT", 1, 65535, "a TCP port"))


def _wait_for_listener(place: Place, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=max(_POLL, min(5.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Refusal(
                    f"{place.me} could not reach rank 0 at {place.store} within {seconds:g} s ({error.strerror or error}). Look first "
                    f"at what rank 0 says: it may have ended. Otherwise check from here that MASTER_ADDR={place.host} is its machine "
                    f"(`getent hosts {place.host}`), that MASTER_PORT={place.port} is the same on all nodes, and that no firewall closes "
                    f"it. {_TIMEOUT}"
                ) from error
        time.sleep(_POLL)


def _open_store(place: Place, seconds: float) -> dist.Store:
    """Rank 0's store, served or connected to, in a thread: torch waits without bound for a listener that never answers."""
    answer: Future[dist.Store] = Future()

    def open_store() -> None:
        try:
            wait = timedelta(seconds=seconds / 3)  # torch tries twice, with a pause
            answer.set_result(
                dist.TCPStore(place.host, place.port, place.ranks, place.serves, wait, wait_for_workers=False, multi_tenant=True)
            )
        except Exception as error:  # raised below, in the thread that asked
            answer.set_exception(error)

    threading.Thread(target=open_store, daemon=True).start()
    try:
        store = answer.result(seconds)
        store.set_timeout(timedelta(seconds=seconds))
        return store
    except (dist.DistError, TimeoutError) as error:
        raise Refusal(_no_store(place, seconds, error)) from error


def _no_store(place: Place, seconds: float, error: BaseException) -> str:
    other_port = "choose another (--master_port PORT for deepspeed)"
    if not place.serves:
        return (
            f"{place.me} found no store of rank 0 at {place.store} within {seconds:g} s ({_first_line(error) or 'no answer'}), though "
            f"something listens there. Check that MASTER_ADDR={place.host} is rank 0's machine and that no other program has that port, or "
            f"{other_port}."
        )
    if "EADDRINUSE" in str(error):
        return (
            f"{place.me} cannot listen on MASTER_PORT={place.port}: something on that machine already does, another run or the rest of "
            f"one (`ss -ltnp 'sport = :{place.port}'` names it). End it, or {other_port}."
        )
    return (
        f"{place.me} cannot serve at {place.store} ({_first_line(error) or 'it does not reach itself by that address'}). MASTER_ADDR must "
        f"name rank 0's own machine, as the other nodes see it: check `getent hosts {place.host}` there."
    )


def _check_in(store: dist.Store, place: Place, device: str, seconds: float) -> None:
    """Writes who this rank is and reads rank 0's verdict. Raises Refusal if that, or this rank's own entry in it, says so."""
    own = {"host": socket.gethostname(), "process": os.getpid(), "ranks": place.ranks, "device": device}
    store.set(_key(place.rank), json.dumps(own))
    if place.rank == 0:
        store.set(_VERDICT, json.dumps(_verdict(store, place, seconds)))
    elif not _appears(store, _VERDICT, seconds + _MARGIN):
        raise Refusal(f"{place.me} reached {place.store}, but rank 0 said nothing within {seconds:g} s. Look at what it prints. {_TIMEOUT}")
    verdict = json.loads(store.get(_VERDICT))
    if verdict["fault"]:
        if place.rank == 0:
            time.sleep(_LINGER)
        raise Refusal(verdict["fault"])
    if (other := verdict["came"].get(str(place.rank))) != own:
        there = f"process {other['process']} on {other['host']} has that number too" if other else "rank 0 knows no such number"
        raise Refusal(
            f"{place.me} (process {own['process']}, of {place.ranks} ranks) is one too many: {there}. Give every node its own --node_rank, "
            f"and the same list of nodes, and end what is left of earlier runs."
        )


def _verdict(store: dist.Store, place: Place, seconds: float) -> dict[str, Any]:
    """Rank 0's: who came, and what is wrong with them (empty: nothing). A rank that was started otherwise ends the waiting."""
    deadline = time.monotonic() + seconds
    came: dict[int, dict[str, Any]] = {}
    while True:
        new = [rank for rank in range(place.ranks) if rank not in came and store.check([_key(rank)])]
        came |= {rank: json.loads(store.get(_key(rank))) for rank in new}
        hosts = [came[rank]["host"] if rank in came else "a host unknown" for rank in range(place.ranks)]
        fault = _unlike(came, hosts, place)
        if not fault and len(came) < place.ranks and time.monotonic() >= deadline:
            fault = _absent(came, hosts, place, seconds)
        if fault or len(came) == place.ranks:
            return {"came": came, "fault": fault}
        time.sleep(_POLL)


def _unlike(came: Mapping[int, dict[str, Any]], hosts: list[str], place: Place) -> str:
    for key, told, remedy in (
        ("ranks", "WORLD_SIZE", "Start every node with the same list of nodes and processes a node"),
        ("device", "the device", "Set train.device, and check the GPUs of that machine with `attractor doctor`"),
    ):
        others = [rank for rank, entry in came.items() if entry[key] != came[0][key]]
        if others:
            return (
                f"The ranks that met at {place.store} were not started alike: {told} is {came[others[0]][key]} for "
                f"{name_ranks(others, hosts)} and {came[0][key]} for {name_ranks([0], hosts)}. {remedy}."
            )
    return ""


def _absent(came: Mapping[int, dict[str, Any]], hosts: list[str], place: Place, seconds: float) -> str:
    missing = name_ranks((rank for rank in range(place.ranks) if rank not in came), hosts).partition(" on ")[0]
    return (
        f"{missing} of {place.ranks} did not come to rank 0 at {place.store} within {seconds:g} s; {name_ranks(came, hosts)} came. Look at "
        f"what the missing ones say on their machines, and whether those reach {place.host}. {_TIMEOUT}"
    )


def _appears(store: dist.Store, key: str, seconds: float) -> bool:
    """Whether the key is in the store within `seconds`."""
    deadline = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return True


def _key(rank: int) -> str:
    return f"start/{rank}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _native_messages_held_back() -> Iterator[None]:
    """Keeps what C++ writes to standard error meanwhile from burying the one paragraph; what matters of it is in the exceptions."""
    kept, nowhere = os.dup(_STDERR), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDERR)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
        os.close(nowhere)
