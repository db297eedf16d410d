"""A real MCP server with state: `python mcp_counter.py [--http]`; with --http it prints its port first.

Its counter belongs to the process, over HTTP to the session. Its other tools do on purpose what servers do by accident.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import Counter
from typing import Any

import uvicorn
from mcp import MCPError
from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, CallToolResult

server = MCPServer("counter")
counts: Counter[str] = Counter()


@server.tool(structured_output=False)
def count(ctx: Context[Any, Any], by: int = 1) -> str:
    """Count up and say where the counter stands."""
    session = (ctx.headers or {}).get("mcp-session-id", "process")
    counts[session] += by
    return str(counts[session])


@server.tool(structured_output=False)
async def slow(seconds: float, mark: str = "") -> str:
    """Take a while; make a file first, so that one knows when it began."""
    if mark:
        os.close(os.open(mark, os.O_CREAT))
    await asyncio.sleep(seconds)
    return "rested"


@server.tool(structured_output=False)
def fail(text: str) -> str:
    """Report a failure."""
    raise ToolError(text)


@server.tool(structured_output=False)
def refuse() -> str:
    """Find the arguments wrong, by protocol."""
    raise MCPError(INVALID_PARAMS, "by must be a colour")


@server.tool(structured_output=False)
def break_down() -> str:
    """Fail, by protocol."""
    raise MCPError(INTERNAL_ERROR, f"the database of {os.environ.get('API_KEY')} is gone")


@server.tool(structured_output=False)
def huge(size: int) -> str:
    """Answer with that many letters."""
    return "x" * size


@server.tool(structured_output=False)
def crash() -> str:
    """End the server, with all that one should not say."""
    print("\n".join(f"line {number}" for number in range(1000)), file=sys.stderr)
    print(f"out of ideas, key {os.environ.get('API_KEY')}", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool(structured_output=False)
def picture() -> list[Any]:
    """A text and an image."""
    return ["a dot", Image(data=b"GIF89a", format="gif")]


@server.tool(structured_output=False)
def numbers() -> CallToolResult:
    """Structured content, no text."""
    return CallToolResult(content=[], structured_content={"one": 1})


@server.tool(structured_output=False)
def surroundings() -> str:
    """What it sees of us."""
    return f"{os.getcwd()} {' '.join(sorted(os.environ))}"


def serve_http() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(os.environ.get("COUNTER_PORT", "0"))))
        listener.listen(512)  # from now on connections wait for the server rather than fail
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(server.streamable_http_app(), log_level="critical", timeout_graceful_shutdown=1)
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    if "--http" in sys.argv:
        serve_http()
    else:
        server.run()
