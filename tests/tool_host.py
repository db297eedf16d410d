"""A tool server as a program: `tool_host.py HOST PORT LOG`.

LOG gets a JSON line for each call that has come in, with its trace_id and call_id. While there is a file LOG.call calls
are held. Ends on SIGTERM.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_HOLD_S = 600.0


class Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log: Path

    def do_POST(self) -> None:
        call = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.log.open("a") as log:
            log.write(json.dumps({"trace_id": call["trace_id"], "call_id": call["call_id"]}) + "\n")
        deadline = time.monotonic() + _HOLD_S
        while self.log.with_name(f"{self.log.name}.call").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        answer = {"type": "function_call_output", "call_id": call["call_id"], "id": call["id"], "output": "nothing"}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *words: object) -> None:
        """Nothing on the console: the log has it."""


if __name__ == "__main__":
    Calls.log = Path(sys.argv[3])
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Calls).serve_forever()
