"""Sign in and out."""

from __future__ import annotations

import math
import secrets
from typing import Annotated

from fastapi import Query, Request
from pydantic import SecretStr
from starlette.responses import RedirectResponse, Response

from tokenlimits import ServiceUnavailable
from tokenlimits.errors import AccessDenied
from tokenlimits.web._auth import Tokens
from tokenlimits.web._limiter import address
from tokenlimits.web._problems import TooManyRequests, headers_of, kind_of, with_headers
from tokenlimits.web._router import Router
from tokenlimits.web._sessions import Session

from ._pages import PageRoute, Panel, read_form, render

routes = Router(route_class=PageRoute, include_in_schema=False)


@routes.get("/sign-in")
async def sign_in_page(request: Request, next_: Annotated[str, Query(alias="next")] = "") -> Response:
    """Show the form."""
    request.state.written = request.state.session
    return _form(request, 200, next_, "", "")


@routes.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Begin a session."""
    panel: Panel = request.state.panel
    form = await read_form(request)
    email, password, next_ = (str(form.get(name, "")) for name in ("email", "password", "next"))
    try:
        tokens = await _signed_in(panel, email.strip(), SecretStr(password), address(request))
    except AccessDenied:
        return _form(request, 401, next_, email, "Wrong e-mail address or password.")
    except TooManyRequests as error:
        minutes = math.ceil(error.retry_after / 60)
        wait = "in a minute" if minutes <= 1 else f"in {minutes} minutes"
        response = _form(request, 429, next_, email, f"Too many attempts. Please try again {wait}.")
        return with_headers(response, headers_of(error))
    except ServiceUnavailable as error:
        kind = kind_of(error)
        return _form(request, kind.status, next_, email, f"{kind.title}. {kind.advice}")
    # a new id, so that somebody who knew or planted the old one can't use this session
    request.state.written = Session(secrets.token_urlsafe(24), tokens)
    return RedirectResponse(_local(request, next_), 303)


async def _signed_in(panel: Panel, email: str, password: SecretStr, address_: str) -> Tokens:
    attempt = panel.attempts.begin(email, address_)
    try:
        tokens = await panel.backend.auth.sign_in(email, password)
    except (TooManyRequests, ServiceUnavailable):
        panel.attempts.take_back(attempt)
        raise
    panel.attempts.succeeded(attempt)
    return tokens


@routes.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session, here and in Supabase."""
    session: Session = request.state.session
    request.state.written = Session(secrets.token_urlsafe(24))
    await request.state.panel.sessions.end(session)
    return RedirectResponse(f"{request.scope.get('root_path', '')}/sign-in", 303)


def _form(request: Request, status: int, next_: str, email: str, error: str) -> Response:
    return render(request, "sign_in.html", status, next=next_, email=email, error=error)


def _local(request: Request, next_: str) -> str:
    """Return to the page that asked for the sign-in, and never to another site."""
    root = f"{request.scope.get('root_path', '')}/"
    safe = next_.startswith(root) and not next_.startswith(("//", "/\\"))
    return next_ if safe and next_.isprintable() else root
