"""The dependency, in an app of somebody else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

import httpx
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from supabase import AsyncClient, AsyncClientOptions
from tests.support.waiting import eventually
from tests.web.conftest import served
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tokenlimits import AsyncTokenLimits, GroupManager, Hold, InvalidRequest, Limit, TokenLimits
from tokenlimits.local import LocalStack, LocalUser
from tokenlimits.models import Group
from tokenlimits.web import WebSettings, require_generation


async def price(x_cost: Annotated[int, Header()] = 1) -> int:
    return x_cost


async def named(x_user: Annotated[UUID, Header()]) -> UUID:
    return x_user


def add_endpoints(app: FastAPI, limits: AsyncTokenLimits, settings: WebSettings) -> None:
    image = require_generation("image", price, settings=settings, limits=limits)

    @app.post("/images", dependencies=[Depends(image)])
    async def images(fail: str = "") -> str:
        if fail == "http":
            raise HTTPException(502, "The model is away")
        if fail:
            raise RuntimeError(fail)
        return "an image"

    @app.post("/less")
    async def less(hold: Hold = Depends(image, scope="function")) -> str:  # noqa: B008  # the name is local
        hold.commit(cost=1)
        return "less"

    @app.post("/stream", dependencies=[Depends(image)])
    async def stream(fail: bool = False) -> StreamingResponse:
        async def words() -> AsyncIterator[str]:
            yield "one "
            if fail:
                raise RuntimeError("the model broke")
            yield "two"

        return StreamingResponse(words())

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, hold: Hold = Depends(image)) -> None:  # noqa: B008  # the name is local
        await websocket.accept()
        await websocket.send_text(f"{hold.cost} held")
        hold.commit(cost=1)
        await websocket.close()

    @app.post("/named", dependencies=[Depends(require_generation("image", 2, user=named, limits=limits))])
    async def by_name() -> str:
        return "named"


@pytest.fixture(scope="module")
def app_url(stack: LocalStack, settings: WebSettings) -> Iterator[str]:
    # uvicorn's loop is where it is used first, and so where it belongs
    http = httpx.AsyncClient(trust_env=False)
    client = AsyncClient(stack.url, stack.secret_key, AsyncClientOptions(httpx_client=http))
    limits = AsyncTokenLimits(client)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with http:
            yield

    app = FastAPI(lifespan=lifespan)

    add_endpoints(app, limits, settings)
    with served(app) as url:
        yield url


@pytest.fixture
def pro(groups: GroupManager, user: LocalUser) -> Group:
    pro = groups.create("Pro", limits=[Limit(kind="image", max=3, period="day")])
    groups.add_member(pro.id, user.id)
    return pro


@pytest.fixture
def http(app_url: str, tokens: dict[str, str]) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {tokens['user']}"}
    with httpx.Client(base_url=app_url, headers=headers, trust_env=False) as http:
        yield http


def statuses(stack: LocalStack, group: Group) -> list[tuple[str, int]]:
    """Return what the ledger says about a group, once all is settled: that comes after the response."""
    query = "select status, cost from public.generation_usage where group_id = $1 order by created_at"
    found: list[tuple[str, int]] = []

    def settled() -> bool:
        found[:] = [(row["status"], int(row["cost"])) for row in stack.sql(query, str(group.id))]
        return "reserved" not in dict(found)

    eventually(settled)
    return found


def test_commits_what_went_well(http: httpx.Client, stack: LocalStack, pro: Group) -> None:
    answer = http.post("/images", headers={"X-Cost": "2"})
    assert answer.json() == "an image"
    assert answer.headers["ratelimit"].startswith('"image-day-group";r=1;t=')
    assert statuses(stack, pro) == [("committed", 2)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("fail", "status"), [("http", 502), ("bang", 500)])
def test_releases_what_failed(http: httpx.Client, stack: LocalStack, pro: Group, fail: str, status: int) -> None:
    assert http.post("/images", params={"fail": fail}).status_code == status
    assert [status for status, _ in statuses(stack, pro)] == ["released"]


def test_a_stream_is_charged_when_it_is_complete(http: httpx.Client, stack: LocalStack, pro: Group) -> None:
    assert http.post("/stream").text == "one two"
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/stream", params={"fail": True})
    assert [status for status, _ in statuses(stack, pro)] == ["committed", "released"]


def test_the_endpoint_may_commit_less(http: httpx.Client, stack: LocalStack, pro: Group) -> None:
    assert http.post("/less", headers={"X-Cost": "3"}).status_code == 200
    assert statuses(stack, pro) == [("committed", 1)]


def test_at_the_limit_it_is_429_and_the_endpoint_does_not_run(
    http: httpx.Client, stack: LocalStack, pro: Group, limits: TokenLimits, user: LocalUser
) -> None:
    limits.track(user.id, "image", 3)
    denied = http.post("/images", params={"fail": "bang"})
    assert denied.status_code == 429
    assert denied.json()["detail"].startswith("Image generation limit exceeded: 3 of 3 used today")
    assert 0 < int(denied.headers["retry-after"]) <= 86_400
    assert denied.headers["ratelimit-policy"] == '"image-day-group";q=3;w=86400'
    assert denied.headers["ratelimit"].startswith('"image-day-group";r=0;t=')
    assert len(statuses(stack, pro)) == 1


def test_without_a_group_or_the_kind_it_is_403(http: httpx.Client, groups: GroupManager, user: LocalUser) -> None:
    assert http.post("/images").status_code == 403
    groups.add_member(groups.create("Films", limits={"video": 1}).id, user.id)
    assert http.post("/images").status_code == 403


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer garbage", "Basic eDp5"])
def test_without_a_token_it_is_401(http: httpx.Client, token: str) -> None:
    refused = http.post("/images", headers={"Authorization": token})
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


def test_the_app_may_say_who_pays(http: httpx.Client, stack: LocalStack, pro: Group, user: LocalUser) -> None:
    assert http.post("/named", headers={"X-User": str(user.id), "Authorization": ""}).json() == "named"
    assert statuses(stack, pro) == [("committed", 2)]


def test_a_bad_cost_is_422(http: httpx.Client, pro: Group) -> None:
    assert http.post("/images", headers={"X-Cost": "0"}).status_code == 422


def test_a_bad_kind_is_noticed_at_once() -> None:
    with pytest.raises(InvalidRequest, match="kind"):
        require_generation("Big Image")


def test_on_a_websocket(app_url: str, stack: LocalStack, pro: Group, tokens: dict[str, str]) -> None:
    url = f"{app_url.replace('http', 'ws', 1)}/socket"

    def talk(token: str) -> str | bytes:
        headers = {"Authorization": f"Bearer {token}", "X-Cost": "3"}
        with connect(url, additional_headers=headers, proxy=None) as socket:
            return socket.recv()

    assert talk(tokens["user"]) == "3 held"
    assert statuses(stack, pro) == [("committed", 1)]
    for token in (tokens["user"], "garbage"):
        with pytest.raises(InvalidStatus) as denied:
            talk(token)
        assert denied.value.response.status_code == 403
    assert statuses(stack, pro) == [("committed", 1)]
