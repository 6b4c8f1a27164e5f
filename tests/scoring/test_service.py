import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException
from itertools import product
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.battle import PROBABILITY_COLUMNS, VERDICTS
from common.errors import ArenaError
from common.experiment import load_experiment
from data_prep.readers import VoteReader
from factory.stage_context import StageContext
from scoring import service as service_module
from scoring import service_app
from scoring.calibration import AB_COLUMNS, REWARD_COLUMNS, Calibration
from scoring.executor import InProcess
from scoring.score_input import score_input
from scoring.score_stage import ScoreOptions, read_report
from scoring.scorer import ScorerSpec
from scoring.service import Service, open_service
from scoring.service_app import LARGEST_BODY, build_app, read_token
from tests.conftest import ROOT
from tests.scoring.fakes import quiet_show
from tests.scoring.places import identity

LINK = {"kind": "softmax", "errors": {}, "inverse_temperature": 1.0, "bias": [0.0, 0.0, 0.0], "limit": 50.0}
CALIBRATION = {"scores": "logits", "kept": True, "link": LINK | {"temperature": 1.0}, "swap_tta": False, "reason": ""}
CALIBRATION |= {"log_loss_before": 1.0, "log_loss_cross_fitted": 1.0, "rows": 9, "target_prior": None}
REPORT = {"log_loss": 0.9, "rows": 9, "calibration": CALIBRATION | {"source_prior": {"a": 0.4, "b": 0.3, "tie": 0.3}}}
BATTLE = {"prompt": "Which?", "response_a": "this one", "response_b": "that"}


class LengthScorer:
    """Scores an answer by its length; `asked` keeps how many rows each call had."""

    columns, label_ids, precision, engine = AB_COLUMNS, (1, 2, 3), "fp32", "llama.cpp"

    def __init__(self, seconds=0.0):
        self.asked, self._seconds = [], seconds

    def fit(self, battles):
        if any("unfit" in battle.prompts[0] for battle in battles):
            raise ArenaError("cannot be fitted", where="battle x", remedy="shorten it")
        facts = SimpleNamespace(tokens=9, tokens_full=12, cut=True, dropped=1)
        return [(facts, (len("".join(b.responses_a)), len("".join(b.responses_b)))) for b in battles]

    def prepare(self, inputs, *, swapped):
        return [row[::-1] if swapped else row for row in inputs]

    def ask(self, prepared, *, progress, name):
        time.sleep(self._seconds)
        if any(9_999 in row for row in prepared):
            raise ArenaError("has no finite score", where="a row", remedy="look at the weights")
        self.asked.append(len(prepared))
        return np.array([[a / 10, b / 10, 0.0] for a, b in prepared])

    def open(self):
        """There is nothing to open."""

    close = open


def service_of(scorer, experiment=None):
    context = SimpleNamespace(name="sft", fold=None, experiment=experiment)
    return Service(context, scorer, REPORT, InProcess(scorer))


def ask(calls, *, scorer=None, token=None, experiment=None, service=None):
    """Return the answers to calls of (method, path, options of httpx) that are all made at once."""

    async def run():
        experiment_ = experiment or SimpleNamespace(name="exam", model="m", cutoff_len=99)
        asked = service or service_of(scorer or LengthScorer(), experiment_)
        transport = httpx.ASGITransport(build_app(asked, "localhost", token))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found = await asyncio.gather(*(client.request(method, path, **more) for method, path, more in calls))
        await asked.close()
        return found

    return asyncio.run(run())


def judge(body, **options):
    return ask([("POST", "/v1/judge", {"json": body})], **options)[0]


def test_an_answer_has_probabilities_both_orders_and_what_was_cut():
    found = judge({**BATTLE, "id": "x"}).json()
    assert found["id"] == "x" and abs(found["a"] + found["b"] + found["tie"] - 1) < 1e-9 and found["choice"] == "a"
    # the judge answers by the answers alone, so the other order says the same
    assert np.allclose(found["orders"]["ab"], found["orders"]["ba"]) and found["disagreement"] < 1e-9
    assert found["cut"] and (found["tokens"], found["tokens_uncut"], found["turns_dropped"]) == (9, 12, 1)
    several = judge([BATTLE, {**BATTLE, "response_b": "x" * 30}]).json()
    assert [each["choice"] for each in several] == ["a", "b"]


