"""Decorators that run any kind of function inside a generation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, TypeVar, cast

from tokenlimits._core import workers
from tokenlimits._core.arguments import Id, Key
from tokenlimits._core.call import Call
from tokenlimits.errors import ConfigurationError
from tokenlimits.models import TrackResult

from .holds import AsyncHold, Hold

Function = TypeVar("Function", bound=Callable[..., Any])
AsyncFunction = TypeVar("AsyncFunction", bound=Callable[..., Coroutine[Any, Any, Any] | AsyncIterator[Any]])
Open = Callable[[Call[TrackResult]], AbstractContextManager[Hold, None]]
AsyncOpen = Callable[[Call[TrackResult]], AbstractAsyncContextManager[AsyncHold, None]]
Reserve = Callable[..., Call[TrackResult]]
"""Takes the function's arguments."""

User = str | Callable[..., Id]
Cost = int | Callable[..., int]
KeyOf = str | Callable[..., Key | None] | None

_ANYBODY = "00000000-0000-0000-0000-000000000000"


def reservation(
    function: Callable[..., Any],
    kind: str,
    user: User,
    cost: Cost,
    ttl: int,
    idempotency_key: KeyOf,
    group_id: Id | None,
    metadata: Mapping[str, Any] | None,
) -> Reserve:
    """Make the function that makes the call from a decorated function's arguments; refuse what is never valid."""
    if isinstance(cast("object", function), classmethod | staticmethod) or not callable(function):
        raise ConfigurationError(f"limited: can't decorate {function!r}; put it below @classmethod and @staticmethod")
    of_user = _argument(function, "user", user)
    of_key = None if idempotency_key is None else _argument(function, "idempotency_key", idempotency_key)

    def make(user_id: Id, cost_: int, key: Key | None) -> Call[TrackResult]:
        return workers.reserve(user_id, kind, cost_, ttl, key, group_id, metadata)

    make(_ANYBODY, 1 if callable(cost) else cost, None)

    def reserve(*args: Any, **kwargs: Any) -> Call[TrackResult]:
        return make(
            of_user(*args, **kwargs),
            cost(*args, **kwargs) if callable(cost) else cost,
            of_key(*args, **kwargs) if of_key is not None else None,
        )

    return reserve


def _argument(function: Callable[..., Any], option: str, value: object) -> Callable[..., Any]:
    """Make the function that finds a value in the decorated function's arguments, by a name or a function."""
    if callable(value):
        return value
    if not isinstance(value, str):
        raise ConfigurationError(f"{option}: must be the name of a parameter, or a function (got {value!r:.100})")
    signature = inspect.signature(function)
    named = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if value not in named:
        raise ConfigurationError(
            f"{option}: {_name(function)} has no parameter {value!r} (it has {', '.join(named) or 'none'}); "
            "name one of them, or pass a function of its arguments"
        )

    def find(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments[value]

    return find


def decorated(function: Function, reserve: Reserve, open_: Open) -> Function:
    """Decorate a plain function or a generator."""
    if _is(function, inspect.iscoroutinefunction) or _is(function, inspect.isasyncgenfunction):
        raise _wrong_colour(function)
    run = _generator if _is(function, inspect.isgeneratorfunction) else _plain
    return cast("Function", run(function, reserve, open_))


def async_decorated(function: AsyncFunction, reserve: Reserve, open_: AsyncOpen) -> AsyncFunction:
    """Decorate a coroutine function or an async generator."""
    if _is(function, inspect.iscoroutinefunction):
        return cast("AsyncFunction", _coroutine(function, reserve, open_))
    if _is(function, inspect.isasyncgenfunction):
        return cast("AsyncFunction", _async_generator(function, reserve, open_))
    raise ConfigurationError(f"limited: {_name(function)} is not async, so that it needs a TokenLimits")


def _wrong_colour(function: Callable[..., Any]) -> ConfigurationError:
    return ConfigurationError(f"limited: {_name(function)} is async, so that it needs an AsyncTokenLimits")


def _is(function: Callable[..., Any], sort: Callable[[object], bool]) -> bool:
    return sort(function) or sort(getattr(function, "__call__", None))  # noqa: B004  # not whether, but of what sort


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__qualname__', type(function).__qualname__)}()"


def _plain(function: Callable[..., Any], reserve: Reserve, open_: Open) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with open_(reserve(*args, **kwargs)) as hold:
            hold.returned = function(*args, **kwargs)
            if inspect.iscoroutine(cast("object", hold.returned)):
                hold.returned.close()
                raise _wrong_colour(function)
        return hold.returned

    return run


def _generator(function: Callable[..., Any], reserve: Reserve, open_: Open) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with open_(reserve(*args, **kwargs)) as hold:
            inner: Generator[Any, Any, Any] = function(*args, **kwargs)
            hold.returned = yield from inner
        return hold.returned

    return run


def _coroutine(function: Callable[..., Any], reserve: Reserve, open_: AsyncOpen) -> Callable[..., Any]:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        async with open_(reserve(*args, **kwargs)) as hold:
            hold.returned = await function(*args, **kwargs)
        return hold.returned

    return run


def _async_generator(function: Callable[..., Any], reserve: Reserve, open_: AsyncOpen) -> Callable[..., Any]:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        async with open_(reserve(*args, **kwargs)):
            inner: AsyncGenerator[Any, Any] = function(*args, **kwargs)
            step: Coroutine[Any, Any, Any] = inner.asend(None)
            while True:  # async generators have no `yield from`, so this forwards what the caller sends and throws
                try:
                    item = await step
                except StopAsyncIteration:
                    return
                try:
                    step = inner.asend((yield item))
                except GeneratorExit:
                    await inner.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001  # for the inner generator to handle
                    step = inner.athrow(error)

    return run
