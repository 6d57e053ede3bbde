"""Seals cookies and makes CSRF tokens, with keys derived from the secrets in the settings."""

from __future__ import annotations

import base64
import hmac
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr


class Seal:
    """Seals with the first secret and opens with any of them, so that secrets can be rotated.

    Args:
        secrets: One or more.
        seconds: How long a seal lasts at most.
    """

    def __init__(self, secrets: Sequence[SecretStr], seconds: float) -> None:
        self._fernets = MultiFernet(
            [Fernet(base64.urlsafe_b64encode(_key(secret, b"tokenlimits cookie"))) for secret in secrets]
        )
        self._csrf_keys = [_key(secret, b"tokenlimits csrf") for secret in secrets]
        self._seconds = int(seconds)

    def close(self, content: Mapping[str, Any]) -> str:
        """Seal a JSON object."""
        return self._fernets.encrypt(zlib.compress(json.dumps(content).encode())).decode()

    def open(self, sealed: str) -> tuple[dict[str, Any], float] | None:
        """Return what was sealed, and when; None if it is too old, or none of the secrets sealed it."""
        try:
            content = self._fernets.decrypt(sealed.encode(), ttl=self._seconds)
            return json.loads(zlib.decompress(content)), self._fernets.extract_timestamp(sealed.encode())
        except InvalidToken:
            return None

    def csrf(self, id_: str) -> str:
        """Make the CSRF token of a session."""
        return _csrf(self._csrf_keys[0], id_)

    def is_csrf(self, id_: str, token: str) -> bool:
        """Whether a text is the CSRF token of a session."""
        return any(hmac.compare_digest(token.encode(), _csrf(key, id_).encode()) for key in self._csrf_keys)


def _key(secret: SecretStr, purpose: bytes) -> bytes:
    # The secret is random and long, so it needs no salt, and no slow hash.
    return HKDF(SHA256(), 32, None, purpose).derive(secret.get_secret_value().encode())


def _csrf(key: bytes, id_: str) -> str:
    return hmac.new(key, id_.encode(), "sha256").hexdigest()
