"""The one error of the development stack."""


class LocalStackError(RuntimeError):
    """The local stack can't be had, or did not do what it was asked. The message says what to do next."""
