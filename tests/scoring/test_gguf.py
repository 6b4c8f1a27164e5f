"""A judge as GGUF answers as it did, and what cannot be exported is refused."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from chain import ROOT

from common.battle import Battle
from common.errors import ArenaError, UsageError
from common.progress import Show
from factory.stage_context import StageContext
from scoring.engines import gguf, open_engine
from scoring.engines.gguf import check_agreement, export_gguf, find_converter, plain_byte_level
from scoring.engines.gguf_converter import SCRIPT
from scoring.judge import load_judge, write_judge
from scoring.links import softmax

BATTLES = [(Battle(str(i), (f"question {i}?",), ("yes " * (i + 1),), ("no 日本語",)), 0) for i in range(6)]


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_base, small_frame, judge_prompt):
    """A merged judge of the embedded kind: its weights are random, its logits spread as a trained judge's do."""
    pytest.importorskip("llama_cpp", reason="the extra gguf is not installed (make extra-gguf)")
    if not (Path(sys.prefix) / "llama.cpp" / SCRIPT).is_file():
        pytest.skip("llama.cpp's converter is not installed (make extra-gguf)")
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from common.experiment import parse_experiment

    folder = tmp_path_factory.mktemp("judge") / "merged"
    shutil.copytree(tiny_base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # logits that differ from row to row, a softmax that is not saturated
    model.save_pretrained(folder)
    labels = tuple(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(x).ids[0] for x in "ABC")
    keys = {"model": "models/none", "template": "qwen3_nothink", "cutoff_len": 256}
    experiment = parse_experiment(keys, "exam", where="experiment.yaml")
    source = {"experiment": "exam", "stage": "sft"}
    write_judge(folder, experiment, replace(small_frame, label_ids=labels), judge_prompt.source, source)
    return folder


@pytest.fixture
def context(merged, make_experiment, workplace, monkeypatch):
    """A stage in a folder of its own with that judge, and validation battles."""
    context = StageContext(make_experiment(cutoff_len=256), "sft")
    shutil.copytree(merged, context.merged)
    monkeypatch.setattr(gguf, "read_battles", lambda folder, split: BATTLES)
    return context


@pytest.mark.parametrize(("quantization", "near"), [("f16", 3e-3), ("q4_k_m", 0.1)])
def test_the_file_is_the_same_judge(context, quantization, near):
    (context.merged / "chat_template.jinja").write_text("{% if %}")  # nobody compiles it: one may run for ever
    checked = export_gguf(context, quantization, show=Show())["checked"]
    assert (checked["prompts"], checked["same_token_ids"], checked["merged_model_in"]) == (6, 0, "fp32")
    judge, shares = load_judge(context.merged), []
    sequences, labels = judge.sequences(BATTLES), judge.frame.label_ids
    expected = softmax(open_engine(judge, "torch", "fp32").label_logits(sequences, labels))
    assert np.ptp(expected, axis=0).max() > 1e-4, "the rows differ"
    engine = open_engine(judge, "llama.cpp")
    apart = np.abs(softmax(engine.label_logits(sequences, labels, progress=shares.append)) - expected).max()
    assert engine.precision == quantization and apart <= near and shares[-1] == 1.0
    assert apart == pytest.approx(checked["largest_probability_difference"], abs=1e-6)
    with pytest.raises(ArenaError, match=r"row 0.*budget of 256"):
        engine.label_logits([[1] * 257], labels, name="row {}".format)
    names = {"merged", "export.log", f"judge-{quantization}.gguf", f"judge-{quantization}.gguf.json"}
    assert {path.name for path in context.folder.iterdir()} == names, "nothing is left behind"


@pytest.mark.parametrize(("quantization", "near"), [("f16", 2e-3), ("q8_0", 1e-2)])
def test_llama_server_answers_as_the_engine_does(context, quantization, near):
    """The request is that of docs/edge.md, which also tells how to build the server."""
    server = shutil.which("llama-server", path=f"{sys.prefix}/llama-server/bin")
    if not server:
        pytest.skip("llama-server is not built: docs/edge.md, Servers")
    export_gguf(context, quantization, show=Show())
    judge = load_judge(context.merged)
    sequences, labels = judge.sequences(BATTLES), judge.frame.label_ids
    expected = softmax(open_engine(judge, "llama.cpp").label_logits(sequences, labels))
    page = (ROOT / "docs" / "edge.md").read_text()
    asked = json.loads(re.search(r'{"prompt".*?}', page, re.DOTALL)[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1", free.getsockname()[1]
    options = ["--host", address[0], "--port", str(address[1]), "--ctx-size", "512", "--threads", "1"]
    with subprocess.Popen([server, "-m", f"outputs/exam/sft/judge-{quantization}.gguf", *options]) as process:
        try:
            with httpx.Client(base_url="http://{}:{}".format(*address), timeout=60) as client:
                while not answers(client):  # the model is being loaded
                    assert process.poll() is None, "the server ended"
                    time.sleep(0.1)
                for ids, chances in zip(sequences, expected, strict=True):
                    reply = client.post("/completion", json={**asked, "prompt": ids}).json()
                    found = {each["token"]: each["prob"] for each in reply["completion_probabilities"][0]["top_probs"]}
                    assert [found[label] for label in "ABC"] == pytest.approx(chances, abs=near)
        finally:
            process.terminate()


def answers(client: httpx.Client) -> bool:
    """Return whether a server is up with its model loaded."""
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_an_architecture_that_llama_cpp_lacks_is_named_and_leaves_nothing(context, monkeypatch):
    config = context.merged / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace("Qwen3ForCausalLM", "NobodysForCausalLM"))
    with pytest.raises(ArenaError, match="NobodysForCausalLM"):
        export_gguf(context, "f16", show=Show())
    config.write_text(whole)
    monkeypatch.setattr(gguf, "read_battles", lambda folder, split: [])
    with pytest.raises(ArenaError, match="no validation rows"):
        export_gguf(context, "f16", show=Show())
    assert {path.name for path in context.folder.iterdir()} == {"merged", "export.log"}


@pytest.mark.parametrize("output", ["outputs/exam/sft/report", "votes.gguf", "outputs/exam.gguf"])
def test_an_export_replaces_nothing_but_a_gguf_file(make_experiment, workplace, output):
    """A manifest lies beside it, so that `report` would cost report.json."""
    Path("votes.gguf").write_text("id,prompt")
    Path("outputs/exam.gguf").mkdir(parents=True)
    with pytest.raises(UsageError, match="is no place for a GGUF file"):
        export_gguf(StageContext(make_experiment(), "sft"), "f16", output=Path(output), show=Show())
    assert Path("votes.gguf").read_text() == "id,prompt"


@pytest.mark.parametrize("stage", ["rm", "dpo_reward"])
def test_a_stage_of_rewards_cannot_be_exported(make_experiment, stage):
    with pytest.raises(UsageError, match="its scores are rewards"):
        export_gguf(StageContext(make_experiment(), stage), "f16", show=Show())


def test_a_missing_converter_comes_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: name)
    with pytest.raises(ArenaError, match=r"convert_hf_to_gguf(.|\n)*make extra-gguf"):
        find_converter(tmp_path)
    (tmp_path / SCRIPT).write_text("")
    assert find_converter(tmp_path) == tmp_path


def test_a_difference_is_reported_and_a_large_one_is_an_error():
    def notes(largest: float, quantization: str, same: int = 32) -> list[str]:
        checked = {"prompts": 32, "same_token_ids": same, "largest_probability_difference": largest}
        return check_agreement(checked | {"merged_model_in": "fp32"}, quantization)

    assert "docs/edge.md" not in notes(0.001, "f16")[0]
    large = notes(0.2, "q4_k_m", same=30)
    assert "docs/edge.md" in large[0] and "2 of 32 prompts" in large[1]
    for largest, quantization in ((0.006, "f16"), (0.67, "q4_k_m"), (float("nan"), "f16")):
        with pytest.raises(ArenaError, match="not the same judge"):
            notes(largest, quantization)


def test_only_gpt2s_own_split_is_called_gpt2(tmp_path, small_tokenizer):
    path, content = tmp_path / "tokenizer.json", json.loads(small_tokenizer.to_str())
    others = [{"type": "ByteLevel", "add_prefix_space": p, "use_regex": r} for p, r in ((False, False), (True, True))]
    splits = [{"pre_tokenizer": each} for each in (None, *others, {"type": "Sequence", "pretokenizers": []})]
    for change in ({}, {"normalizer": {"type": "NFC"}}, *splits):
        path.write_text(json.dumps(content | change))
        assert plain_byte_level(path) is (change == {})
