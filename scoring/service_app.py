"""The judge service over HTTP: `run.py serve`. At / is a page to try it, which shows /openapi.json, too.

FastAPI's own page of the API loads its script from another site, which our pages do not.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.battle import Battle
from common.console import printable
from common.errors import ArenaError, UsageError
from common.experiment import Experiment
from common.progress import Show
from data_prep.export_reader import iter_battles
from factory.serve_page import QUIET, OwnPagesOnly, PageServer, exposure, free_port, run_server, url_of
from factory.stage_context import StageContext
from scoring.agreement import stage_agreement
from scoring.calibration import REWARD_COLUMNS
from scoring.score_stage import ScoreOptions
from scoring.service import Busy, Service, open_service

PAGE = Path(__file__).resolve().parents[1] / "templates" / "service_page.html"
LARGEST_BODY = 8 << 20  # bytes
_MOST_BATTLES, _MOST_TURNS, _MOST_KEYS, _LONGEST = 256, 100, 16, 1 << 20
_RETRY_AFTER = "1"  # seconds: a batch takes about as long
_EXAMPLES, _LONGEST_EXAMPLE = 12, 2000
_LONGEST_TOKEN_FILE = 4096
_OPEN = ("/", "/healthz")  # paths that need no token
_LAST_REQUESTS = 0.5  # seconds
_MOST_REQUESTS, _MOST_CONNECTIONS = 256, 1024
SLOWEST_REQUEST = 20.0  # seconds, up to twice as long

Text = Annotated[str, Field(max_length=_LONGEST)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=_MOST_TURNS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, content: Any) -> Any:
        if isinstance(content, dict) and len(content) > _MOST_KEYS:  # pydantic takes seconds to name them all
            raise ValueError(f"has more than {_MOST_KEYS} keys")
        return content


class Message(_Body):
    """One turn of a conversation; its role is user or assistant."""

    role: str
    content: Text


class _Prompted(_Body):
    """What the user wrote: `prompt`, one text or one a turn, or `messages` that end with the user."""

    id: Annotated[str, Field(max_length=200)] = ""
    prompt: Text | Texts | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=2 * _MOST_TURNS)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _Prompted:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        for number, message in enumerate(self.messages or ()):
            expected = ("user", "assistant")[number % 2]
            if message.role != expected:
                raise ValueError(f"message {number + 1} must be of the role {expected}")
        if self.messages and not len(self.messages) % 2:
            raise ValueError("messages must end with the user")
        return self

    def battle(self, response_a: str | list[str], response_b: str | list[str]) -> Battle:
        """Return the battle; both sides share the earlier answers of `messages`."""
        given_a, given_b = ([each] if isinstance(each, str) else each for each in (response_a, response_b))
        if self.messages is not None:
            turns = [message.content for message in self.messages]
            if len(given_a) != 1 or len(given_b) != 1:
                raise ArenaError("with messages each response is one text", where="response_a, response_b", remedy="")
            earlier = turns[1::2]
            return Battle(self.id, tuple(turns[::2]), (*earlier, *given_a), (*earlier, *given_b))
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt or []
        if not len(prompts) == len(given_a) == len(given_b):
            what = f"{len(prompts)} prompts, {len(given_a)} and {len(given_b)} responses: give one of each a turn"
            raise ArenaError(what, where="prompt, response_a, response_b", remedy="")
        return Battle(self.id, tuple(prompts), tuple(given_a), tuple(given_b))


class BattleIn(_Prompted):
    """A battle: the prompt or messages, and two responses."""

    response_a: Text | Texts
    response_b: Text | Texts


class ResponseIn(_Prompted):
    """One response to a prompt or to messages."""

    response: Text | Texts


class EvaluationIn(BaseModel):
    """What LLaMA-Factory's PPO sends where `reward_model_type: api`: whole conversations, chat template included."""

    model: str = ""
    messages: Annotated[list[Text], Field(min_length=1, max_length=_MOST_BATTLES)]


