"""The one error of the development stack."""

from tokenlimits.errors import TokenLimitsError


class LocalStackError(TokenLimitsError):
    """The local stack can't be had, or did not do what it was asked. The message says what to do next."""
