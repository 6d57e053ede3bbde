"""The one error of the development stack."""

from tokenlimits.errors import TokenLimitsError


class LocalStackError(TokenLimitsError):
    """The local stack can't run, or a request to it failed. The message says what to do next."""
