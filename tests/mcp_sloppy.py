"""An MCP server without the SDK, as bad as they come: `python mcp_sloppy.py BEHAVIOUR`, one of these.

half: answers with half a surrogate pair. noise: prints lines that are no messages, and bytes that are no UTF-8, before
every answer. mute: never answers a call. deaf: does not even start. gone: ends at once. stubborn: noise, and it ends
neither when its input does nor on SIGTERM. pages: lists its tools for ever. twins: lists a tool twice.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

BEHAVIOUR = sys.argv[1]
TOOL = {"name": "speak", "inputSchema": {"type": "object", "$schema": "http://json-schema.org/draft-07/schema#"}}
HELLO = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "s", "version": "1"}}


def answer(method: str) -> dict[str, Any] | None:
    if method == "initialize":
        return HELLO
    if method == "tools/list":
        more = {"nextCursor": "more"} if BEHAVIOUR == "pages" else {}
        return {"tools": [TOOL] * (2 if BEHAVIOUR == "twins" else 1), **more}
    return (
        None if BEHAVIOUR == "mute" else {"content": [{"type": "text", "text": "half \ud83d" * (BEHAVIOUR == "half")}]}
    )


def write(message: dict[str, Any]) -> None:
    if BEHAVIOUR in ("noise", "stubborn"):
        sys.stdout.buffer.write(b"starting up \xff\n\n[]\n")
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    if BEHAVIOUR == "gone":
        sys.exit("cannot find my database")
    if BEHAVIOUR == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if BEHAVIOUR == "deaf":
        time.sleep(600)
    for line in sys.stdin:
        request = json.loads(line)
        if "id" in request and (result := answer(request["method"])) is not None:
            write({"jsonrpc": "2.0", "id": request["id"], "result": result})
    if BEHAVIOUR == "stubborn":
        time.sleep(600)


if __name__ == "__main__":
    main()
