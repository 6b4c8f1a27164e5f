import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chain import status

from common.errors import ArenaError, UsageError
from common.experiment import StartFrom, load_experiment, parse_experiment
from common.files import sha256_of
from common.progress import Show
from common.stages import STAGES
from factory.distributed import Launch
from factory.fingerprint import local_models
from factory.merge import merge
from factory.stage_context import StageContext
from factory.state import StageState
from factory.train import FirstExample, train
from factory.trainer_log import loss_curve

# Stands for llamafactory-cli: writes what it writes, as far as our half reads it, and fails on demand.
FAKE = """
import json, os, struct, sys, time, zipfile
from pathlib import Path
command, recipe_path, *options = sys.argv[1:]
lines = (line.split(": ", 1) for line in Path(recipe_path).read_text().splitlines() if line)
recipe = {key: json.loads(value) for key, value in lines} | dict(option.split("=", 1) for option in options)
Path("calls.txt").open("a").write(" ".join([command, *options]) + "\\n")
mode = os.environ.get("FAKE_MODE", "")
def weights(path, value):
    header = json.dumps({"lora_A": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", value))
if mode == "error":
    raise ValueError("Template qwen33 does not exist.")
if command == "export":
    out = Path(recipe["export_dir"])
    weights(out / "model.safetensors", 1.0)
    for name in ("config.json", *(() if mode == "no tokenizer" else ("tokenizer_config.json",))):
        (out / name).write_text("{}")
    if mode == "killed":
        os.kill(os.getpid(), 9)
    if mode == "interrupted":
        os.kill(os.getppid(), 2)
        time.sleep(60)
    sys.exit()
rows = 5 if mode == "dropped" else 6
print("[INFO|trainer.py:1] >> ***** Running Evaluation *****\\n  Num examples = 2")
if mode != "mute":
    print("[INFO|trainer.py:1] >> ***** Running training *****")
    print(f"[INFO|trainer.py:2] >>   Num examples = {rows:,}")
    print("[INFO|trainer.py:3] >>   Num examples = 2", flush=True)  # an evaluation's, whose heading Ray left out
out = Path(recipe["output_dir"])
first = int(recipe.get("resume_from_checkpoint", "checkpoint-0").rsplit("-", 1)[1])
history = []
for step in range(first + 1, 5):
    out.mkdir(parents=True, exist_ok=True)
    loss = float("nan") if mode == "nan" and step == 2 else 2 - step / 10
    history.append({"step": step, "loss": loss})
    point = {"current_steps": step, "total_steps": 4, "loss": loss, "lr": 1e-4, "elapsed_time": "0:00:01"}
    with (out / "trainer_log.jsonl").open("a") as file:
        file.write(json.dumps(point) + "\\n")
    if step % 2 == 0:
        kept = out / f"checkpoint-{step}"
        kept.mkdir(exist_ok=True)
        (kept / "trainer_state.json").write_text("{}")
        for name in () if mode == "weights only" else ("optimizer.pt", "scheduler.pt"):
            zipfile.ZipFile(kept / name, "w").close()
    if mode in ("stops", "weights only") and step == 3 or mode == "stops early" and step == 1:
        sys.exit("RuntimeError: CUDA out of memory")
    if mode == f"interrupted at {step}":
        os.kill(os.getppid(), 2)
        time.sleep(60)
ended = {"log_history": history, "global_step": 3 if mode == "short" else 4, "max_steps": 4}
(out / "trainer_state.json").write_text(json.dumps(ended))
(out / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "models/tiny"}')
if mode != "no adapter":
    weights(out / "adapter_model.safetensors", float("nan") if mode == "nan weights" else 1.0)
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)
    for module in ("train", "merge"):
        fake = lambda *arguments: [sys.executable, "fake.py", *arguments]  # noqa: E731
        monkeypatch.setattr(f"factory.{module}.llamafactory", fake)
    values = {"model": "models/tiny", "template": "llama3", "cutoff_len": 64, "merge_onto": "base"}
    experiment = parse_experiment(values, "demo", where="here")
    write_recipe(experiment)
    Path("data/demo").mkdir(parents=True)
    info = {"demo_sft_train": {"file_name": "sft_train.jsonl"}}
    Path("data/demo/dataset_info.json").write_text(json.dumps(info))
    Path("data/demo/sft_train.jsonl").write_text("{}\n" * 6)
    Path("models/tiny").mkdir(parents=True)
    Path("models/tiny/config.json").write_text("{}")
    return experiment


def write_recipe(experiment, **values):
    adapter = experiment.adapter_folder("sft").as_posix()
    model = {"model_name_or_path": "models/tiny"}
    data = {"dataset": "demo_sft_train", "dataset_dir": "data/demo", "output_dir": adapter, "learning_rate": 1.0e-4}
    merge = {"adapter_name_or_path": adapter, "export_dir": "outputs/demo/sft/merged"}
    experiment.folder.mkdir(parents=True, exist_ok=True)
    for step, recipe in {"sft": {**model, **data, **values}, "merge_sft": {**model, **merge}}.items():
        lines = [f"{key}: {json.dumps(value)}" for key, value in recipe.items()]
        experiment.recipe(step).write_text("\n".join(lines))


def calls():
    return Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []


def run(experiment, mode="", step="train", **options):
    os.environ["FAKE_MODE"] = mode
    stream = io.StringIO()
    try:
        context = StageContext(experiment, "sft")
        if step == "train":
            result = train(context, show=Show(stream), **options)
        else:
            result = merge(context, lambda folder: (folder / "judge.json").write_text("{}"), Show(stream))
    finally:
        del os.environ["FAKE_MODE"]
    return result, stream.getvalue()


def test_a_training_is_recorded_with_what_it_was_made_from_and_kept(experiment):
    adapter, shown = run(experiment)
    assert adapter == experiment.adapter_folder("sft")
    assert "sft: training\n" in shown and "step 4/4  training loss 1.6000" in shown and "loss 1.9000 -> 1.6000" in shown
    record = StageState(Path("outputs/demo/sft")).record("train")
    assert record.finished_at and record.inputs["data"] == {
        "data/demo/dataset_info.json demo_sft_train": {"file_name": "sft_train.jsonl"},
        "data/demo/sft_train.jsonl": f"sha256:{sha256_of(Path('data/demo/sft_train.jsonl'))}",
    }
    assert record.inputs["factory_configs/demo/sft.yaml"]["learning_rate"] == 1.0e-4
    assert set(record.inputs["model_name_or_path models/tiny"]) == {"config.json"}
    before = Path("outputs/demo/sft/state.json").read_bytes()
    for options in ({}, {"resume": True}):
        assert "training kept" in run(experiment, "error", **options)[1]
    assert calls() == ["train"] and Path("outputs/demo/sft/state.json").read_bytes() == before


def test_wrong_use_and_what_is_missing_are_refused_before_the_child_starts(experiment):
    with pytest.raises(UsageError, match="exclude"):
        run(experiment, resume=True, fresh=True)
    from_sft = experiment.model_copy(update={"start_from": StartFrom(dpo_judge="sft")})
    with pytest.raises(ArenaError) as caught:
        train(StageContext(from_sft, "dpo_judge"), show=Show(io.StringIO()))
    assert caught.value.where == "outputs/demo/sft/merged"
    assert "python run.py sft -e demo --until merge" in caught.value.remedy
    assert calls() == []


def test_changed_inputs_are_named_and_fresh_archives(experiment):
    run(experiment)
    write_recipe(experiment, learning_rate=2.0e-4, logging_steps=7)
    Path("data/demo/sft_train.jsonl").write_text('{"a": 1}\n' * 6)
    Path("models/tiny/config.json").write_text('{"a": 1}')
    with pytest.raises(ArenaError) as caught:
        run(experiment)
    assert sorted(caught.value.what.splitlines()[1:]) == [
        "  - data: data/demo/sft_train.jsonl has other content",
        "  - factory_configs/demo/sft.yaml: learning_rate 0.0001 -> 0.0002",
        "  - model_name_or_path models/tiny: config.json has other content",
    ]
    assert "--fresh" in caught.value.remedy
    run(experiment, fresh=True)
    assert Path("saves/tiny/lora/demo_sft.earlier-1/adapter_model.safetensors").is_file()
    assert Path("outputs/demo/sft.earlier-1/state.json").is_file()
    assert Path("saves/tiny/lora/demo_sft/adapter_model.safetensors").is_file()
    assert calls() == ["train", "train"]


def test_an_unfinished_run_is_not_touched_without_being_asked_and_resumed_when_asked(experiment):
    with pytest.raises(ArenaError, match=r"CUDA out of memory(.|\n)*gradient_accumulation_steps"):
        run(experiment, "stops")
    adapter = experiment.adapter_folder("sft")
    (adapter / "checkpoint-9").mkdir()  # only half written
    (adapter / "checkpoint-3").mkdir()
    (adapter / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (adapter / "checkpoint-3" / "optimizer.pt").write_bytes(b"PK\x03\x04 and then the disk was full")
    before = sorted(adapter.rglob("*"))
    with pytest.raises(ArenaError, match=r"its last whole checkpoint is checkpoint-2(.|\n)*--resume(.|\n)*--fresh"):
        run(experiment)
    assert sorted(adapter.rglob("*")) == before
    write_recipe(experiment, learning_rate=3.0e-4)
    with pytest.raises(ArenaError, match=r"train began with other inputs(.|\n)*learning_rate 0.0001 -> 0.0003"):
        run(experiment, resume=True)
    write_recipe(experiment)
    _, shown = run(experiment, resume=True)
    assert f"going on from {adapter}/checkpoint-2" in shown
    assert calls() == ["train", f"train resume_from_checkpoint={adapter}/checkpoint-2"]
    assert [row["step"] for row in loss_curve(adapter / "trainer_log.jsonl")] == [1, 2, 3, 4]
    assert StageState(Path("outputs/demo/sft")).record("train").finished_at


@pytest.mark.parametrize("step, stage, flag", [(1, "sft", "--fresh"), (3, "sft", "--resume"), (3, "rm", "--fresh")])
def test_after_an_interrupt_the_advice_is_what_the_next_call_takes(experiment, monkeypatch, step, stage, flag):
    monkeypatch.setitem(STAGES, "sft", replace(STAGES["sft"], stage=stage))
    write_recipe(experiment, stage=stage)
    with pytest.raises(ArenaError, match="training sft was interrupted") as caught:
        run(experiment, f"interrupted at {step}")
    assert caught.value.remedy.endswith(f"python run.py sft -e demo {flag}")
    with pytest.raises(ArenaError, match="holds an unfinished run") as caught:
        run(experiment)
    assert ("--resume" in caught.value.remedy) == (flag == "--resume")
    assert status(experiment, "sft").next == f"python run.py sft -e demo {flag}"
    if stage == "rm":
        with pytest.raises(ArenaError, match="cannot resume a reward model"):
            run(experiment, resume=True)
    assert run(experiment, **{flag.removeprefix("--"): True})[0] == experiment.adapter_folder("sft")


@pytest.mark.parametrize("mode", ["stops early", "weights only"])
def test_resume_without_a_checkpoint_begins_again_after_archiving(experiment, mode):
    with pytest.raises(ArenaError):
        run(experiment, mode)
    if mode == "weights only":
        with pytest.raises(ArenaError, match=r"no whole checkpoint \(one is whole with its optimizer and scheduler"):
            run(experiment)
    _, shown = run(experiment, resume=True)
    assert "holds no whole checkpoint: training starts at the beginning" in shown
    assert Path("saves/tiny/lora/demo_sft.earlier-1/trainer_log.jsonl").is_file()
    assert calls() == ["train", "train"]


def test_an_adapter_that_was_damaged_later_is_not_kept_and_written_again_by_resume(experiment):
    adapter, _ = run(experiment)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit: it still loads
    with pytest.raises(ArenaError, match="its last whole checkpoint is checkpoint-4"):
        run(experiment)
    _, shown = run(experiment, resume=True)
    assert f"{weights}: not what the training wrote" in shown and "going on from" in shown
    assert weights.read_bytes() == whole
    assert "training kept" in run(experiment)[1]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("dropped", "trains on 5 rows, but 6 were exported"),
        ("mute", "does not say on how many rows"),
        ("nan", "NaN or infinite at step 2"),
        ("nan weights", "1 trained weights are NaN or infinite, the first is lora_A"),
        ("short", "the training ended at step 3 of 4 planned ones"),
        ("no adapter", r"ended without an error, but did not write adapter_model\.safetensors"),
        ("error", "Template qwen33 does not exist."),
    ],
)
def test_a_training_that_went_wrong_is_not_finished_and_called_failed(experiment, mode, message):
    with pytest.raises(ArenaError, match=message):
        run(experiment, mode)
    assert StageState(Path("outputs/demo/sft")).record("train").finished_at is None
    seen = status(experiment, "sft")
    assert seen.state == "failed" and "outputs/demo/sft/train.log" in seen.detail
    run(experiment, fresh=True)
    assert status(experiment, "sft").state == "trained"


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def test_a_merge_appears_whole_and_is_kept(experiment):
    with pytest.raises(ArenaError, match="holds no finished adapter to merge"):
        run(experiment, step="merge")
    run(experiment)
    merged, _ = run(experiment, step="merge")
    assert merged == Path("outputs/demo/sft/merged")
    assert names(merged) == {"config.json", "judge.json", "model.safetensors", "tokenizer_config.json"}
    assert calls()[1].startswith("export export_dir=outputs/demo/sft/.merged.")
    assert "merge kept" in run(experiment, "error", step="merge")[1]
    assert names(merged.parent) == {"merged", "state.json", "train.log", "merge.log"}
    experiment.recipe("merge_sft").write_text(experiment.recipe("merge_sft").read_text() + "\nexport_size: 2\n")
    with pytest.raises(ArenaError, match=r"merge_sft.yaml: export_size \(absent\) -> 2") as caught:
        run(experiment, step="merge")
    assert "move outputs/demo/sft/merged away" in caught.value.remedy


@pytest.mark.parametrize("mode", ["error", "no tokenizer", "killed"])
def test_a_failed_merge_leaves_nothing_and_is_made_again(experiment, mode):
    run(experiment)
    with pytest.raises(ArenaError):
        run(experiment, mode, step="merge")
    assert names("outputs/demo/sft") == {"state.json", "train.log", "merge.log"}
    assert (seen := status(experiment, "sft")).state == "failed" and "outputs/demo/sft/merge.log" in seen.detail
    run(experiment, step="merge")
    assert names("outputs/demo/sft") == {"merged", "state.json", "train.log", "merge.log"}


@pytest.mark.parametrize("options", [[], ["--fresh"]])
def test_the_advice_of_an_interrupted_merge_keeps_the_training(experiment, monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["run.py", "sft", *options])
    run(experiment, fresh=bool(options))
    with pytest.raises(ArenaError, match="merging sft was interrupted") as caught:
        run(experiment, "interrupted", step="merge")
    assert ("without --fresh" in caught.value.remedy) == bool(options)
    assert "training kept" in run(experiment)[1]
    run(experiment, step="merge")
    assert [call.split()[0] for call in calls()] == ["train", "export", "export"]


def test_a_merge_follows_a_new_adapter(experiment):
    run(experiment)
    run(experiment, step="merge")
    Path("saves/tiny/lora/demo_sft").rename("saves/old")  # a user puts it away
    run(experiment)
    merged, _ = run(experiment, step="merge")
    assert merged.is_dir() and Path("outputs/demo/sft/merged.earlier-1").is_dir()
    assert [call.split()[0] for call in calls()] == ["train", "export", "train", "export"]


def printed(expected, prefix=""):
    """Return the lines that LLaMA-Factory prints of its first rows."""
    rows = {"eval": {key: [1, 2] for key in expected}, "training": expected}
    texts = (f"{kind} example:|{key}:|{ids}" for kind, row in rows.items() for key, ids in row.items())
    return [f"{prefix}{line}" for text in texts for line in text.split("|")]


@pytest.mark.parametrize("stage", ["sft", "dpo_judge", "dpo_reward"])
def test_the_first_row_that_is_trained_on_is_compared_token_by_token(place, stage):
    context = StageContext(load_experiment("exam"), stage)
    expected = dict(FirstExample(context).expected)
    assert all(len(ids) > 10 for ids in expected.values())
    for prefix in ("", "(Worker pid=7) "):
        example = FirstExample(context)
        for line in printed(expected, prefix):
            example.read(line)
        assert not example.expected, "all of it was seen"
    for key, ids in expected.items():
        example = FirstExample(context)
        with pytest.raises(ArenaError, match="trains on other prompts than scoring would ask") as caught:
            for line in printed({**expected, key: [*ids[:4], 7, *ids[4:]]}):
                example.read(line)
        assert f"{key} has {len(ids) + 1} tokens, ours {len(ids)}; from token 4 on" in caught.value.what
    context.recipe["streaming"] = True
    assert not FirstExample(context).expected, "a shuffled stream begins anywhere"


@pytest.mark.slow
def test_a_prompt_that_no_list_knows_of_stops_the_run_before_its_first_step(chain, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(chain, tmp_path / "copy", symlinks=True))  # --fresh would take the others' judge
    monkeypatch.setattr("factory.train.plan_launch", lambda *_: Launch(options=("default_system=Be kind.",)))
    with pytest.raises(ArenaError, match=r"other prompts than scoring would ask(.|\n)*Be kind"):
        train(StageContext(load_experiment("demo"), "sft"), fresh=True, show=Show(io.StringIO()))
    assert "Running training" not in Path("outputs/demo/sft/train.log").read_text(encoding="utf-8")


def weights_in(path):
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.slow
def test_llamafactory_trains_resumes_and_merges(trainable):
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    real = trainable({"eval_steps": 2, "lora_dropout": 0.1})  # dropout makes the random state matter
    stream = io.StringIO()
    adapter = train(StageContext(real, "sft"), show=Show(stream))
    whole = weights_in(adapter / "adapter_model.safetensors")
    curve = loss_curve(adapter / "trainer_log.jsonl")
    assert [row["step"] for row in curve] == [1, 2, 3, 4]
    assert [row["step"] for row in curve if row["eval_loss"] is not None] == [2, 4]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert "sft: training\n" in stream.getvalue()
    assert "Num examples = 16" in Path("outputs/demo/sft/train.log").read_text()

    # As if it had been killed after step 2: the resumed run must end with the very same weights.
    adapter.rename("saves/whole")
    adapter.mkdir()
    Path("saves/whole/checkpoint-2").rename(adapter / "checkpoint-2")
    lines = Path("saves/whole/trainer_log.jsonl").read_text().splitlines(keepends=True)
    (adapter / "trainer_log.jsonl").write_text("".join(lines[:4]) + lines[4][:20] + "\n")
    context = StageContext(real, "sft")
    context.state.begin("train", {**context.training_inputs, **local_models(context.recipe)})
    stream = io.StringIO()
    train(StageContext(real, "sft"), resume=True, show=Show(stream))
    assert f"going on from {adapter}/checkpoint-2" in stream.getvalue()
    resumed = weights_in(adapter / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(np.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)
    assert loss_curve(adapter / "trainer_log.jsonl") == [pytest.approx(row) for row in curve]

    merged = merge(StageContext(real, "sft"), lambda folder: None, Show(stream))
    model = AutoModelForCausalLM.from_pretrained(merged)
    trained = {name: value for name, value in resumed.items() if "embed_tokens" in name}
    (embedding,) = trained.values()
    assert np.allclose(model.get_input_embeddings().weight.detach().float().numpy(), embedding, atol=1e-2)
    assert AutoTokenizer.from_pretrained(merged).encode("A") == AutoTokenizer.from_pretrained(real.model).encode("A")
    assert merge(StageContext(real, "sft"), lambda folder: None, Show(stream)) == merged
    assert "sft: merge kept" in stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "said"), [(8, "Quantizing model to 8 bit with bitsandbytes"), (None, "")])
def test_a_training_in_8_bits_and_one_without_learn_as_well(trainable, bits, said):
    experiment = trainable(quantization_bit=bits)
    adapter = train(StageContext(experiment, "sft"), show=Show(io.StringIO()))
    curve = [row["loss"] for row in loss_curve(adapter / "trainer_log.jsonl") if row["loss"] is not None]
    assert len(curve) == 4 and curve[-1] < curve[0]
    log = Path("outputs/demo/sft/train.log").read_text(encoding="utf-8")
    assert said in log and ("Quantizing model" in log) == bool(bits)
    assert any("lora_A" in name for name in weights_in(adapter / "adapter_model.safetensors"))