def test_messages_and_turns_are_the_same_battle():
    turns = {"prompt": ["one", "two"], "response_a": ["A", "AA"], "response_b": ["A", "B"]}
    roles = [("user", "one"), ("assistant", "A"), ("user", "two")]
    messages = [{"role": role, "content": text} for role, text in roles]
    assert judge(turns).json() == judge({"messages": messages, "response_a": "AA", "response_b": "B"}).json()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "response_a"),
        ({"response_a": "x", "response_b": "y"}, "either prompt or messages"),
        ({**BATTLE, "prompt": ["a", "b"]}, "one of each a turn"),
        ({**BATTLE, "promt": "x"}, "promt"),
        ({**BATTLE, "prompt": None, "messages": [{"role": "assistant", "content": "x"}]}, "role user"),
        ({**BATTLE, "prompt": "unfit"}, "cannot be fitted"),
        ([], "at least 1"),
        ([BATTLE] * 300, "at most 256"),
        ("text", "valid"),
    ],
)
def test_a_wrong_body_is_answered_with_what_is_wrong(body, words):
    found = judge(body)
    assert found.status_code == 422 and words in found.json()["detail"]


@settings(max_examples=int(os.environ.get("BODIES", "300")), deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(
        lambda value: json.dumps({**BATTLE, "prompt": value, "id": value}).encode()
    )
)
def test_no_body_makes_the_service_fail(body):
    found = ask([("POST", "/v1/judge", {"content": body, "headers": {"content-type": "application/json"}})])[0]
    assert found.status_code in (200, 400, 422) and "Traceback" not in found.text


def test_requests_that_come_together_are_one_pass_and_one_bad_row_hurts_only_itself():
    scorer = LengthScorer(seconds=0.05)
    found = ask([("POST", "/v1/judge", {"json": BATTLE})] * 20, scorer=scorer)
    assert {each.status_code for each in found} == {200} and len(scorer.asked) <= 3 and sum(scorer.asked) == 40
    bad = {**BATTLE, "response_a": "x" * 9_999}
    found = ask([("POST", "/v1/judge", {"json": each}) for each in (BATTLE, bad, BATTLE)], scorer=LengthScorer())
    assert [each.status_code for each in found] == [200, 422, 200]


def test_free_models_share_what_waits():
    scorer, both = LengthScorer(), Barrier(2, timeout=60)
    service = service_of(scorer)
    asked, service.executor.models = service.executor.ask, 2
    service = Service(service.context, scorer, REPORT, service.executor)
    service.context.experiment = SimpleNamespace(name="exam")
    service.executor.ask = lambda rows: both.wait() >= 0 and asked(rows)  # goes on once both models are at work
    found = ask([("POST", "/v1/judge", {"json": BATTLE})] * 6, service=service)
    assert {each.status_code for each in found} == {200} and scorer.asked == [6, 6]


@pytest.mark.parametrize("limit", [(service_module, "_MOST_WAITING"), (service_app, "_MOST_REQUESTS")])
def test_a_full_queue_says_when_to_come_again(monkeypatch, limit):
    monkeypatch.setattr(*limit, 5)
    found = ask([("POST", "/v1/judge", {"json": BATTLE})] * 30, scorer=LengthScorer(seconds=0.05))
    codes = [each.status_code for each in found]
    assert set(codes) == {200, 503} and codes.count(200) >= 5
    assert all(each.headers["retry-after"] for each in found if each.status_code == 503)


