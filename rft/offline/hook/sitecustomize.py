"""Writes down each host name this Python asks for, and each address it uses, into the file RFT_REACHED names.

Standard library only, and as little of it as possible: every Python process loads this. Changes nothing else.
"""

import json
import os
import sys
from typing import Any

_NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_ADDRESSES = ("socket.connect", "socket.sendto", "socket.sendmsg")
_writing = False


def _write(event: str, arguments: tuple[Any, ...]) -> None:
    global _writing
    if (event not in _NAMES and event not in _ADDRESSES) or _writing:
        return
    target = arguments[0] if event in _NAMES else arguments[1]
    if isinstance(target, tuple):
        target, port = target[0], target[1]
    else:
        port = arguments[1] if event == "socket.getaddrinfo" else None
        if event in _ADDRESSES or target is None:
            return  # a path or a kernel's own address; the wildcard
    name = target.decode(errors="replace") if isinstance(target, bytes) else str(target)
    row = {"pid": os.getpid(), "by": " ".join(sys.orig_argv)[:300], "what": event, "host": name, "port": port}
    _writing = True
    try:
        fd = os.open(os.environ["RFT_REACHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, (json.dumps(row, default=str) + "\n").encode())
        os.close(fd)
    except (OSError, KeyError):
        pass  # the program that is watched must not notice: confined.py sees its system calls
    finally:
        _writing = False


def _go_on() -> None:
    """Load the `sitecustomize` that this one hides."""
    here = os.path.dirname(os.path.abspath(__file__))
    kept = list(sys.path)
    sys.path[:] = [path for path in kept if os.path.abspath(path) != here]
    own = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError:
        if own is not None:
            sys.modules["sitecustomize"] = own
    finally:
        sys.path[:] = kept


if "RFT_REACHED" in os.environ:
    sys.addaudithook(_write)
    _go_on()