Battles = Annotated[list[BattleIn], Field(min_length=1, max_length=_MOST_BATTLES)]
Responses = Annotated[list[ResponseIn], Field(min_length=1, max_length=_MOST_BATTLES)]


def build_app(service: Service, host: str, token: str | None = None) -> Any:
    """Return the ASGI application, which listens on `host` and answers its own pages only.

    With a `token` all but the page and /healthz wants it as a bearer token.
    """
    context, experiment = service.context, service.context.experiment

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    title, faults = f"arena-factory: {experiment.name} {context.name}", {ArenaError: _refused, Busy: _busy}
    faults[RequestValidationError] = _invalid
    app = FastAPI(title=title, lifespan=life, docs_url=None, redoc_url=None, exception_handlers=faults)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(
            PAGE, headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'none'"}
        )

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """Say which judge this is: its files' hashes, log loss on the validation fold, calibration and promise."""
        return {
            "experiment": experiment.name,
            "stage": context.name,
            "fold": context.fold,
            "model": experiment.model,
            "rewards": service.scorer.columns == REWARD_COLUMNS,
            "cutoff_len": experiment.cutoff_len,
            "precision": service.executor.precision,
            **{key: service.report.get(key) for key in ("rows", "log_loss", "log_loss_ci95", "calibration")},
            "manifest": service.manifest,
            "agreement": service.agreement and asdict(service.agreement),
        }

    @app.get("/v1/examples")
    async def examples() -> list[dict[str, Any]]:
        """Return some short battles of the validation fold, without their verdicts."""
        return example_battles(experiment)

    @app.post("/v1/judge")
    async def judge(body: BattleIn | Battles) -> Any:
        """Return calibrated probabilities of A, B and tie for a battle, or for each of a list."""
        single = isinstance(body, BattleIn)
        battles = [each.battle(each.response_a, each.response_b) for each in ([body] if single else body)]
        answers = await service.judge(battles)
        return answers[0] if single else answers

    if service.scorer.columns == REWARD_COLUMNS:
        _answer_with_rewards(app, service)
    return OwnPagesOnly(_Guard(app, service, token), host)


def _answer_with_rewards(app: FastAPI, service: Service) -> None:
    """Add what only the stages of rewards answer."""

    @app.post("/v1/reward")
    async def reward(body: ResponseIn | Responses) -> Any:
        """Return the reward of a response, or of each of a list; only differences of rewards mean something."""
        single = isinstance(body, ResponseIn)
        battles = [each.battle(each.response, each.response) for each in ([body] if single else body)]
        found = [{"id": each["id"], "reward": each["rewards"]["a"]} for each in await service.judge(battles)]
        return found[0] if single else found

    @app.post("/v1/score/evaluation")
    async def evaluation(body: EvaluationIn) -> dict[str, Any]:
        """Return the scores of whole conversations, as LLaMA-Factory's PPO asks (`reward_model_type: api`)."""
        return {"model": body.model, "scores": await service.text_rewards(body.messages)}


async def _refused(_: Request, error: ArenaError) -> JSONResponse:
    return _problem(422, printable(f"{error.where}: {error.what}" if error.where else error.what))


async def _busy(*_: Any) -> JSONResponse:
    return _problem(503, "too many requests are waiting", {"Retry-After": _RETRY_AFTER})


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    # pydantic's faults would repeat what was sent, which may be no JSON (NaN, lone surrogates)
    faults = [f"{'.'.join(map(str, each['loc'][:6]))[:200]}: {each['msg']}" for each in islice(error.errors(), 5)]
    return _problem(422, printable("; ".join(faults)))


def example_battles(experiment: Experiment) -> list[dict[str, Any]]:
    """Return some short battles of the validation fold, as they were fitted."""
    found = []
    for battle, _ in iter_battles(experiment.data_folder, "valid"):
        if battle.characters <= _LONGEST_EXAMPLE:
            names = ("prompt", "response_a", "response_b")
            texts = {name: list(each) for name, each in zip(names, battle.texts, strict=True)}
            found.append({"id": battle.id, **texts})
        if len(found) == _EXAMPLES:
            break
    return found


