"""A scripted model behind OpenAI's chat completions: it stands for the strong models that the guide asks.

As a data generator it writes as many first-person questions as the schema's list is asked to hold, as a rater it gives
a number that depends on the text, as a judge it likes replies that ask a question and are short. The same request
always gets the same answer.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

_TOPICS = [
    "falling asleep earlier",
    "screen time before bed",
    "starting at the gym",
    "drinking more water",
    "stretching in the morning",
    "walking after meals",
    "coffee in the afternoon",
    "sitting all day",
    "easy lunches",
    "light breakfasts",
    "short naps",
    "cold showers",
    "running slowly",
    "back stiffness",
    "dry hands",
    "tired eyes",
    "evening snacks",
    "posture at my desk",
    "warm-up sets",
    "rest days",
]
_OPENINGS = ("How do I get better at", "What is a sensible way to approach", "Should I change anything about")
_NUM_EXAMPLES = 20


def app() -> Starlette:
    """The server as an ASGI application; `app.state.requests` holds the bodies it got."""
    application = Starlette(routes=[Route("/v1/chat/completions", _complete, methods=["POST"])])
    application.state.requests = []
    return application


async def _complete(request: Request) -> JSONResponse:
    body = await request.json()
    request.app.state.requests.append(body)
    prompt = "\n".join(_text(message["content"]) for message in body["messages"])
    answer = _answer(prompt, body.get("response_format") or {})
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(answer.split())}
    return JSONResponse(
        {
            "id": f"chatcmpl-{zlib.crc32(prompt.encode()):08x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"},
            ],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
    )


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def _answer(prompt: str, form: dict[str, Any]) -> str:
    properties = form.get("json_schema", {}).get("schema", {}).get("properties", {})
    if "synthetic_data" in properties:
        return json.dumps({"synthetic_data": questions(_NUM_EXAMPLES)})
    if "ok" in properties:  # what a judge is asked before a run starts
        return json.dumps({"ok": True})
    if "result" in properties:
        return json.dumps({"steps": [], "result": grade(_reply(prompt))})
    if "Return just the number" in prompt:
        return str(zlib.crc32(prompt.encode()) % 11)
    return "Could you tell me a little more about what you have tried?"


def questions(count: int) -> list[str]:
    """Distinct ones."""
    return [f"{_OPENINGS[number % 3]} {_TOPICS[number % len(_TOPICS)]}?" for number in range(count)]


def _reply(prompt: str) -> str:
    """What the guide's grading prompt shows as the agent's."""
    found = re.search(r"Agent reply:\n(.*)\n\nReturn only the numeric score", prompt, re.DOTALL)
    return found[1] if found else ""


def grade(reply: str) -> float:
    """0.7 for asking anything, 0.3 for few words; between 0 and 1."""
    num_words = len(reply.split())
    return round(0.7 * ("?" in reply) + 0.3 * max(0.0, 1 - num_words / 100), 4)
