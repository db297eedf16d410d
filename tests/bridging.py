"""What the tests of bridges share: an item, a call, and a session that is opened, used and closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter

from rft.envs import Environment, EnvironmentConfig, Session, ToolSpecs, build_environment, discover_tools
from rft.types import Item, Message, ToolCall, ToolResult

T = TypeVar("T")


def an_environment(**config: Any) -> Environment:
    return build_environment(a_config(**config))


def a_config(**config: Any) -> Any:
    return TypeAdapter(EnvironmentConfig).validate_python(config)


def specs_of(**config: Any) -> ToolSpecs:
    return asyncio.run(discover_tools(a_config(**config)))


def an_item(specs: ToolSpecs, item_id: str = "i", **row: Any) -> Item:
    messages = [{"role": "user", "content": "Begin."}]
    tools = [spec for spec in specs.values() if spec is not None]
    row = {"messages": messages, **row}
    return Item(id=item_id, row=row, messages=[Message.model_validate(messages[0])], tools=tools)


def a_call(name: str, arguments: Any = None, number: int = 1) -> ToolCall:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    return ToolCall(id=f"fc_{number}", call_id=f"call_{number}", name=name, arguments=text)


def with_session(
    body: Callable[[Session], Awaitable[T]], config: dict[str, Any], row: dict[str, Any] | None = None
) -> T:
    """Open a session as a rollout does, use it, close it, whatever happens."""

    async def run() -> T:
        environment = an_environment(**config)
        try:
            await environment.check()
            session = await environment.open(an_item(await environment.discover(), **(row or {})), "trace_1")
            try:
                return await body(session)
            finally:
                await session.close()
        finally:
            await environment.close()

    return asyncio.run(run())


async def calls(session: Session, name: str, *arguments: Any) -> list[ToolResult]:
    """Several calls one after another."""
    return [await session.call(a_call(name, each, number)) for number, each in enumerate(arguments, 1)]
