from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from common.errors import ArenaError, UsageError
from common.experiment import Experiment, load_experiment, parse_experiment, read_yaml
from factory import DEFAULT_EXPERIMENT

ROOT = Path(__file__).parents[2]
MINIMAL = {"model": "org/base-4b", "template": "qwen3_nothink", "cutoff_len": 1024}


def parse(**values):
    return parse_experiment(MINIMAL | values, "exp", where="experiment.yaml")


def test_the_default_experiment_is_committed():
    its = load_experiment(DEFAULT_EXPERIMENT, ROOT)
    assert its.model == "Qwen/Qwen3-4B-Instruct-2507"
    assert (its.template, its.cutoff_len, its.quantization_bit) == ("qwen3_nothink", 2048, 4)
    assert load_experiment("demo", ROOT).model == "models/arena-tiny"


def test_the_demo_explains_every_key():
    text = (ROOT / "factory_configs/demo/experiment.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    for key in Experiment.model_fields.keys() - {"name"}:
        number = next((n for n, line in enumerate(lines) if line.startswith(f"{key}:")), None)
        assert number is not None, f"{key} is not in the demo's experiment.yaml"
        assert lines[number - 1].startswith("# "), f"{key} has no comment above it"


def test_places_follow_from_the_names():
    its = parse(model="models/arena-tiny/")
    assert its.recipe("merge_sft").as_posix() == "factory_configs/exp/merge_sft.yaml"
    assert its.adapter_folder("sft").as_posix() == "saves/arena-tiny/lora/exp_sft"
    assert its.output_folder("rm").as_posix() == "outputs/exp/rm"
    assert its.merged_folder("rm").as_posix() == "outputs/exp/rm/merged"
    assert its.data_folder.as_posix() == "data/exp"


def test_a_preference_stage_starts_where_it_is_told():
    its = parse(start_from={"dpo_judge": "base", "rm": "sft"})
    assert its.start_model("sft") == its.start_model("dpo_judge") == "org/base-4b"
    assert its.start_model("rm") == "outputs/exp/sft/merged"
    assert parse().start_model("dpo_judge") == "outputs/exp/sft/merged"


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"cutoff": 5}, "cutoff: there is no such key; did you mean cutoff_len?"),
        ({"cutoff_len": 8}, "cutoff_len: "),
        ({"quantization_bit": 3}, "quantization_bit: "),
        ({"labels": {"a": "A", "b": "A", "tie": "C"}}, "must be distinct"),
        ({"budget_shares": {"prompt": 0.2, "a": 0.5, "b": 0.3}}, "position bias by construction"),
        ({"budget_shares": {"prompt": 0.2, "a": 0.2, "b": 0.2}}, "must be 1"),
        ({"trust_remote_code": True}, "write merge_onto: base beside trust_remote_code: true"),
        ({"merge_gate": {"max_abs_diff": 0}}, "merge_gate.max_abs_diff: "),
        ({"start_from": {"sft": "sft"}}, "start_from.sft: there is no such key"),
        ({"start_from": {"rm": "dpo"}}, "start_from.rm: "),
        ({"recipes": {"dpo": {}}}, "no such step: dpo (choices: sft, merge_sft, dpo_judge"),
    ],
)
def test_a_fault_names_its_key(values, part):
    with pytest.raises(ArenaError) as caught:
        parse(**values)
    assert part in str(caught.value)
    assert caught.value.where == "experiment.yaml"


def test_all_faults_come_together():
    with pytest.raises(ArenaError, match=r"3 fault\(s\)"):
        parse(cutoff_len="x", seed=-1, valid_share=2)


@pytest.mark.parametrize("name", ["../demo", "a/b", "", ".hidden", "a..b", "x" * 65, "no-such"])
def test_an_unknown_or_unsafe_name_is_wrong_use(name):
    with pytest.raises(UsageError) as caught:
        load_experiment(name, ROOT)
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_yaml_is_read_as_llamafactory_reads_it(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text('rate: 1e-4\nswitch: no\nhome: "${oc.env:HOME}"\n', encoding="utf-8")
    assert read_yaml(path) == {"rate": 1e-4, "switch": False, "home": "${oc.env:HOME}"}
    for text in ("a: [", "- a", "a: 1\na: 2"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ArenaError) as caught:
            read_yaml(path)
        assert caught.value.where == str(path)
    path.write_bytes(b"\xff\xfea")
    with pytest.raises(ArenaError):
        read_yaml(path)


def test_a_fault_in_yaml_names_its_line(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("a: 1\nlearning_rate:1e-3\nb: 2\n")
    with pytest.raises(ArenaError) as caught:
        read_yaml(path)
    assert caught.value.where == str(path) and "in line 3" in caught.value.what and "space" in caught.value.remedy


def test_another_folder_is_told_with_the_way_to_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        ["status"],
        ["sft", "-e", "demo"],
        ["board", "--no-open"],
        ["new", "mine", "--model", "Qwen/Qwen3-8B"],
    ):
        done = CliRunner().invoke(run.cli, call)
        assert done.exit_code == 2, done.output
        assert f"Error: {tmp_path}: there is no factory_configs/ here\n  remedy: call run.py from" in done.output
        assert f"cd {ROOT}" in done.output
    assert list(tmp_path.iterdir()) == []
