"""What every page of the panel has in common: sessions, CSRF, templates, and errors as pages."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Final
from urllib.parse import quote

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import FormData
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from tokenlimits import AsyncGroupManager, errors, levels
from tokenlimits.web import _request_id
from tokenlimits.web._auth import Tokens
from tokenlimits.web._backend import Backend
from tokenlimits.web._bodies import MOST, MOST_IN_BULK, BoundedRequest
from tokenlimits.web._limiter import Limiter, address
from tokenlimits.web._problems import (
    Kind,
    SignInRequired,
    TooLarge,
    TooManyRequests,
    TooSlow,
    headers_of,
    is_sign_in_required,
    kind_of,
    with_headers,
)
from tokenlimits.web._sessions import BadOrigin, Session, Sessions

from . import _format, _words
from ._attempts import Attempts

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_SAFE: Final = frozenset({"GET", "HEAD"})

logger = logging.getLogger("tokenlimits")

templates: Final = Environment(
    loader=PackageLoader("tokenlimits.web.panel"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
templates.filters.update(_format.FILTERS, when=_words.when)


def _version() -> str:
    """Return a digest of `static`, so that browsers may cache each version forever."""
    static = files("tokenlimits.web.panel").joinpath("static")
    contents = (file.read_bytes() for file in sorted(static.iterdir(), key=lambda file: file.name))
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12]


_VERSION: Final = _version()


class Panel:
    """What all requests of the panel share.

    Args:
        backend: Where the answers come from.
    """

    def __init__(self, backend: Backend) -> None:
        settings = backend.settings
        self.backend = backend
        self.sessions = Sessions(
            backend.auth,
            settings.web_secret,
            project=settings.url,
            idle=settings.session_idle_minutes * 60,
            longest=settings.session_hours * 3600,
        )
        self.attempts = Attempts(settings.sign_ins_per_minute)
        self._requests = Limiter(settings.requests_per_minute, "requests")

    async def __call__(self, request: Request) -> None:
        """Let a request in; the first dependency of each page.

        Raises:
            TooManyRequests: Its sender sent too many.
            BadOrigin: It would change something, and doesn't come from a page of the panel.
            SignInRequired: It has a long body, and nobody is signed in.
            AccessDenied: It has a long body, and its sender is no admin.
        """
        request.state.panel = self
        request.state.session = session = self.sessions.read(request)
        self._requests.hit(str(session.tokens.person.id) if session.tokens else address(request))
        if request.method not in _SAFE:
            if request.state.may_be_long:
                await (await _watch(request)).groups.page(size=1)
            token = request.headers.get("x-csrf-token") or (await read_form(request)).get("csrf")
            self.sessions.check_csrf(request, session, token)


@dataclass(frozen=True, slots=True)
class Visit:
    """A request of somebody who is signed in."""

    request: Request
    tokens: Tokens
    groups: AsyncGroupManager

    def page(self, template: str, status: int = 200, **more: Any) -> Response:
        """Render a template."""
        return render(self.request, template, status, **more)

    async def form(self) -> FormData:
        """Return the submitted form."""
        return await read_form(self.request)


async def _watch(request: Request) -> Visit:
    panel: Panel = request.state.panel
    before: Session = request.state.session
    session = await panel.sessions.fresh(before)
    if session is not before:
        request.state.session = request.state.written = session
    assert session.tokens is not None  # noqa: S101  # fresh() answers no other
    groups = await panel.backend.groups(session.tokens.access.get_secret_value())
    return Visit(request, session.tokens, groups)


Watching = Annotated[Visit, Depends(_watch)]


async def _visit(request: Request, visit: Watching) -> Visit:
    session: Session = request.state.session
    if request.state.panel.sessions.is_due(session):
        request.state.written = session
    return visit


# a page that asks what has changed is nobody's visit: it would never let its session go idle
Signed = Annotated[Visit, Depends(_visit)]


def render(request: Request, template: str, status: int = 200, **more: Any) -> Response:
    """Render a template with the variables that all templates need."""
    panel: Panel = request.state.panel
    session: Session = request.state.session
    content = templates.get_template(template).render(
        root=request.scope.get("root_path", ""),
        csrf=panel.sessions.csrf(session),
        version=_VERSION,
        levels=levels,
        person=session.tokens.person if session.tokens else None,
        path=request.url.path,
        **more,
    )
    return HTMLResponse(content, status)


def done(message: str, **events: Any) -> Response:
    """Report success: the browser closes the dialog, shows the message, and refreshes."""
    return Response(status_code=204, headers=_event(done={"message": message}, **events))


def stay(response: Response, message: str) -> Response:
    """Report success with the dialog left open."""
    response.headers.update(_event(done={"message": message, "stay": True}))
    return response


def _event(**events: Any) -> dict[str, str]:
    # json.dumps writes ASCII only, which is all that a header can hold
    return {"HX-Trigger": json.dumps(events)}


async def read_form(request: Request) -> FormData:
    """Read a submitted form, up to a list of 100,000 users."""
    return await request.form(max_fields=5_000, max_part_size=MOST_IN_BULK)


def is_fragment(request: Request) -> bool:
    """Whether a script made this request, rather than the address bar."""
    return "hx-request" in request.headers


class PageRoute(APIRoute):
    """Answers errors as pages, or as plain text if a script made the request."""

    most = MOST
    """Bytes of a body; longer ones than `MOST` are read from admins alone."""

    def get_route_handler(self) -> _Handler:
        """Wrap FastAPI's handler."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            bounded = BoundedRequest(request, self.most)
            request.state.may_be_long = self.most > MOST and bounded.may_be_long()
            try:
                response = await handler(bounded)
                _keep(request, response)
            except (
                BadOrigin,
                SignInRequired,
                TooLarge,
                TooManyRequests,
                TooSlow,
                RequestValidationError,
                errors.TokenLimitsError,
            ) as error:
                response = _sign_in(request) if is_sign_in_required(error) else _failed(request, error)
                if response.status_code in (429, 503):
                    with_headers(response, headers_of(error))
                _keep(request, response)
            response.headers["Cache-Control"] = "no-store"
            return response

        return answer


