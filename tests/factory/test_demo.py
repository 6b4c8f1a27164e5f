"""The demo leaves votes of people alone; its base is an ordinary folder, with the same bytes for the same seed."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from chain import call

import run
from common.errors import ArenaError
from common.experiment import load_experiment
from common.files import only_run, sha256_of, write_json
from common.progress import Show
from data_prep.synthetic import synthetic_battles
from factory import demo as demo_module
from factory.demo import ARENA, BaseModelSize, build_base_model, demo_arena, ensure_embedded_base, refuse_other_votes
from factory.stage_context import StageContext
from factory.state import StageState


def test_an_export_of_other_votes_is_not_replaced_by_the_arena(place):
    Path("factory_configs/exam").rename("factory_configs/demo")
    assert call("prepare", "-e", "demo", "--train", "votes.csv").exit_code == 0
    before = place.snapshot()
    refused = call("demo")
    assert refused.exit_code == 1 and "holds an export of votes.csv" in refused.output
    assert "python run.py demo --fresh" in refused.output and place.snapshot() == before
    manifest, demo = Path("data/demo/manifest.json"), load_experiment("demo")
    content = json.loads(manifest.read_text())
    content["sources"]["train"]["file"] = str(ARENA / "train.csv")
    manifest.write_text(json.dumps(content))
    refuse_other_votes(demo)
    manifest.unlink()
    refuse_other_votes(demo)


def as_demo(place, monkeypatch, model: str = "models/arena-tiny"):
    """Return the place's experiment as the demo's, with an arena of some rows."""
    monkeypatch.setattr(demo_module, "TRAIN_ROWS", 60)
    place.edit_experiment(f"model: {model}\n")
    return load_experiment("exam")


def test_the_demo_deletes_no_file_of_anybody_else(place, monkeypatch):
    exam = as_demo(place, monkeypatch)
    demo_arena(exam, 1, Show())
    demo_arena(exam, 2, Show())  # over its own
    for folder, words in ((exam.data_folder, "no export wrote"), (ARENA, "no demo wrote")):
        (folder / "notes.md").write_text("mine")
        before = place.snapshot()
        with pytest.raises(ArenaError, match=f"holds 1 file.*{words}.*notes"):
            demo_arena(exam, 3, Show())
        assert place.snapshot() == before
        (folder / "notes.md").unlink()
    (ARENA / "drawn.json").unlink()
    shutil.rmtree(exam.model)
    for draws in (lambda: demo_arena(exam, 1, Show()), lambda: ensure_embedded_base(exam, Show())):
        with pytest.raises(ArenaError, match=r"holds 3 file.*test\.csv, train\.csv, truth\.csv"):
            draws()


@pytest.mark.parametrize("model", ["models/tiny", "some/model"])
def test_nor_does_the_demo_build_its_base_in_the_place_of_another_model(place, monkeypatch, model):
    exam, before = as_demo(place, monkeypatch, model), place.snapshot()
    with pytest.raises(ArenaError, match=f"names the model {model}, and the demo would build"):
        demo_arena(exam, 2, Show())
    assert place.snapshot() == before
    if Path(model).is_dir():  # over the arena that is there already it may be any model
        ARENA.mkdir()
        write_json(ARENA / "drawn.json", {"seed": 1, "train_rows": 60, "test_rows": 500})
        assert demo_arena(exam, 1, Show()).train == ARENA / "train.csv"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("labels: {a: Answer A, b: Answer B, tie: Tie}", "no token for a label of several"),
        ("template: llama3", "llama3 is no chat template of the embedded base"),
        ("template: qwen3_nothing", "qwen3_nothing is no chat template"),
        ("prompt_template: templates/none.j2", "the judge prompt cannot be read"),
        ("recipes: {sft: {lora_rnk: 4}}", r"recipes\.sft\.lora_rnk: .*did you mean lora_rank"),
    ],
)
def test_a_fault_of_experiment_yaml_is_told_before_arena_and_base_are_made(place, monkeypatch, key, said):
    as_demo(place, monkeypatch)
    place.edit_experiment(key)
    exam, before = load_experiment("exam"), place.snapshot()
    with pytest.raises(ArenaError, match=said):
        demo_arena(exam, 1, Show())
    assert place.snapshot() == before


@pytest.mark.parametrize("other", [None, "other"])
def test_nothing_is_replaced_while_a_run_is_at_work_on_it(place, monkeypatch, other):
    exam = as_demo(place, monkeypatch)
    demo_arena(exam, 1, Show())
    if other:  # another experiment on the demo's base
        shutil.copytree("factory_configs/exam", f"factory_configs/{other}")
    Path("factory_configs/exam").rename("factory_configs/demo")
    before = place.snapshot()
    with only_run(load_experiment(other or "demo").output_folder("sft")):
        refused = call("demo", "--seed", "2", "--fresh")
    assert refused.exit_code == 1 and "remedy: wait for it" in refused.output
    assert place.snapshot() == before


def test_an_arena_without_its_base_is_drawn_again(place, monkeypatch):
    exam = as_demo(place, monkeypatch)
    demo_arena(exam, 1, Show())
    whole = place.snapshot()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("factory.demo.build_base_model", Mock(side_effect=KeyboardInterrupt))
        demo_arena(exam, 2, Show())
    demo_arena(exam, 2, Show())
    second = place.snapshot()
    shutil.rmtree(exam.model)
    ensure_embedded_base(exam, Show())
    assert place.snapshot() == second, "the base of the same arena"
    demo_arena(exam, 1, Show())
    assert place.snapshot() == whole


def test_an_interrupted_demo_of_another_seed_goes_on(place, monkeypatch):
    as_demo(place, monkeypatch)
    Path("factory_configs/exam").rename("factory_configs/demo")
    Path("data/exam").rename("exam")
    asked = []

    def trains(context, *, fresh, **_):
        asked.append(fresh)
        StageState(context.folder).begin("train", StageContext(context.experiment, "sft").training_inputs)

    def demo(seed, stage=trains):
        monkeypatch.setattr("scoring.pipeline.run_stage", stage)
        return call("demo", "--seed", seed).exit_code

    monkeypatch.setattr(run, "finish", lambda *_: None)
    assert demo("1") == 0
    assert demo("2", Mock(side_effect=KeyboardInterrupt)) == 1, "right after prepare"
    assert demo("2") == 0 and demo("2") == 0 and demo("1") == 0
    assert asked == [False, True, False, True]


SMALL = BaseModelSize(vocabulary=512, hidden=64, layers=2, heads=2, feed_forward=128)
STRANGE = "Zażółć 你好 😀 \x00 \t\r\n a\u0301  trailing "


def _texts():
    for row in synthetic_battles(100, seed=1):
        yield from (*row.battle.prompts, *row.battle.responses_a, *row.battle.responses_b)


def _hashes(folder):
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    build_base_model(folder, _texts(), seed=1, size=SMALL)
    return folder


def test_the_folder_is_an_ordinary_hugging_face_model(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert not model.config.tie_word_embeddings and model.config.eos_token_id == tokenizer.eos_token_id
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in base.iterdir())


def test_any_text_survives_the_tokenizer(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer(STRANGE, add_special_tokens=False)["input_ids"]) == STRANGE
    known = "The oven should be hot."
    assert len(tokenizer(known, add_special_tokens=False)["input_ids"]) <= len(known) * 0.6
    for token in demo_module.SPECIAL_TOKENS:
        assert tokenizer.tokenize(f"x{token}y") == ["x", token, "y"]


def test_the_same_seed_gives_the_same_bytes_and_another_other_weights(base, tmp_path):
    import torch

    state = torch.random.get_rng_state()
    build_base_model(tmp_path / "same", _texts(), seed=1, size=SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    build_base_model(tmp_path / "other", _texts(), seed=2, size=SMALL)
    assert _hashes(tmp_path / "same") == _hashes(base)
    changed = {name for name, digest in _hashes(tmp_path / "other").items() if digest != _hashes(base)[name]}
    assert changed == {"model.safetensors"}


def test_without_a_text_nothing_is_built(tmp_path):
    with pytest.raises(ArenaError, match="no text to train a tokenizer on"):
        build_base_model(tmp_path / "base", [" ", ""], seed=1, size=SMALL)
    assert not any(tmp_path.iterdir())
