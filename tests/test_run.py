"""The command line: help that answers at once, errors with remedies, and the whole chain by content."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import chdir
from pathlib import Path

import click
import pytest
from chain import ROOT, SECRETS, call, rows_of, run_py

import run
from common.battle import PROBABILITY_COLUMNS
from common.command_group import EXAMPLES
from data_prep.synthetic import write_arena

COMMANDS = sorted(run.cli.commands)
HEAVY = ("torch", "transformers", "llamafactory", "pandas", "pydantic", "sklearn", "numpy")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_answers_without_heavy_imports(command):
    arguments = [command, "--help"] if command else ["--help"]
    code = (
        "import sys, run\n"
        f"try: run.cli({arguments!r})\n"
        "except SystemExit as end: code = end.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], code)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("HEAVY [] 0") and "Usage:" in shown and "--help" in shown


@pytest.mark.parametrize(("given", "seen"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_children_wait_passively_unless_the_user_chose_otherwise(given, seen):
    code = (
        "import os, runpy, sys\n"
        "sys.argv = ['run.py', '--version']\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "from factory.process import child_environment\n"
        "print(child_environment()['OMP_WAIT_POLICY'])"
    )
    given = {**{key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}, **given}
    call = [sys.executable, "-c", code]
    assert subprocess.run(call, cwd=ROOT, env=given, capture_output=True, text=True).stdout.split()[-1] == seen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_explained_and_stands_in_the_readme(command):
    assert f"run.py {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
    definition = run.cli.commands[command]
    assert definition.help and all(getattr(option, "help", "given") for option in definition.params)
    shown = call(command, "--help", terminal_width=80).output.split()
    texts = " ".join([definition.help, *(getattr(option, "help", None) or "" for option in definition.params)]).split()
    assert [word for word in texts if word not in shown] == [], "no word is broken at the edge"


def test_the_version_an_example_a_command_and_what_was_meant():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert call("--version").output.split()[-1] == project["version"]
    assert EXAMPLES.keys() == run.cli.commands.keys()
    for name, example in EXAMPLES.items():
        run.cli.commands[name].make_context(name, shlex.split(example), parent=click.Context(run.cli))
        assert f"Example: python run.py {name} {example}".rstrip() in call(name, "--help").output
    assert "Did you mean one of: 'prepare'" in call("prepear").output
    with chdir(ROOT):
        assert "did you mean qwen3-4b?" in call("status", "-e", "qwen-4b").output
        assert call("verify").exit_code == 2
        assert "outputs/qwen3-4b/sft" in call("verify", "-e", "qwen3-4b").output


def test_a_quantization_may_be_written_as_llama_cpp_writes_it(workplace):
    (workplace / "factory_configs").symlink_to(ROOT / "factory_configs")
    told = call("export", "-e", "demo", "--quantization", "Q8_0")
    assert told.exit_code == 1 and "is not one of" not in told.output, "it goes on to the judge that is missing here"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("prepare -e ../demo --train x.csv", 2, ["is not an experiment's name", "remedy"]),
        ("prepare -e demo", 2, ["--train"]),
        ("sft -e demo --until never", 2, ["--until"]),
        ("ensemble -e demo:rm -e demo:sft --name both", 1, ["no readable report", "remedy: python run.py rm -e demo"]),
        ("score -e demo --stage nonsense", 2, ["is not one of 'sft'"]),
        ("sft -e demo --nothing", 2, ["No such option"]),
        ("verify nowhere", 2, ["nowhere"]),
        ("watch -e demo --once", 2, ["remedy"]),
        ("sft -e demo", 1, ["there is no exported data", "remedy: python run.py prepare -e demo"]),
        ("nonsense", 2, ["No such command"]),
    ],
)
def test_wrong_use_ends_in_an_error_without_a_traceback(line, code, words, workplace):
    (workplace / "factory_configs").symlink_to(ROOT / "factory_configs")
    result = call(*line.split())
    assert result.exit_code == code, result.output
    assert all(word in result.output for word in words), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--train", "--test"])
def test_a_file_that_holds_no_votes_is_told_before_a_base_is_built(option, workplace):
    (workplace / "factory_configs").symlink_to(ROOT / "factory_configs")
    write_arena(workplace / "arena", seed=3, train_rows=40, test_rows=5)
    (workplace / "names.csv").write_text("id,name\n1,Ada\n", encoding="utf-8")
    votes = {"--train": "arena/train.csv", option: "names.csv"}
    result = call("prepare", "-e", "demo", *(word for pair in votes.items() for word in pair))
    assert result.exit_code == 1 and "names.csv" in result.output, result.output
    assert not (workplace / "models").exists() and not (workplace / "data").exists()


def test_verbose_shows_where_an_error_comes_from_before_what_a_user_needs(workplace):
    (workplace / "factory_configs").mkdir(exist_ok=True)  # without one the folder itself is the fault
    plain, verbose = (call("prepare", "-e", "nowhere", "--train", "x.csv", *option) for option in ([], ["-v"]))
    assert plain.exit_code == verbose.exit_code == 2
    assert "Traceback" not in plain.stderr and "there is no experiment 'nowhere'" in plain.stderr
    assert "Traceback" in verbose.stderr and verbose.stderr.endswith(plain.stderr)


def check_probabilities(path: Path, ids: list[str]) -> None:
    rows = rows_of(path)
    assert list(rows[0]) == ["id", *PROBABILITY_COLUMNS] and [row["id"] for row in rows] == ids
    for row in rows:
        values = [float(row[name]) for name in PROBABILITY_COLUMNS]
        assert math.isclose(sum(values), 1, abs_tol=1e-6) and all(0 < v < 1 for v in values)
    assert len({row["winner_model_a"] for row in rows}) > 1, "not constant"


def ids_of(path: Path) -> list[str]:
    return [row["id"] for row in rows_of(path)]


def report_of(folder: Path, stage: str) -> dict:
    return json.loads((folder / "outputs" / "demo" / stage / "report.json").read_text(encoding="utf-8"))


def test_the_chain_leaves_a_report_and_a_submission(chain):
    report, output = report_of(chain, "sft"), chain / "outputs" / "demo" / "sft"
    assert report["rows"] == len(ids_of(output / "probabilities_valid.csv")) == pytest.approx(70, abs=10)
    assert 0 < report["log_loss_ci95"][0] < report["log_loss"] < report["log_loss_ci95"][1]
    assert set(report["baselines"]) == {"uniform", "prior", "length", "tfidf"}
    assert 0.5 < report["bayes"] < report["baselines"]["prior"]
    assert report["position_bias"]["mean_abs_diff"] >= 0
    assert report["provenance"]["versions"]["llamafactory"] == "0.9.5" and len(report["loss_curve"]) >= 1
    gate = report["merge_gate"]
    assert gate["max_abs_diff"] < 1e-4, "merged into the dequantised base it is the trained function"
    assert gate["log_loss_merged"] == pytest.approx(gate["log_loss_adapter"], abs=1e-4)
    assert gate["passed"] and gate["rows"] == report["rows"]
    checked = {check["name"]: check["passed"] for check in report["checks"]}
    few = {"step-1 DPO reward about 0": None, "loss not rising": None}  # one is not DPO's, 12 steps log a loss or two
    assert len(checked) == 9 and checked == dict.fromkeys(checked, True) | few
    check_probabilities(output / "submission.csv", ids_of(chain / "arena" / "test.csv"))
    assert (output / "submission.csv").read_bytes() == (output / "probabilities_test.csv").read_bytes()
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and f"{report['log_loss']:.3f}" in page
    assert str(chain.parent) not in page + json.dumps(report), "no path of this machine in a report"


def test_no_secret_is_in_anything_that_a_run_wrote_or_prints(chain):
    done = run_py(chain, "verify", "outputs/demo/sft", "-v")
    told = [done.stdout, done.stderr]
    files = [path for path in chain.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"report.json", "report.html", "train.log", "merge.log", "state.json"}
    for value in SECRETS.values():
        assert not [path for path in files if value.encode() in path.read_bytes()]
        assert not any(value in text for text in told)


@pytest.mark.parametrize("call", [("dpo", "--view", "judge"), ("dpo", "--view", "reward"), ("rm",)])
def test_preference_stages_end_in_the_same_report(chain, call):
    done, stage = run_py(chain, *call, "-e", "demo"), "_".join(call[::2])
    assert done.returncode == 0, done.stderr
    report, sft = report_of(chain, stage), report_of(chain, "sft")
    assert (report["stage"], report["rows"]) == (stage, sft["rows"])
    assert report["baselines"] == pytest.approx(sft["baselines"])
    assert report["calibration"]["scores"] == ("logits" if stage == "dpo_judge" else "rewards")
    output = chain / "outputs" / "demo" / stage
    ids = [row.split(",")[0] for row in (output / "submission.csv").read_text().splitlines()[1:]]
    assert ids == ids_of(chain / "arena" / "test.csv")
    log = (output / "train.log").read_text(encoding="utf-8")
    if stage == "dpo_judge":
        assert "outputs/demo/sft/merged" in log, "the SFT judge is the start and so the reference"
    checked = {check["name"]: check["passed"] for check in report["checks"]}
    assert False not in checked.values() and checked["adapter applied"] and checked["exported rows = trained rows"]
    assert checked["step-1 DPO reward about 0"] is (None if stage == "rm" else True)
    gate = report["merge_gate"]
    assert gate is None if stage == "dpo_reward" else gate["max_abs_diff"] < 1e-4
    if stage == "rm":
        assert (output / "merged" / "value_head.safetensors").is_file()
    kept = run_py(chain, "sft", "-e", "demo")
    assert kept.returncode == 0 and kept.stderr.count("kept") == 3, "pairs that follow change nothing for SFT"


def test_a_failed_check_ends_in_an_error_and_leaves_no_submission(chain):
    output = chain / "outputs" / "demo" / "sft"
    log = output / "train.log"
    before = log.read_text(encoding="utf-8")
    log.write_text(re.sub(r"Num examples = [\d,]+", "Num examples = 7", before), encoding="utf-8")
    try:
        for options in (["--fresh"], []):  # scored anew, then kept
            done = run_py(chain, "score", "-e", "demo", *options)
            assert done.returncode == 1, done.stdout
            assert "exported, 7 trained" in done.stderr and "remedy" in done.stderr and "Traceback" not in done.stderr
            assert not (output / "submission.csv").exists() and (output / "probabilities_test.csv").is_file()
        failed = [check["name"] for check in report_of(chain, "sft")["checks"] if check["passed"] is False]
        assert failed == ["exported rows = trained rows"]
        assert "The check “exported rows = trained rows” failed" in (output / "report.html").read_text(encoding="utf-8")
        verified = run_py(chain, "verify", "outputs/demo/sft")
        assert verified.returncode == 1 and "failed   run check: exported rows = trained rows" in verified.stdout
        assert verified.stdout.rstrip().splitlines()[-1].startswith("outputs/demo/sft: WRONG when it was made")
    finally:
        log.write_text(before, encoding="utf-8")
    assert run_py(chain, "score", "-e", "demo", "--fresh").returncode == 0
    assert (output / "submission.csv").is_file()


SINGLE = [
    (name, option.opts[-1])
    for name, command in run.cli.commands.items()
    for option in command.params
    if isinstance(option, click.Option) and not (option.multiple or option.is_flag)
]


@pytest.mark.parametrize(("command", "option"), SINGLE, ids=lambda value: value)
def test_an_option_that_is_given_twice_is_refused(command, option):
    done = call(command, option, "1", option, "1")
    assert done.exit_code == 2 and f"{option} is given 2 times" in done.output
