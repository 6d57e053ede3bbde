"""Routers whose GET routes answer HEAD too, and whose operations have the names of their functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter


class Router(APIRouter):
    """An APIRouter; FastAPI's own routes answer 405 to HEAD."""

    def __init__(self, **more: Any) -> None:
        super().__init__(generate_unique_id_function=lambda route: route.name, **more)

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **more: Any) -> None:
        """Add a route; one of GET twice, since each method of a route would stand in OpenAPI's document."""
        super().add_api_route(path, endpoint, **more)
        if more.get("methods") == ["GET"]:
            head: dict[str, Any] = {**more, "methods": ["HEAD"], "include_in_schema": False}
            super().add_api_route(path, endpoint, **head)
