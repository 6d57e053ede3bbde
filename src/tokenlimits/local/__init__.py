"""A Supabase on your own machine for development and tests: no Docker, no account, ready in seconds.

`LocalStack` runs Supabase Lite (Supabase's own small server, from npm) with this project's SQL applied,
on an embedded PostgreSQL (PGlite) or on your own PostgreSQL. It needs Node 20 or newer, which
`pip install 'tokenlimits[local]'` includes.

Example:
    from supabase import create_client
    from tokenlimits.local import LocalStack

    with LocalStack() as stack:
        client = create_client(stack.url, stack.secret_key)
        ann = stack.create_user("ann@example.com")
        client.rpc("track_generation", {"p_user_id": str(ann.id), "p_kind": "image"}).execute()
"""

from ._errors import LocalStackError
from ._stack import LocalStack
from ._users import LocalUser

__all__ = ["LocalStack", "LocalStackError", "LocalUser"]
