"""scoring.engines.gguf: a judge as GGUF answers as it did, and what cannot be exported is told."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="the extra gguf is not installed (make extra-gguf)")

from common.battle import Battle
from common.errors import ArenaError, UsageError
from common.progress import Show
from scoring.engines import gguf as gguf_export
from scoring.engines.gguf import (
    SOURCE_KEY,
    Agreement,
    export_gguf,
    find_converter,
    gguf_path,
    manifest_path,
    plain_byte_level,
)
from scoring.engines.protocol import open_engine
from scoring.judge import load_judge, write_judge
from scoring.links import softmax

BATTLES = [(Battle(str(i), (f"question {i}?",), ("yes " * (i + 1),), ("no 日本語",)), 0) for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def _converter():
    if not (Path(sys.prefix) / "llama.cpp" / gguf_export.SCRIPT).is_file():
        pytest.skip("llama.cpp's converter is not beside the environment (make extra-gguf)")


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_base, small_frame):
    """A merged judge of the embedded kind: its weights are random, its logits spread as a trained judge's do."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from common.experiment import Labels, parse_experiment
    from data_prep.prompt import JudgePrompt

    folder = tmp_path_factory.mktemp("judge") / "merged"
    shutil.copytree(tiny_base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # logits that differ from row to row, a softmax that is not saturated
    model.save_pretrained(folder)
    labels = tuple(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(x).ids[0] for x in "ABC")
    keys = {"model": "models/none", "template": "qwen3_nothink", "cutoff_len": 256}
    experiment = parse_experiment(keys, "exam", where="experiment.yaml")
    prompt = JudgePrompt.load(Path(__file__).parents[2] / "templates" / "judge_prompt.j2", Labels())
    from dataclasses import replace

    source = {"experiment": "exam", "stage": "sft"}
    write_judge(folder, experiment, replace(small_frame, label_ids=labels), prompt.source, source)
    return folder


@pytest.fixture
def place(merged, make_experiment, workplace, monkeypatch):
    """An experiment in a folder of its own with that judge, and validation battles."""
    experiment = make_experiment(cutoff_len=256)
    shutil.copytree(merged, experiment.merged_folder("sft"))
    monkeypatch.setattr(gguf_export, "read_battles", lambda folder, split: BATTLES)
    return experiment


def export(experiment, quantization, **options):
    return export_gguf(experiment, "sft", quantization, show=Show(), **options)


@pytest.mark.parametrize(("quantization", "near"), [("f16", 5e-4), ("q4_k_m", 0.1)])
def test_the_file_is_the_same_judge(place, quantization, near, capsys):
    manifest = export(place, quantization)
    checked = manifest["checked"]
    assert (checked["prompts"], checked["same_token_ids"], checked["merged_model_in"]) == (6, 6, "fp32")
    judge = load_judge(place.merged_folder("sft"))
    sequences, labels = judge.sequences(BATTLES), judge.frame.label_ids
    expected = softmax(open_engine(judge, "torch", "fp32").label_logits(sequences, labels))
    assert np.ptp(expected, axis=0).max() > 1e-4, "the rows differ"
    engine, seen = open_engine(judge, "llama.cpp"), []
    found = softmax(engine.label_logits(sequences, labels, progress=seen.append))
    apart = np.abs(found - expected).max()
    assert engine.precision == quantization and apart <= near
    assert apart == pytest.approx(checked["largest_probability_difference"], abs=1e-6)
    assert (seen[-1].rows, seen[-1].tokens) == (6, sum(map(len, sequences)))
    with pytest.raises(ArenaError, match="budget of 256") as caught:
        engine.label_logits([[1] * 257], labels, name="row {}".format)
    assert "row 0" in str(caught.value)
    folder = place.output_folder("sft")
    assert {p.name for p in folder.iterdir()} == {
        "merged",
        "export.log",
        f"judge-{quantization}.gguf",
        f"judge-{quantization}.gguf.json",
    }, "nothing is left behind"


def test_the_compared_prompts_are_all_of_few_and_some_of_many(place, monkeypatch):
    judge = load_judge(place.merged_folder("sft"))
    few = gguf_export._prompts(place, judge)
    assert len({tuple(ids) for _, _, ids in few}) == len(BATTLES)
    lengths = [len(ids) for _, _, ids in few]
    assert lengths == sorted(lengths, reverse=True)
    assert all(judge.frame.surround(text_ids) == ids for _, text_ids, ids in few)
    monkeypatch.setattr(gguf_export, "CHECKED_ROWS", 3)
    assert [ids for _, _, ids in gguf_export._prompts(place, judge)] == [few[i][2] for i in (0, 2, 4)]
    monkeypatch.setattr(gguf_export, "read_battles", lambda folder, split: [])
    with pytest.raises(ArenaError, match="no validation rows"):
        gguf_export._prompts(place, judge)


def test_a_file_of_another_judge_is_refused_though_its_manifest_was_edited(place):
    export(place, "f16")
    path = gguf_path(place.merged_folder("sft"), "f16")
    (place.merged_folder("sft") / "config.json").write_text("{}")
    judge = load_judge(place.merged_folder("sft"))
    with pytest.raises(ArenaError, match="trained again since"):
        open_engine(judge, "llama.cpp")
    from scoring.engines.gguf import source_digest, source_files

    content = json.loads(manifest_path(path).read_text())
    source = source_files(judge.folder)
    manifest_path(path).write_text(json.dumps(content | {"source": source, "source_sha256": source_digest(source)}))
    with pytest.raises(ArenaError, match="another source in its metadata"):
        open_engine(judge, "llama.cpp")
    assert SOURCE_KEY in content["metadata_key"]


def test_an_architecture_that_llama_cpp_lacks_is_told_and_leaves_nothing(place):
    config = place.merged_folder("sft") / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "NobodysForCausalLM"))
    with pytest.raises(ArenaError, match="NobodysForCausalLM"):
        export(place, "f16")
    assert not list(place.output_folder("sft").glob("*.gguf*"))
    assert not list(place.output_folder("sft").glob(".judge*"))


