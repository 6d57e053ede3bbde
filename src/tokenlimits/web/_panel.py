"""The panel as a router."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from tokenlimits import ConfigurationError

from . import _panel_group, _panel_groups, _panel_members, _panel_overview, _panel_sign_in, _panel_tokens
from ._backend import Backend
from ._pages import PageRoute, Panel


def panel_of(backend: Backend) -> APIRouter:
    """Make the router for a backend.

    Raises:
        ConfigurationError: There is no secret to seal the sessions with.
    """
    secret = backend.settings.web_secret
    if secret is None:
        raise ConfigurationError(
            "The panel needs TOKENLIMITS_WEB_SECRET, 32 characters or more that nobody can guess, the same in all its "
            "processes. Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    panel = APIRouter(route_class=PageRoute, dependencies=[Depends(Panel(backend, secret))], include_in_schema=False)
    panel.include_router(_panel_sign_in.routes)
    panel.include_router(_panel_tokens.routes)
    panel.include_router(_panel_groups.routes)
    panel.include_router(_panel_members.routes)
    panel.include_router(_panel_group.routes)
    panel.include_router(_panel_overview.routes)
    return panel