class _Guard:
    """Refuses a request without the token, one too many at a time, and a body that is longer than LARGEST_BODY."""

    def __init__(self, app: Any, service: Service, token: str | None):
        self._app, self._service, self._token, self._open = app, service, token and f"Bearer {token}".encode(), 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._open >= _MOST_REQUESTS:
            await (await _busy())(scope, receive, send)
            return

        async def last(message: dict) -> None:
            if self._service.ending and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        self._open += 1
        try:
            await self._answer(scope, receive, last)
        finally:
            self._open -= 1

    async def _answer(self, scope: dict, receive: Any, send: Any) -> None:
        if self._token and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._token):
                wanted = {"WWW-Authenticate": "Bearer"}
                await _problem(401, "a bearer token is needed", wanted)(scope, receive, send)
                return
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                await _problem(413, f"the body is larger than {LARGEST_BODY:,} bytes")(scope, receive, send)
                return
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        whole = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def again() -> dict:
            return whole.pop() if whole else await receive()

        await self._app(scope, again, send)


class Impatient(H11Protocol):
    """Closes a connection that waits for the same request, or for the rest of it, at two looks one after the other.

    Else some hundred that send nothing, or a letter a minute, would keep everybody else out.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._seen: Any = self
        self._look()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        waits = self.cycle is None or self.cycle.more_body or self.cycle.response_complete
        if waits and self._seen is self.cycle:
            self.transport.abort()
            return
        self._seen = self.cycle if waits else self
        self.loop.call_later(SLOWEST_REQUEST, self._look)


def _problem(status: int, what: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": what}, status, headers)


def read_token(path: Path) -> str:
    """Return the token in a file, its first line; raises UsageError where there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            token = file.read(_LONGEST_TOKEN_FILE).strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path), remedy="give a readable text file") from None
    if not token or not token.isascii() or len(token.split()) != 1:
        raise UsageError("must hold one token of ASCII letters", where=str(path), remedy="openssl rand -hex 32 > FILE")
    return token


class _Server(PageServer):
    """Ends so that clients with a lasting connection hear of it in an answer, not in the middle of their request."""

    service: Service

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more connections, answer what still comes on those that are open, and end."""
        for each in self.servers:
            each.close()
        self.service.ending = True
        await asyncio.sleep(_LAST_REQUESTS)
        await super().shutdown(sockets)


def serve_stage(
    context: StageContext,
    *,
    host: str,
    port: int | None,
    token_file: Path | None,
    agree: float | None,
    show: Show,
    **options: Any,
) -> None:
    """Serve a scored stage until SIGTERM or Ctrl-C; what was taken is answered first. `options` are ScoreOptions'.

    Raises UsageError where it cannot listen, ArenaError where the stage has no judge or a model's process was killed.
    """
    token, port = token_file and read_token(token_file), free_port(host, port)
    if warning := exposure(host, "ask the judge; --token-file limits that"):
        show.note(warning)
    service = open_service(context, ScoreOptions(**options), show)
    if agree:
        service.agreement = stage_agreement(context, agree)
        show.note(f"{context.name}: {service.agreement.in_words()}")
    app = build_app(service, host, token)
    server = _Server(uvicorn.Config(app, host, port, limit_concurrency=_MOST_CONNECTIONS, http=Impatient, **QUIET))
    server.service = service
    run_server(server, lambda: show.note(f"{context.name}: judging at {url_of(host, port)}   (Ctrl-C ends it)"))
    if service.fault:
        what, remedy = "the process of a model was killed, probably for want of memory", "serve with fewer --workers"
        raise ArenaError(what, where=context.name, remedy=remedy)
    show.note(f"{context.name}: ended")
