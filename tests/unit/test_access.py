"""A stranger who reaches the store of a run: his words do not count."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from overlap_mtp.training import watchdog as module
from overlap_mtp.training.access import TOKEN, keep_to_loopback, listener, read_signed, reserve_port, sign
from overlap_mtp.training.rendezvous import await_ranks
from overlap_mtp.training.watchdog import Heartbeat, Watchdog


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv(TOKEN, "a secret")


def test_only_what_a_rank_of_this_run_has_signed_for_a_key_counts(monkeypatch):
    word = sign("1", "text").encode()
    assert read_signed("1", word) == "text"
    assert read_signed("2", word) is None
    assert read_signed("1", word + b"!") is None
    assert read_signed("1t", word.replace(b"text", b"ext")) is None
    for nonsense in (b"", b"text", b"[]", b"\xff\xfe", b"0" * 64 + b"text"):
        assert read_signed("1", nonsense) is None
    with monkeypatch.context() as other:
        other.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert read_signed("1", word) is None
    monkeypatch.setenv(TOKEN, "another secret")
    assert read_signed("1", word) is None


@pytest.mark.skipif(sys.platform != "linux", reason="calls the loopback interface by Linux's name")
@pytest.mark.parametrize(
    ("ranks_here", "given", "expected"),
    [("2", None, "lo"), ("2", "eth9", "eth9"), ("1", None, None), (None, None, None)],
)
def test_gloo_and_nccl_keep_to_loopback_if_all_ranks_are_here(monkeypatch, ranks_here, given, expected):
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    settings = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": ranks_here, **dict.fromkeys(variables, given)}
    with monkeypatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value or "")
            if value is None:
                environment.delenv(name)
        keep_to_loopback()
        assert [os.environ.pop(name, None) for name in variables] == [expected] * 2
        assert ranks_here == "2" or listener("127.0.0.1", 0) is None


def test_a_reserved_port_is_for_the_store_alone(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with reserve_port() as reserved, socket.socket() as stranger:
        address = reserved.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with pytest.raises(OSError, match="in use"):
            stranger.bind(address)
        with socket.socket(fileno=listener(*address)), socket.create_connection(address) as one:
            assert one.getpeername() == address


@pytest.mark.parametrize("word", ["[0, 1]", sign("another key", "[0, 1]")])
def test_ranks_meet_although_a_stranger_says_that_they_are_missing(word):
    store = dist.HashStore()
    store.set("start/missing", word)
    ranks = [
        threading.Thread(target=await_ranks, args=(store, rank, 2, timedelta(seconds=20))) for rank in (0, 1)
    ]
    begin = time.monotonic()
    for one in ranks:
        one.start()
        time.sleep(0.3)
    for one in ranks:
        one.join()
    assert time.monotonic() - begin < 10
    assert read_signed("start/missing", store.get("start/missing")) == "[]"


def test_a_watchdog_takes_no_word_from_a_stranger(monkeypatch):
    said = []
    monkeypatch.setattr(module, "end_process", said.append)
    store, key = dist.HashStore(), "watchdog/1"
    lie = Heartbeat(10**6, [0, 0], "start", "failed", "a lie", "a lie")
    words = ["nonsense", module.json.dumps(lie), sign("2", module.json.dumps(lie))]
    with Watchdog(store, 0, 2, timedelta(seconds=2)) as watchdog:
        for beat in range(1, 15):
            own = Heartbeat(beat, [0, 0], "start", "done" if beat == 14 else "working")
            store.set(key, sign("1", module.json.dumps(own)))
            time.sleep(0.1)
            store.set(key, words[beat % 3])
            time.sleep(0.02)
        store.set(key, sign("1", module.json.dumps(own)))
        assert watchdog._heard[1][0].error == ""
    assert said == []


def test_an_old_heartbeat_is_none(monkeypatch):
    """A stranger can copy one that a rank has signed, and set it again when the rank is gone."""
    said = []
    monkeypatch.setattr(module, "end_process", said.append)
    store = dist.HashStore()
    words = [sign("1", module.json.dumps(Heartbeat(beat, [0, 0], "start"))) for beat in (1, 2)]
    with Watchdog(store, 0, 2, timedelta(seconds=2)):
        end = time.monotonic() + 10
        while not said and time.monotonic() < end:
            for word in words:
                store.set("watchdog/1", word)
                time.sleep(0.1)
    assert "rank 1 is gone" in said[0]