class BulkPageRoute(PageRoute):
    """Takes long lists."""

    most = MOST_IN_BULK


def _keep(request: Request, response: Response) -> None:
    session: Session | None = getattr(request.state, "written", None)
    if session is not None:
        request.state.written = None  # if it can't be written, don't try again for the page that says so
        request.state.panel.sessions.write(request, response, session)


def _sign_in(request: Request) -> Response:
    if is_fragment(request):
        return PlainTextResponse("Please sign in again.", 401)
    path = request.url.path if request.method in _SAFE else f"{request.scope.get('root_path', '')}/"
    return RedirectResponse(f"{request.scope.get('root_path', '')}/sign-in?next={quote(path)}", 303)


# what nothing but a page raises
_OF_PAGES: Final = (
    Kind(BadOrigin, 403, "bad-origin", "This page is out of date", "Reload it and try again."),
    Kind(RequestValidationError, 404, "not-found", "Page not found", "The address may be mistyped."),
)


def _failed(request: Request, error: Exception) -> Response:
    _, status, _, title, advice = kind_of(error, _OF_PAGES)
    if status == 500:
        logger.error("%s: %s", type(error).__name__, error)
    if isinstance(error, errors.AccessDenied) and not is_fragment(request):
        return render(request, "not_admin.html", status)
    if isinstance(error, errors.InvalidRequest):
        advice = str(error)
    if is_fragment(request):
        # the session of the page is gone, with its cookie: the script keeps what was typed, and loads the page anew
        headers = {"X-Stale-Page": "yes"} if isinstance(error, BadOrigin) else None
        return PlainTextResponse(f"{title}. {advice}".strip(), status, headers)
    return render(
        request,
        "problem.html",
        status,
        title=title,
        advice=advice,
        retry=status == 503,
        request_id=_request_id.current(),
    )
