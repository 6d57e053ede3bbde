"""`LocalStack`: the development stack as an object."""

from __future__ import annotations

import secrets
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import UUID

import httpx

from tokenlimits.errors import ConfigurationError
from tokenlimits.settings import named_schema
from tokenlimits.sql_files import SqlFile, migrations

from ._errors import LocalStackError
from ._kept import Kept
from ._node import find_node
from ._packages import installed_packages, server_script
from ._server import LiteServer
from ._users import GRANT_ADMIN, INSERT_USERS, REVOKE_ADMIN, LocalUser

if TYPE_CHECKING:
    from types import TracebackType

_ALPHABET: Final = string.ascii_letters + string.digits
# the defaults of a hosted project
_EXPOSED: Final = ("public", "graphql_public")


class LocalStack:
    """Supabase Lite with the migrations applied, on 127.0.0.1, until it is stopped.

    Args:
        database_url: A PostgreSQL to serve (`postgresql://user:password@host/database`; the role must be
            allowed to create the migrations' objects and to become `anon`, `authenticated` and
            `service_role`). Its migration history is kept, so that a later start applies only what is new.
            None: an embedded PGlite, in memory unless there is a `data_dir`.
        data_dir: A directory in which PGlite keeps its database, and this the keys, so that a later stack finds both
            as they were. It is created if it doesn't exist; one stack at a time may use it.
        port: The port to listen on. None: a free one.
        sql_dir: The migrations to apply, in the order of their names (`YYYYMMDDHHMMSS_topic.sql`).
            None: those of this package.
        schema: Where the migrations of this package install tokenlimits. It is exposed in the API besides `public`;
            any other schema is refused, as on a hosted project (406, `PGRST106`).
        pool_size: The most connections to a PostgreSQL at once. PGlite has one.
        like_hosted: Correct Lite where it differs from hosted Supabase: the grants of the API roles, the
            SQLSTATEs of errors, read-only `stable` functions, the metadata in access tokens (see
            `server.mjs`). False: Lite as it is.
        timeout: Seconds that a start and each call of `sql` may take. The first start also downloads Lite.

    Raises:
        LocalStackError: The name `schema` is not allowed. On start: Node or Lite is not available, the port is
            taken, or a migration fails.

    Example:
        with LocalStack() as stack:
            client = supabase.create_client(stack.url, stack.secret_key)
    """

    def __init__(
        self,
        database_url: str | None = None,
        port: int | None = None,
        sql_dir: str | Path | None = None,
        *,
        data_dir: str | Path | None = None,
        schema: str = "public",
        pool_size: int = 32,
        like_hosted: bool = True,
        timeout: float = 60,
    ) -> None:
        if database_url is not None and data_dir is not None:
            raise LocalStackError("data_dir is for the embedded database; leave it out with a database_url")
        self.database_url: Final = database_url
        self.schema: Final = _checked(schema)
        self._kept = None if data_dir is None else Kept(Path(data_dir).absolute())
        keys = _keys() if self._kept is None else self._kept.keys(_keys)
        self.secret_key: Final = keys["secret_key"]
        self.publishable_key: Final = keys["publishable_key"]
        self._jwt_secret: Final = keys["jwt_secret"]
        self._wanted_port = port
        self._sql_dir = Path(sql_dir) if sql_dir is not None else None
        self._pool_size = pool_size
        self._like_hosted = like_hosted
        self._timeout = timeout
        self._server: LiteServer | None = None
        self._url: str | None = None

    def __repr__(self) -> str:
        return f"LocalStack({self._url or 'stopped'})"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens, such as `http://127.0.0.1:54321`: the `SUPABASE_URL`."""
        if self._url is None:
            raise LocalStackError("The local stack isn't running: call start(), or use it in a with statement")
        return self._url

    def start(self) -> Self:
        """Start, and return once it answers. A stopped stack can start again, with the same keys."""
        if self._server is not None:
            raise LocalStackError("The local stack is already running")
        node = find_node()
        packages = installed_packages(node)
        command = [str(node.executable), str(server_script(packages))]
        if self._kept is not None:
            self._kept.take()
        try:
            self._server = LiteServer(command, self._migrations())
            port = self._server.start(self._configuration(packages), timeout=self._timeout)
            self._url = f"http://127.0.0.1:{port}"
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop, and leave nothing behind; a second call does nothing."""
        server, self._server, self._url = self._server, None, None
        if server is not None:
            server.stop()
        if self._kept is not None:
            self._kept.leave()

    def environment(self) -> dict[str, str]:
        """Return the variables that tell `tokenlimits` (and other Supabase programs) how to reach this stack."""
        return {
            "SUPABASE_URL": self.url,
            "SUPABASE_SECRET_KEY": self.secret_key,
            "SUPABASE_PUBLISHABLE_KEY": self.publishable_key,
            "TOKENLIMITS_SCHEMA": self.schema,
        }

    def create_user(self, email: str, password: str | None = None, *, admin: bool = False) -> LocalUser:
        """Sign up a user with a confirmed address; without a password, one is generated."""
        password = password or _token(20)
        answer = self._auth("signup", email, password)
        user = LocalUser(id=UUID(answer["user"]["id"]), email=answer["user"]["email"], password=password)
        if admin:
            self.grant_admin(user.id)
        return user

    def create_users(self, count: int, prefix: str | None = None) -> list[UUID]:
        """Create many users at once; they can't sign in.

        Their addresses are `<prefix>1@example.com`, `<prefix>2@example.com` and so on; their ids are returned in that
        order. 50,000 take a second or two. Without a prefix, a unique one is generated.
        """
        prefix = f"user-{_token(8).lower()}-" if prefix is None else prefix
        return [UUID(row["id"]) for row in self.sql(INSERT_USERS, count, prefix)]

    def grant_admin(self, user_id: UUID | str) -> None:
        """Make a user an admin, starting with their next sign-in."""
        self._change(GRANT_ADMIN, user_id)

    def revoke_admin(self, user_id: UUID | str) -> None:
        """Take the admin role away from a user, starting with their next sign-in (a token lives for an hour)."""
        self._change(REVOKE_ADMIN, user_id)

    def access_token(self, user: LocalUser) -> str:
        """Sign in with the password and return the JWT of a new session."""
        return self._auth("token?grant_type=password", user.email, user.password)["access_token"]

    def sql(self, statement: str, *parameters: object) -> list[dict[str, Any]]:
        """Run one statement as the database's owner, with parameters `$1`, `$2` …, and return its rows.

        Values cross as JSON: a UUID or a timestamp arrives as text.

        Example:
            stack.sql("select email from auth.users where id = $1", str(user.id))
        """
        if self._server is None:
            raise LocalStackError("The local stack isn't running: call start(), or use it in a with statement")
        return self._server.query(statement, parameters, timeout=self._timeout)

    def _migrations(self) -> tuple[SqlFile, ...]:
        if self._sql_dir is None:
            return migrations(self.schema)
        if not self._sql_dir.is_dir():
            raise LocalStackError(f"sql_dir {self._sql_dir} is not a directory")
        found = sorted(self._sql_dir.glob("*.sql"))
        return tuple(SqlFile(path.name, path.read_text(encoding="utf-8")) for path in found)

    def _configuration(self, packages: Path) -> dict[str, object]:
        return {
            "port": self._wanted_port or 0,
            "database_url": self.database_url,
            "data_directory": self._kept.database if self._kept else None,
            "pool_size": self._pool_size,
            "blank_database": str(packages / "blank.tar"),
            "like_hosted": self._like_hosted,
            "exposed_schemas": list(dict.fromkeys([*_EXPOSED, self.schema])),
            "secret_key": self.secret_key,
            "publishable_key": self.publishable_key,
            "jwt_secret": self._jwt_secret,
        }

    def _wait_until_ready(self) -> None:
        """Make one call with the secret key, so that Lite has read the schema; the function needn't exist."""
        answer = self._post("/rest/v1/rpc/tokenlimits_version", self.secret_key, {})
        if answer.status_code >= 500 or answer.status_code == 401:
            output = self._server.last_output() if self._server else ""
            raise LocalStackError(f"Supabase Lite isn't ready: {answer.status_code} {answer.text}{output}")

    def _auth(self, path: str, email: str, password: str) -> dict[str, Any]:
        body = {"email": email, "password": password}
        answer = self._post(f"/auth/v1/{path}", self.publishable_key, body)
        if answer.is_error:
            raise LocalStackError(f"Auth refused {email}: {answer.status_code} {answer.text}")
        return answer.json()

    def _post(self, path: str, key: str, body: dict[str, str]) -> httpx.Response:
        try:
            # a proxy from the environment couldn't reach 127.0.0.1
            with httpx.Client(timeout=self._timeout, trust_env=False) as client:
                return client.post(f"{self.url}{path}", headers={"apikey": key}, json=body)
        except httpx.HTTPError as error:
            output = self._server.last_output() if self._server else ""
            raise LocalStackError(f"Supabase Lite does not answer: {error}{output}") from error

    def _change(self, statement: str, user_id: UUID | str) -> None:
        if not self.sql(statement, str(user_id)):
            raise LocalStackError(f"There is no user {user_id}")


def _checked(schema: str) -> str:
    try:
        return named_schema(schema)
    except ConfigurationError as error:
        problem = str(error)
    raise LocalStackError(problem)


def _keys() -> dict[str, str]:
    return {
        "secret_key": f"sb_secret_{_token(22)}_{_token(8)}",
        "publishable_key": f"sb_publishable_{_token(22)}_{_token(8)}",
        "jwt_secret": secrets.token_urlsafe(48),
    }


def _token(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
