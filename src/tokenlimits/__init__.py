"""Exact limits on AI generations for users and groups, on top of Supabase."""

from importlib.metadata import version as _version

from ._drivers.holds import AsyncHold, Hold
from .async_client import AsyncTokenLimits, atrack_generation
from .async_groups import AsyncGroupManager
from .client import TokenLimits, track_generation
from .errors import (
    ConfigurationError,
    GenerationDenied,
    InvalidRequest,
    LimitExceeded,
    NoLimitForKind,
    NotInGroup,
    ServiceUnavailable,
    TokenLimitsError,
)
from .groups import GroupManager
from .models import GenerationRequest, Limit, TrackResult

__version__ = _version("tokenlimits")

__all__ = [
    "AsyncGroupManager",
    "AsyncHold",
    "AsyncTokenLimits",
    "ConfigurationError",
    "GenerationDenied",
    "GenerationRequest",
    "GroupManager",
    "Hold",
    "InvalidRequest",
    "Limit",
    "LimitExceeded",
    "NoLimitForKind",
    "NotInGroup",
    "ServiceUnavailable",
    "TokenLimits",
    "TokenLimitsError",
    "TrackResult",
    "__version__",
    "atrack_generation",
    "track_generation",
]
