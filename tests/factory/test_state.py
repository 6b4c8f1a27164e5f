import json
from pathlib import Path

import pytest
from chain import call

from common.errors import ArenaError
from factory.state import StageState, archive, archived, last_checkpoint

INPUTS = {"sft.yaml": {"learning_rate": 1.0e-4, "epochs": 2}, "data": {"train.jsonl": "sha256:aa"}}
REMEDY = "--fresh begins anew"


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(name):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("x")
    return Path(name)


def test_partial_inputs_are_compared_with_those_of_the_same_name():
    state, data = StageState(Path("outputs/demo/sft")), {"data": INPUTS["data"]}
    state.begin("train", INPUTS)
    state.finish("train", [made("saves/adapter.safetensors")], 1.0)
    with pytest.raises(ArenaError, match=r"other inputs(.|\n)*sft.yaml: epochs 2 -> \(absent\)") as caught:
        state.standing("train", data).require_same_inputs("train", Path("outputs/demo/sft"), REMEDY)
    assert REMEDY in caught.value.remedy and caught.value.where == "outputs/demo/sft"
    assert not state.standing("train", data, partial=True).changes
    assert state.standing("train", {**data, "distributed": "ddp"}, partial=True).changes


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
    made("outputs/y[1].earlier-3/other")  # a gap is not filled: the highest number is the newest
    made("outputs/y[1]/other")
    assert {p.name for p in archive(Path("saves/x"), Path("outputs/y[1]"))} == {"x.earlier-4", "y[1].earlier-4"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("kept", [0, 0.99])
def test_a_checkpoint_whose_file_ends_early_is_not_whole(name, kept):
    import torch
    from safetensors.torch import save_file

    for step in (9, 10):
        made(f"saves/x/checkpoint-{step}/trainer_state.json").write_text("{}")
        tensors = {"a": torch.ones(40, 40), "b": torch.ones(3)}
        save_file(tensors, f"saves/x/checkpoint-{step}/adapter_model.safetensors", metadata={"format": "pt"})
        for other in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save(tensors, f"saves/x/checkpoint-{step}/{other}")
    assert last_checkpoint(Path("saves/x")) == Path("saves/x/checkpoint-10")
    path = Path("saves/x/checkpoint-10") / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert last_checkpoint(Path("saves/x")) == Path("saves/x/checkpoint-9")


def test_runs_put_aside_are_listed_with_their_size_and_deleted_after_a_yes():
    made("outputs/demo/sft/merged/model"), made("saves/m/lora/demo_sft/a/b")
    Path("factory_configs").mkdir()
    kept = made("saves/m/lora/other/adapter")
    archive(Path("outputs/demo/sft/merged"), Path("saves/m/lora/demo_sft"))
    Path("saves/m/lora/link.earlier-3").symlink_to(kept.parent.absolute())
    old = {"outputs/demo/sft/merged.earlier-1", "saves/m/lora/demo_sft.earlier-1", "saves/m/lora/link.earlier-3"}
    assert {str(path) for path in archived()} == old and archived()[Path("saves/m/lora/demo_sft.earlier-1")] == 1
    assert set(json.loads(call("status", "--json").stdout)["earlier_runs"]) == old
    assert "earlier runs: 3, " in call("status").output
    refused = call("clean", input="n\n")
    assert refused.exit_code == 1 and all(name in refused.output for name in old) and len(archived()) == 3
    assert call("clean", "--yes").exit_code == 0
    assert not archived() and kept.is_file() and "no earlier runs" in call("clean").output