@pytest.mark.parametrize(("stage", "why"), [("rm", "value head"), ("dpo_reward", "difference between two models")])
def test_rewards_are_not_exported(place, stage, why):
    with pytest.raises(UsageError, match=why):
        export_gguf(place, stage, "f16", show=Show())


def test_a_missing_converter_is_told_with_the_way_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(ArenaError, match="convert_hf_to_gguf") as caught:
        find_converter(tmp_path)
    assert "make extra-gguf" in caught.value.remedy
    monkeypatch.setenv(gguf_export.CONVERTER_VARIABLE, str(tmp_path))
    with pytest.raises(ArenaError, match=str(tmp_path)):
        find_converter()
    (tmp_path / gguf_export.SCRIPT).write_text("")
    assert find_converter() == tmp_path


def test_what_differs_too_much_is_refused_and_what_differs_is_said(capsys):
    say = Show()
    gguf_export._judge_agreement(Agreement(32, 0.001, 0.0001, 32, "fp32"), "f16", say)
    with pytest.raises(ArenaError, match="not the same judge"):
        gguf_export._judge_agreement(Agreement(32, 0.006, 0.001, 32, "fp32"), "f16", say)
    gguf_export._judge_agreement(Agreement(32, 0.2, 0.01, 30, "fp32"), "q4_k_m", say)
    told = capsys.readouterr().err
    assert "docs/edge.md" in told and "2 of 32 prompts" in told
    with pytest.raises(ArenaError, match=r"0\.6700"):
        gguf_export._judge_agreement(Agreement(32, 0.67, 0.1, 32, "fp32"), "q4_k_m", say)


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"pre_tokenizer": None}, False),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, False),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, False),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, False),
    ],
)
def test_only_gpt2s_own_split_is_called_gpt2(tmp_path, small_tokenizer, change, plain):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(small_tokenizer.to_str()) | change))
    assert plain_byte_level(path) is plain
