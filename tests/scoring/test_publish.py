"""The model cards that scoring writes, and what `publish` sends: against a hub of our own on a loopback address."""

import base64
import json
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from chain import call

from common.experiment import load_experiment
from factory.stage_context import StageContext

MERGED = Path("outputs/exam/sft/merged")
SECRET = "hf_NeverToBeSeenAnywhere"


class Hub(ThreadingHTTPServer):
    """As much of the hub as one commit needs; `files` of its one repository, None before it is created."""

    daemon_threads = True

    def __init__(self):
        self.files, self.private, self.asked, self.large = None, False, [], {}
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, lines: bytes) -> None:
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


class Requests(BaseHTTPRequestHandler):
    """Answers one client."""

    def answer(self, content, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(f"{self.command} {self.path}")
        if "/store/" in self.path:  # large files go to a store that is not the hub: no token belongs there
            assert "Authorization" not in self.headers
            hub.large[sha256(body).hexdigest()] = body
            self.answer({})
        elif self.headers.get("Authorization") != f"Bearer {SECRET}":
            self.answer({"error": f"no right for {self.headers.get('Authorization')}"}, 401)
        elif self.path == "/api/repos/create":
            known, hub.files = hub.files, hub.files or {}
            hub.private = hub.private or (known is None and json.loads(body).get("visibility") == "private")
            self.answer({"url": f"{hub.url}/me/judge"}, 200 if known is None else 409)
        elif self.command == "GET":
            siblings = [{"rfilename": name} for name in hub.files]
            self.answer({"id": "me/judge", "private": hub.private, "sha": "0" * 40, "siblings": siblings})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            kinds = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self.answer({"files": [{"path": p, "uploadMode": k, "shouldIgnore": False} for p, k in kinds.items()]})
        elif "/info/lfs/" in self.path:
            link = "{}/store/{}".format
            asked = json.loads(body)["objects"]
            objects = [each | {"actions": {"upload": {"href": link(hub.url, each["oid"])}}} for each in asked]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            hub.commit(body)
            self.answer({"commitUrl": f"{hub.url}/me/judge/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:  # the card's metadata are checked there
            self.answer({"errors": [], "warnings": []})

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its store is no plain HTTP
    yield server
    server.shutdown()
    server.server_close()


def publish(*options: str, what=("-e", "exam")):
    done = call("publish", *what, "--repo", "me/judge", *options)
    assert SECRET not in done.output
    return done


# experiment, stage, fold, what is published
KINDS = [("exam", "sft", None, "merged"), ("exam", "sft", None, "adapter"), ("exam", "rm", None, "merged")]
KINDS += [("exam", "dpo_reward", None, "adapter"), ("folded", "sft", "full", "merged"), ("folded", "sft", 0, "adapter")]
OTHERS = [("exam", "rm", None, "adapter"), ("exam", "dpo_reward", None, "merged")]


@pytest.mark.parametrize(("name", "stage", "fold", "kind"), KINDS)
def test_what_is_sent_scores_at_another_place_as_it_did_here(
    scored, hub, tmp_path, monkeypatch, name, stage, fold, kind
):
    adapter = StageContext(load_experiment(name), stage, fold=fold).adapter
    (adapter / "checkpoint-1").mkdir()
    for left in ("optimizer.pt", "training_args.bin", "trainer_log.jsonl", "checkpoint-1/adapter_model.safetensors"):
        (adapter / left).write_text("not for others")
    judge = ["-e", name, "--stage", stage]
    what, options = [*judge, *([] if fold is None else ["--fold", str(fold)])], ["--adapter"] * (kind == "adapter")
    listed = publish(*options, "--dry-run", "--json", what=what)
    assert listed.exit_code == 0, listed.output
    assert hub.asked == [] and "nothing was sent" in publish(*options, "--dry-run", what=what).output
    done = publish(*options, what=what)
    assert done.exit_code == 0 and f"sent to {hub.url}/me/judge (public)" in done.output, done.output
    assert {name: len(content) for name, content in hub.files.items()} == json.loads(listed.stdout)["files"]
    everything = b"".join(hub.files.values())
    assert b"not for others" not in everything and b"question 1" not in everything and b'"worst"' not in everything
    precision = ["--precision", "adapter"] if options and stage == "sft" else []
    command = ["--input", "test.csv", "--output", "out.csv", *precision]
    assert call("score", *what, *command).exit_code == 0
    own, votes = Path("out.csv").read_bytes(), Path("test.csv").read_bytes()
    there = tmp_path / "there"
    there.mkdir()
    (there / "templates").symlink_to(Path("templates").resolve())
    (there / "models").symlink_to(Path("models").resolve())
    monkeypatch.chdir(there)
    Path("test.csv").write_bytes(votes)
    card = hub.files["README.md"].decode()
    steps = [line.split() for line in card.split("```bash\n")[1].split("```")[0].splitlines()]
    folder = Path(steps[0][-1])  # hf download OWNER/NAME --local-dir FOLDER
    folder.mkdir(parents=True)
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    for what, *names in steps[1:-1]:
        for name in names[1:] if what == "mkdir" else ():
            Path(name).mkdir(parents=True, exist_ok=True)
        for name in names[:-1] if what == "cp" else ():
            (Path(names[-1]) / Path(name).name).write_bytes(Path(name).read_bytes())
    assert steps[-1][:7] == ["python", "run.py", "score", *judge] and " ".join(precision) in " ".join(steps[-1])
    done = call("score", *judge, *command)
    assert done.exit_code == 0 and Path("out.csv").read_bytes() == own, done.output


@pytest.mark.parametrize(("name", "stage", "fold", "kind"), [*KINDS, *OTHERS])
def test_the_card_says_what_the_report_and_the_export_say(scored, name, stage, fold, kind):
    context = StageContext(load_experiment(name), stage, fold=fold)
    report = json.loads((context.of(None if fold == "full" else fold).folder / "report.json").read_text())
    source = json.loads(Path(f"data/{name}/manifest.json").read_text())["sources"]["train"]
    card = ((context.adapter if kind == "adapter" else context.merged) / "README.md").read_text()
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts["library_name"] == {"merged": "transformers", "adapter": "peft"}[kind]
    assert "arena-factory" in facts["tags"] and "base_model" not in facts
    for value in (*report["log_loss_ci95"], report["log_loss"], *report["baselines"].values()):
        assert f"{value:.4f}" in card
    assert f"| votes.csv (train) | 220 | 220 | {source['sha256']} |" in card and "lora_rank: 64" in card
    assert "question 1" not in card and "dataset_dir" not in card and str(Path.cwd()) not in card
    assert all(flag["text"] in card for flag in report["flags"] if flag["level"] == "red")
    assert ("reward model" in card, "reward-model" in facts["tags"]) == (stage in ("rm", "dpo_reward"),) * 2
    assert report["calibration"]["reason"][1:] in card and ("judges of the folds" in card) == (fold == "full")
    assert ("hf download" in card) == ((name, stage, fold, kind) not in OTHERS), "these two are not scored from there"


def changed_weights(hub):
    path = MERGED / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


@pytest.mark.parametrize(
    ("before", "options", "words", "code"),
    [
        (changed_weights, [], "not the one that was scored", 1),
        (lambda hub: setattr(hub, "files", {"a.safetensors": b"x"}), [], "holds other files", 1),
        (lambda hub: setattr(hub, "files", {}), ["--private"], "exists and is public", 1),
        (lambda hub: setattr(hub, "private", True), ["--stage", "base"], "trains no model", 2),
    ],
)
def test_what_must_not_be_sent_is_not(place, hub, before, options, words, code):
    before(hub)
    done = publish(*options)
    assert done.exit_code == code and words in " ".join(done.output.split()), done.output
    assert not any("/commit/" in line or "/preupload/" in line for line in hub.asked)


def test_a_hub_that_refuses_is_one_error_without_the_token(place, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    done = publish("-v")
    assert done.exit_code == 1 and "cannot be published" in done.output and "hf auth login" in done.output
    assert "hf_another" not in done.output


def test_an_owner_s_private_judge_stays_private_and_is_replaced(place, hub):
    assert publish("--private").exit_code == 0 and hub.private
    done = publish()
    assert done.exit_code == 0 and "(private)" in done.output
