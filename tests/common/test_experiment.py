import pytest
from chain import ROOT, call, experiment_of

from common.errors import ArenaError
from common.experiment import read_yaml


def test_all_faults_come_together_each_with_its_key():  # tests/bad_inputs/configs.py has the others
    with pytest.raises(ArenaError) as caught:
        experiment_of(cutoff_len="x", merge_gate={"max_abs_diff": 0}, start_from={"sft": "sft"}, quantisation_bit=4)
    assert "4 fault(s)" in caught.value.what and caught.value.where == "experiment.yaml"
    for words in ("cutoff_len: ", "merge_gate.max_abs_diff: ", "start_from.sft: there is no such key"):
        assert words in caught.value.what
    assert "did you mean quantization_bit?" in caught.value.what
    with pytest.raises(ArenaError, match="write merge_onto: base beside trust_remote_code: true"):
        experiment_of(trust_remote_code=True)


def test_yaml_is_read_as_llamafactory_reads_it(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text('rate: 1e-4\nswitch: no\nhome: "${oc.env:HOME}"\n', encoding="utf-8")
    assert read_yaml(path) == {"rate": 1e-4, "switch": False, "home": "${oc.env:HOME}"}


def test_another_folder_is_told_with_the_way_to_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = ["new", "mine", "--model", "Qwen/Qwen3-8B"]
    for arguments in (["status"], ["sft", "-e", "demo"], ["board", "--no-open"], new):
        done = call(*arguments)
        assert done.exit_code == 2, done.output
        assert f"Error: {tmp_path}: there is no factory_configs/ here\n  remedy: call run.py from" in done.output
        assert f"cd {ROOT}" in done.output
    assert list(tmp_path.iterdir()) == []
