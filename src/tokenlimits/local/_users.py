"""Users who can sign in to the local stack, and the SQL that creates and changes users."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from uuid import UUID

# Like the rows of users who signed up and confirmed their address, but without a password.
INSERT_USERS: Final = """
insert into auth.users (
   id, aud, role, email, email_confirmed_at, raw_app_meta_data, raw_user_meta_data, created_at, updated_at
)
select
   gen_random_uuid(), 'authenticated', 'authenticated', $2 || n || '@example.com', now(),
   '{"provider": "email", "providers": ["email"]}', '{}', now(), now()
from generate_series(1, $1::integer) as n
returning id
"""

GRANT_ADMIN: Final = """
update auth.users
set raw_app_meta_data = coalesce(raw_app_meta_data, '{}') || '{"role": "admin"}'
where id = $1::uuid
returning id
"""

REVOKE_ADMIN: Final = """
update auth.users
set raw_app_meta_data = coalesce(raw_app_meta_data, '{}') - 'role'
where id = $1::uuid
returning id
"""


@dataclass(frozen=True, slots=True)
class LocalUser:
    """A user of the local stack who can sign in."""

    id: UUID
    email: str
    password: str = field(repr=False)