def test_a_token_is_asked_for_everywhere_but_at_the_page(tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    token = read_token(tmp_path / "token")
    paths = ["/v1/model", "/v1/judge", "/openapi.json", "/nothing"]
    wrong = [{}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Bearer s3cret2"}, {"Authorization": "s3cret"}]
    calls = [("GET", path, {"headers": headers}) for path in paths for headers in wrong]
    assert {each.status_code for each in ask(calls, token=token)} == {401}
    right = {"Authorization": "Bearer s3cret"}
    calls = [("GET", "/v1/model", {"headers": right}), ("GET", "/", {}), ("GET", "/healthz", {})]
    assert [each.status_code for each in ask(calls, token=token)] == [200, 200, 200]


def test_a_page_of_another_site_gets_no_answer():
    foreign = [{"Host": "rebound.example"}, {"Origin": "http://elsewhere.example"}]
    found = ask([("POST", "/v1/judge", {"json": BATTLE, "headers": headers}) for headers in foreign])
    assert [each.status_code for each in found] == [421, 403]


def test_a_body_is_read_up_to_its_bound():
    async def endless():
        while True:
            yield b" " * 65_536

    assert ask([("POST", "/v1/judge", {"content": endless()})])[0].status_code == 413
    assert ask([("POST", "/v1/judge", {"content": b" " * (LARGEST_BODY + 1)})])[0].status_code == 413


@contextmanager
def served(*options, folder="."):
    """Start `run.py serve` in a folder; yield (process, address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "run.py"), "serve", "--port", str(port), *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            patience = time.monotonic() + 300
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, process.stdout.read()
                    assert time.monotonic() < patience, "it does not start"
                    time.sleep(0.1)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def called(address, body=None):
    """Return the JSON of an answer; `body` is posted where there is one."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
    data = None if body is None else json.dumps(body).encode()
    return json.load(urlopen(Request(address, data, headers), timeout=60))


def under_load(address, event):
    """Let 8 clients with a lasting connection each ask all the time; after `event()` return (their statuses, faults).

    A client ends where an answer says that the connection does.
    """
    statuses, faults = [], []

    def client():
        connection = HTTPConnection(address.removeprefix("http://"), timeout=60)
        try:
            while True:
                connection.request("POST", "/v1/judge", json.dumps([BATTLE] * 3), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                statuses.append((answer.status, len(answer.read()) > 0))
                if answer.will_close:
                    return
        except (OSError, HTTPException) as fault:
            faults.append(fault)

    clients = [Thread(target=client) for _ in range(8)]
    for each in clients:
        each.start()
    while len(statuses) < 40 and not faults:
        time.sleep(0.05)
    event()
    for each in clients:
        each.join(60)
    return statuses, faults


@pytest.mark.slow
def test_a_kill_under_load_leaves_nothing_behind_and_the_next_start_ends_in_order(place):
    before = place.snapshot()
    with served("-e", "exam", "--workers", "2") as (process, address):
        workers = psutil.Process(process.pid).children()
        statuses, faults = under_load(address, process.kill)
        assert set(statuses) == {(200, True)} and len(faults) == 8
        assert not psutil.wait_procs(workers, timeout=30)[1] and len(workers) >= 2
    with served("-e", "exam") as (process, address):
        statuses, faults = under_load(address, process.terminate)
        assert set(statuses) == {(200, True)} and faults == [], "what was sent on an open connection is answered"
        output = process.stdout.read()
        assert process.wait(30) == 0 and "Traceback" not in output and BATTLE["prompt"] not in output
    assert place.snapshot() == before


@pytest.mark.slow
def test_a_killed_model_ends_the_server_with_an_error(place):
    with served("-e", "exam", "--workers", "2") as (process, address):
        workers = [each for each in psutil.Process(process.pid).children() if "spawn_main" in str(each.cmdline())]
        statuses, faults = under_load(address, workers[0].kill)
        assert len(workers) == 2 and faults == [] and set(statuses) == {(200, True), (503, True)}
        assert process.wait(30) == 1 and "was killed" in process.stdout.read()


def test_a_real_server_answers_as_the_table_was_scored_and_ends_in_order(chain, monkeypatch):
    monkeypatch.chdir(chain)
    context = StageContext(load_experiment("demo"), "sft")
    scores = pd.read_parquet(context.folder / "scores_valid.parquet")[:40]
    expected = Calibration.from_json(read_report(context)).used.apply(scores)
    votes = VoteReader(context.manifest["sources"]["train"]["file"], labelled=True)
    battles = {battle.id: battle for _, battle in votes}
    bodies = [body_of(battles[i]) for i in scores["id"]]
    Path("token").write_text("s3cret\n")
    with served("-e", "demo", "--agree", "0.5", "--token-file", "token") as (process, address):
        answers = called(f"{address}/v1/judge", bodies)
        assert [each["id"] for each in answers] == list(scores["id"])
        assert np.allclose([[each[name] for name in VERDICTS] for each in answers], expected, atol=1e-4)
        assert called(f"{address}/v1/judge", bodies[3])["a"] == pytest.approx(answers[3]["a"], abs=1e-4)
        assert called(f"{address}/v1/model")["agreement"]["target"] == 0.5
        assert called(f"{address}/v1/examples") and called(f"{address}/openapi.json")
        with pytest.raises(HTTPError, match="404"):
            called(f"{address}/v1/reward", {"prompt": "x", "response": "y"})
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{address}/v1/model")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(30) == 0 and "Traceback" not in output and bodies[0]["prompt"][0] not in output


def body_of(battle):
    names = {"prompt": "prompts", "response_a": "responses_a", "response_b": "responses_b"}
    return {"id": battle.id, **{key: list(getattr(battle, name)) for key, name in names.items()}}


@pytest.mark.parametrize("stage, fold", [*product(("sft", "base", "probe", "rm", "dpo_reward"), [None]), ("sft", 0)])
def test_a_served_battle_and_a_scored_table_have_the_same_probabilities(scored, stage, fold):
    context = StageContext(load_experiment("exam" if fold is None else "folded"), stage, fold=fold)
    report = read_report(context)
    if stage in ("sft", "base"):  # the link of a random judge says the same of every battle
        report |= {"calibration": identity(), "calibrations": {"one_order": identity()}}
        (context.folder / "report.json").write_text(json.dumps(report))
    score_input(context, Path("test.csv"), Path(f"{stage}{fold}.csv"), show=quiet_show())
    expected = pd.read_csv(f"{stage}{fold}.csv", index_col="id")[list(PROBABILITY_COLUMNS)]
    bodies = [body_of(battle) for _, battle in VoteReader(Path("test.csv"), labelled=False)]
    service = open_service(context, ScoreOptions(), quiet_show())
    calls = [("POST", "/v1/judge", {"json": each}) for each in bodies]
    evaluated = ("POST", "/v1/score/evaluation", {"json": {"messages": ["x"]}})
    *found, other = ask([*calls, evaluated], service=service)
    answers = [each.json() for each in found]
    assert np.allclose([[each[name] for name in VERDICTS] for each in answers], expected, atol=1e-4)
    assert expected.std().min() > 1e-3, "a judge that says the same of all would prove nothing"
    is_reward = stage in ("rm", "dpo_reward")
    assert other.status_code == (422 if is_reward else 404)
    assert all(("rewards" in each, "orders" in each) == (is_reward, stage in ("sft", "base")) for each in answers)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rm", "dpo_reward"])
def test_llamafactory_s_ppo_gets_the_rewards_that_were_scored(scored, stage):
    from llamafactory.train.ppo.ppo_utils import get_rewards_from_server

    context = StageContext(load_experiment("exam"), stage)
    scorer = ScorerSpec(context).scorer()
    rows = scorer.prepare([inputs for _, inputs in scorer.exported("test")], swapped=False)
    decode = partial(scorer.tokenizer.decode, skip_special_tokens=False)  # as PPO does
    with served("-e", "exam", "--stage", stage) as (_, address):
        url = f"{address}/v1/score/evaluation"
        found = [get_rewards_from_server(url, [decode([*row[0], *row[side]]) for row in rows]) for side in (1, 2)]
        with pytest.raises(KeyError):  # its client looks at no status
            get_rewards_from_server(url, ["no conversation"])
    expected = pd.read_parquet(context.folder / "scores_test.parquet")[list(REWARD_COLUMNS)]
    assert np.allclose(np.transpose(found), expected, atol=1e-4) and expected.std().min() > 1e-3
