import json
from pathlib import Path

import pytest

from common.errors import ArenaError
from factory.state import PARTS, StageState, archive, last_checkpoint

INPUTS = {"sft.yaml": {"learning_rate": 1.0e-4, "epochs": 2}, "data": {"train.jsonl": "sha256:aa"}}
REMEDY = "--fresh begins anew"


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(name):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("x")
    return Path(name)


def finish(folder, part="train", inputs=INPUTS, output="saves/adapter.safetensors"):
    state = StageState(folder)
    state.begin(part, inputs)
    state.finish(part, [made(output)], 1.23456)
    return state


def test_a_finished_part_is_known_to_a_later_process_with_relative_paths():
    folder = Path("outputs/demo/sft")
    finish(folder)
    assert StageState(folder).standing("train", INPUTS).answer == "finished"
    record = json.loads((folder / "state.json").read_text())["parts"]["train"]
    assert record["outputs"] == ["saves/adapter.safetensors"] and record["inputs"] == INPUTS
    assert record["seconds"] == 1.235 and record["started_at"] <= record["finished_at"]
    assert [p.name for p in folder.iterdir()] == ["state.json"], "nothing half-written beside it"


def test_a_part_that_began_or_lost_its_outputs_is_unfinished():
    folder = Path("outputs/demo/sft")
    state = StageState(folder)
    assert state.standing("train", INPUTS).answer == "new"
    state.begin("train", INPUTS)
    assert StageState(folder).standing("train", INPUTS).answer == "unfinished"
    state.finish("train", [made("saves/a")], 1)
    Path("saves/a").unlink()
    assert state.standing("train", INPUTS).answer == "unfinished"
    assert not state.standing("train", {"sft.yaml": {}}).is_finished, "nothing is lost by making it again"


def test_outputs_that_changed_are_damaged():
    state = finish(Path("outputs/demo/sft"))
    assert state.record("train").damaged == []
    Path("saves/adapter.safetensors").write_text("y")
    assert state.record("train").damaged == ["saves/adapter.safetensors"]


def test_changed_inputs_are_listed_one_by_one():
    folder = Path("outputs/demo/sft")
    changed = {"sft.yaml": {"learning_rate": 2.0e-4, "seed": 1}, "data": {"train.jsonl": "sha256:bb"}}
    standing = finish(folder).standing("train", changed)
    assert standing.answer == "outdated" and standing.is_finished
    with pytest.raises(ArenaError) as caught:
        standing.require_same_inputs("train", folder, REMEDY)
    assert caught.value.what.splitlines() == [
        "train was finished with other inputs; since then changed:",
        "  - sft.yaml: learning_rate 0.0001 -> 0.0002",
        "  - sft.yaml: epochs 2 -> (absent)",
        "  - data: train.jsonl has other content",
        "  - sft.yaml: seed (absent) -> 1",
    ]
    assert caught.value.remedy == f"undo the change, or {REMEDY}" and caught.value.where == "outputs/demo/sft"


def test_partial_inputs_are_compared_with_those_of_the_same_name():
    state = finish(Path("outputs/demo/sft"))
    data = {"data": INPUTS["data"]}
    assert state.standing("train", data).answer == "outdated"
    assert state.standing("train", data, partial=True).answer == "finished"
    assert state.standing("train", {**data, "distributed": "ddp"}, partial=True).answer == "outdated"


def test_what_was_made_from_a_training_is_forgotten_when_it_begins_again():
    folder = Path("outputs/demo/sft")
    finish(folder)
    finish(folder, "merge", output="outputs/demo/sft/merged/config.json")
    state = finish(folder, "score", output="outputs/demo/sft/scores.parquet")
    assert all(state.record(part) for part in PARTS)
    state.begin("merge", INPUTS)
    assert StageState(folder).record("train").finished_at
    assert StageState(folder).record("merge").finished_at is None
    assert StageState(folder).record("score") is None


@pytest.mark.parametrize("content", ["", "[]", '{"parts": {"train": {"x": 1}}}', '{"parts": 3}', "{}"])
def test_a_damaged_state_is_an_error_with_a_remedy(content):
    made("outputs/demo/sft/state.json").write_text(content)
    with pytest.raises(ArenaError, match="not a state") as caught:
        StageState(Path("outputs/demo/sft"))
    assert caught.value.where.endswith("state.json")


def test_archives_are_numbered_together_and_delete_nothing():
    for number in (1, 2):
        made("saves/x/adapter").write_text(f"run {number}")
        made("outputs/x/state.json")
        earlier = archive(Path("saves/x"), Path("outputs/x"), Path("outputs/none"))
        assert [str(p) for p in earlier] == [f"saves/x.earlier-{number}", f"outputs/x.earlier-{number}"]
        assert not Path("saves/x").exists()
    assert Path("saves/x.earlier-1/adapter").read_text() == "run 1"
    assert Path("saves/x.earlier-2/adapter").read_text() == "run 2"
    made("saves/x/adapter")
    made("outputs/y.earlier-3/other")
    made("outputs/y/other")
    assert {p.name for p in archive(Path("saves/x"), Path("outputs/y"))} == {"x.earlier-4", "y.earlier-4"}


def test_the_last_whole_checkpoint_is_found_by_number():
    assert last_checkpoint(Path("saves/x")) is None
    for step in (9, 100, 20):
        made(f"saves/x/checkpoint-{step}/trainer_state.json").write_text("{}")
    made("saves/x/checkpoint-200/adapter_model.safetensors")  # killed while it saved
    made("saves/x/checkpoint-300/trainer_state.json").write_text('{"half')
    made("saves/x/checkpoint-best/trainer_state.json").write_text("{}")
    assert last_checkpoint(Path("saves/x")) == Path("saves/x/checkpoint-100")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.99])
def test_a_checkpoint_whose_file_ends_early_is_not_whole(name, kept):
    import torch
    from safetensors.torch import save_file

    for step in (1, 2):
        made(f"saves/x/checkpoint-{step}/trainer_state.json").write_text("{}")
        tensors = {"a": torch.ones(40, 40), "b": torch.ones(3)}
        save_file(tensors, f"saves/x/checkpoint-{step}/adapter_model.safetensors", metadata={"format": "pt"})
        for other in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
            torch.save(tensors, f"saves/x/checkpoint-{step}/{other}")
    assert last_checkpoint(Path("saves/x")) == Path("saves/x/checkpoint-2")
    path = Path("saves/x/checkpoint-2") / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert last_checkpoint(Path("saves/x")) == Path("saves/x/checkpoint-1")


def test_what_is_put_aside_is_numbered_over_both_places_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter, folder = Path("saves/x[1]_sft"), Path("outputs/x/sft")
    places = (adapter, folder)

    def made(*paths):
        for path in paths:
            path.mkdir(parents=True)

    def aside(*paths):
        return {path.name for path in archive(*paths, places=places)}

    made(adapter)
    assert aside(adapter) == {"x[1]_sft.earlier-1"}, "an adapter alone, as --resume does without a checkpoint"
    made(adapter, folder)
    assert aside(adapter, folder) == {"x[1]_sft.earlier-2", "sft.earlier-2"}
    made(folder / "report.json")
    assert aside(folder / "report.json") == {"report.json.earlier-3"}
    made(adapter)
    assert aside(adapter, folder) == {"x[1]_sft.earlier-4", "sft.earlier-4"}
    made(folder)
    assert aside(adapter, folder) == {"sft.earlier-5"}
    Path("outputs/x/sft.earlier-1").mkdir()
    made(folder)
    assert aside(folder) == {"sft.earlier-6"}, "a gap is not filled: the highest number is the newest"
