"""Who may talk to a run: what it listens on, and whose words in its store count.

Torch's store asks nobody for a password, and gloo's and NCCL's sockets do not either. So a run on one host listens on
the loopback interface alone. What the ranks tell each other of the dead is signed with the run's token: a
stranger who reaches the store can disturb a run, but cannot make its ranks blame one another or say what he likes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import sys
import time

from torch.distributed import Store

TOKEN = "OVERLAP_MTP_RUN_TOKEN"  # the variable that holds it; with torchrun, set it to a secret, the same on all hosts
SIGNATURE_CHARS = 64


def new_token() -> str:
    """Return a token for the ranks that a launcher starts."""
    return secrets.token_hex(16)


def sign(key: str, text: str) -> str:
    """Return the text with a signature of it, as the value of a key of this attempt's store."""
    return _signature(key, text) + text


def read_signed(key: str, value: bytes) -> str | None:
    """Return the text that a rank of this run and attempt has signed for this key; None if none has."""
    word = value.decode(errors="replace")
    signature, text = word[:SIGNATURE_CHARS], word[SIGNATURE_CHARS:]
    is_ours = hmac.compare_digest(signature.encode(), _signature(key, text).encode())
    return text if is_ours else None


def set_once(store: Store, key: str, text: str) -> str | None:
    """Return the text that a rank has set first, here or elsewhere. Delete a stranger's word, and return None."""
    agreed = read_signed(key, store.compare_set(key, "", sign(key, text)))
    if agreed is None:
        store.delete_key(key)
    return agreed


def _signature(key: str, text: str) -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    about = "\0".join((attempt, key, text)).encode()
    return hmac.new(os.environ.get(TOKEN, "").encode(), about, hashlib.sha256).hexdigest()


def is_on_one_host() -> bool:
    """Return whether all ranks run on this host, by the variables of the launcher."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def keep_to_loopback() -> None:
    """Let gloo and NCCL listen on the loopback interface alone if all ranks are on this host."""
    if is_on_one_host() and sys.platform == "linux":
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")


def reserve_port() -> socket.socket:
    """Return a socket that holds a free port of the loopback interface, so that no other process is given it.

    It does not listen. While it is open, `listener` and torch's store can listen there, because they set SO_REUSEADDR.
    """
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", 0))
    return one


def listener(address: str, port: int) -> int | None:
    """Return a socket's descriptor for a store that listens at one address, if all ranks are on this host.

    Otherwise return None, and the store listens on all interfaces: ranks of other hosts may reach it by any of them.
    """
    if not is_on_one_host():
        return None
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(where)
        one.listen(2048)
        return one.detach()


def await_listener(address: str, port: int, end: float) -> None:
    """Wait until a process listens on the port: torch's client would try for up to three times its timeout."""
    while True:
        try:
            return socket.create_connection((address, port), max(0.05, end - time.monotonic())).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
