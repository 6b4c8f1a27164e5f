"""verify: every change of an output folder, or of what it was made from, is found; a sound folder passes."""

import json
from pathlib import Path

import pytest
from chain import call

from scoring.checks.provenance import verify

OUT = Path("outputs/exam/sft")


def bad(folder: Path = OUT) -> dict[str, str]:
    return {each.what: each.state for each in verify(folder).findings if each.state in ("changed", "missing")}


def test_a_fresh_output_is_as_it_was_made(place):
    done = call("verify", str(OUT), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    assert result["sound"] and {finding["state"] for finding in result["findings"]} <= {"ok", "warning"}
    checked = {finding["what"] for finding in result["findings"] if finding["state"] == "ok"}
    assert checked >= {
        "made from: data/exam/rows.parquet",
        "made from: data/exam/sft_train.jsonl",
        "made from: factory_configs/exam/sft.yaml",
        "made from: outputs/exam/sft/merged/model.safetensors",
        "made from: saves/tiny/lora/exam_sft/adapter_model.safetensors",
        "score: outputs/exam/sft/report.json",
        "score: outputs/exam/sft/submission.csv",
        "version of torch",
    }
    assert "as it was made" in call("verify", str(OUT)).output


FILES = ("data/exam/battles.parquet", f"{OUT}/merged/model.safetensors", f"{OUT}/submission.csv", f"{OUT}/report.json")


@pytest.mark.parametrize("path", FILES)
def test_a_changed_and_a_missing_file_are_found(place, path):
    content, what = Path(path).read_bytes(), "made from" if path in FILES[:2] else "score"
    Path(path).write_bytes(content + b"\n")
    assert bad()[f"{what}: {path}"] == "changed"
    assert call("verify", str(OUT)).exit_code == 1
    if not path.endswith("report.json"):
        Path(path).unlink()
        assert bad()[f"{what}: {path}"] == "missing"
    Path(path).write_bytes(content)
    assert not bad()


def test_another_version_is_a_warning_and_no_fault(place, monkeypatch):
    monkeypatch.setattr("scoring.checks.provenance.versions", lambda: {"torch": "0.1"})
    result = verify(OUT)
    assert result.sound
    (told,) = [finding for finding in result.findings if finding.what == "version of torch"]
    assert told.state == "warning" and told.detail.endswith("0.1 now")


def test_what_is_no_output_or_was_written_by_no_run_is_refused(place):
    for folder in ("outputs", "nowhere"):
        done = call("verify", folder)
        assert done.exit_code == 2 and "holds no report.json" in done.output and "remedy" in done.output
    for changes, words in (
        ({"checks": ["x"]}, "is damaged"),
        ({"checks": [], "provenance": {"sha256": {}}}, "is damaged"),
        ({"provenance": {"sha256": {"../x": "0" * 64}, "versions": {}}}, "made from: ../x"),
    ):
        place.edit_json(str(OUT / "report.json"), **changes)
        done = call("verify", str(OUT))
        assert isinstance(done.exception, SystemExit) and done.exit_code == 1 and words in done.output
    (OUT / "report.json").write_text("{")
    assert "is damaged" in call("verify", str(OUT)).output


@pytest.mark.parametrize("name", ["sft/../sft", "../exam/sft", "link"])
def test_a_folder_may_be_named_in_any_way(place, monkeypatch, tmp_path, name):
    root = Path.cwd()
    monkeypatch.chdir("outputs/exam")
    Path("link").symlink_to("sft")
    assert verify(Path(name)).sound
    monkeypatch.chdir(root)
    Path("outputs").rename(tmp_path / "disk")
    Path("outputs").symlink_to(tmp_path / "disk")
    assert verify(OUT).sound and verify(OUT / ".." / "sft").sound
