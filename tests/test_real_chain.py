"""Real tokenizers, random weights: new, prepare, sft, merge and score as a user calls them."""

import csv
import json
import shutil
from itertools import islice

import pytest
from chain import ROOT, rows_of, run_py
from omegaconf import OmegaConf

from tests.real_tokenizers import FAMILIES, with_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("name", "called"), [("llama3", "Meta-Llama-3-8B-Instruct"), ("qwen3", "Qwen3-8B")])
def test_a_judge_with_a_real_tokenizer_goes_through_the_chain(tmp_path, name, called, real_data):
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(ROOT / "templates", tmp_path / "templates")
    (tmp_path / "factory_configs").mkdir()
    model = with_tokenizer(name, tmp_path / "models" / called)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    votes, part = real_data / "arena" / "train_natural.csv", tmp_path / "votes.csv"
    with votes.open(newline="", encoding="utf-8") as file, part.open("w", newline="", encoding="utf-8") as some:
        csv.writer(some).writerows(islice(csv.reader(file), 81))
    for call in (
        ("new", "exam", "--model", f"models/{called}", "--bits", "none", "--cutoff", "512"),
        ("prepare", "-e", "exam", "--train", "votes.csv", "--test", str(real_data / "arena" / "test.csv")),
        ("sft", "-e", "exam", "--json"),
    ):
        if call[0] == "prepare":
            path = tmp_path / "factory_configs" / "exam" / "experiment.yaml"
            content = OmegaConf.load(path)
            few = {"max_steps": 2, "bf16": False, "eval_strategy": "no", "per_device_train_batch_size": 4}
            assert content.template == FAMILIES[name][0]
            content.recipes = {"sft": few}
            OmegaConf.save(content, path)
        done = run_py(tmp_path, *call)
        assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["merge_gate"]["passed"] and report["rows"] >= 5 and report["position_bias"] is not None
    assert len(rows_of(tmp_path / "outputs" / "exam" / "sft" / "submission.csv")) == 3
