import json
import socket
from contextlib import contextmanager

import pytest
import yaml

from common.errors import ArenaError, UsageError
from common.experiment import load_experiment, read_yaml
from common.files import only_run
from common.progress import Show
from factory import board
from factory.board import exposure, free_port, lay_out, log_lines, publish_run, serve_page, serve_tensorboard
from factory.recipes import write_recipe
from factory.state import StageState, model_files


@pytest.fixture
def place(workplace):
    folder = workplace / "factory_configs" / "exam"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("model: models/tiny\ntemplate: qwen3_nothink\ncutoff_len: 512\n")
    return workplace


def trained(experiment, stage="sft"):
    adapter, output = experiment.adapter_folder(stage), experiment.output_folder(stage)
    adapter.mkdir(parents=True)
    output.mkdir(parents=True)
    lines = [
        "\x1b[32m***** Running training *****\x1b[0m",
        " 10%|█         | 4/40 [00:01<00:10,  3.5it/s]",
        "{'loss': 1.0}",
    ]
    (output / "train.log").write_text("\n".join(lines))
    return adapter


def test_the_folder_holds_what_the_page_reads(place):
    exam = load_experiment("exam")
    adapter, judge = trained(exam), trained(exam, "dpo_judge")
    exam.data_folder.mkdir(parents=True)
    (exam.data_folder / "manifest.json").write_text("{}")
    entry = {"file_name": "sft_train.jsonl", "formatting": "sharegpt"}
    (exam.data_folder / "dataset_info.json").write_text(json.dumps({"exam_sft_train": entry}))
    (place / "data" / "dataset_info.json").write_text(json.dumps({"theirs": {"file_name": "x.json"}}))
    (place / "llamaboard_config").mkdir()
    (place / "llamaboard_config" / "mine.yaml").write_text("a: 1\n")
    board = lay_out()
    assert [path.name for path in board.configs] == [f"exam_{s}.yaml" for s in ("sft", "dpo_judge", "dpo_reward", "rm")]
    assert yaml.safe_load(board.configs[0].read_text())["train.dataset"] == ["exam_sft_train"]
    assert (place / "llamaboard_config" / "mine.yaml").read_text() == "a: 1\n"
    listed = json.loads((place / "data" / "dataset_info.json").read_text())
    assert listed == {
        "theirs": {"file_name": "x.json"},
        "exam_sft_train": {**entry, "file_name": "exam/sft_train.jsonl"},
    }
    assert yaml.safe_load((adapter / "llamaboard_config.yaml").read_text())["top.model_name"] == "tiny"
    assert "running_log.txt" not in model_files(adapter), "no part of the adapter: what was merged from it stays merged"
    assert (adapter / "running_log.txt").read_text() == "***** Running training *****\n{'loss': 1.0}\n"
    link = place / "saves" / "exam_sft_merged" / "lora" / judge.name
    assert link.is_symlink() and link.resolve() == judge.resolve(), "offered on the base that it was trained on"
    assert yaml.safe_load((place / "llamaboard_cache" / "user_config.yaml").read_text())["last_model"] == "tiny"
    assert board.notes == []


def test_a_list_of_data_sets_that_cannot_be_read_is_left_alone_with_a_note(place):
    exam = load_experiment("exam")
    exam.data_folder.mkdir(parents=True)
    own, listed = exam.data_folder / "dataset_info.json", place / "data" / "dataset_info.json"
    entry = {"file_name": "sft_train.jsonl"}
    own.write_text(json.dumps({"exam_sft_train": entry, "exam_hub": {"hf_hub_url": "a/b"}, "exam_odd": 3}))
    listed.write_text('{"mine": {"hf_hub_url": "a/b"},}')
    (note,) = lay_out().notes
    assert note.startswith("data/dataset_info.json is not readable JSON (") and "it stays as it is" in note
    assert listed.read_text() == '{"mine": {"hf_hub_url": "a/b"},}'
    listed.unlink()
    assert lay_out().notes == []
    assert json.loads(listed.read_text()) == {"exam_sft_train": {"file_name": "exam/sft_train.jsonl"}}
    own.write_text("{")
    (note,) = lay_out().notes
    assert note.startswith("exam's data sets are not listed") and "exam/dataset_info.json" in note


def test_the_list_of_data_sets_is_written_under_the_lock_of_prepare(place, monkeypatch):
    exam = load_experiment("exam")
    exam.data_folder.mkdir(parents=True)
    (exam.data_folder / "dataset_info.json").write_text(json.dumps({"exam_sft_train": {"file_name": "x.jsonl"}}))
    listed, taken = place / "data" / "dataset_info.json", []

    @contextmanager
    def lock(path, *, wait):
        taken.append(path)
        listed.write_text(json.dumps({"another": {"file_name": "other/x.jsonl"}}))  # prepare was there first
        yield

    monkeypatch.setattr(board, "only_run", lock)
    lay_out()
    assert [path.as_posix() for path in taken] == ["data/dataset_info.json"]
    assert set(json.loads(listed.read_text())) == {"another", "exam_sft_train"}


def test_a_second_time_nothing_of_the_user_is_overwritten(place):
    adapter = trained(load_experiment("exam"))
    lay_out()
    (adapter / "llamaboard_config.yaml").write_text("top.model_name: own\n")
    (place / "llamaboard_cache").mkdir(exist_ok=True)
    (place / "llamaboard_cache" / "user_config.yaml").write_text("lang: zh\n")
    lay_out()
    assert (adapter / "llamaboard_config.yaml").read_text() == "top.model_name: own\n"
    assert (place / "llamaboard_cache" / "user_config.yaml").read_text() == "lang: zh\n"


def test_a_faulty_experiment_or_recipe_is_told_and_the_others_are_there(place):
    broken = place / "factory_configs" / "broken"
    broken.mkdir()
    (broken / "experiment.yaml").write_text("modle: x\n")
    (place / "factory_configs" / "exam" / "rm.yaml").write_text("a: [\n")
    board = lay_out()
    assert [path.stem for path in board.configs] == ["exam_sft", "exam_dpo_judge", "exam_dpo_reward"]
    assert any("experiment broken is left out" in note for note in board.notes)
    assert any("exam rm is left out" in note for note in board.notes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("template:", "template"),
        ("lora_rank:\n", "lora_rank"),
        ("per_device_train_batch_size: many", "per_device_train_batch_size"),
    ],
)
def test_a_hand_broken_recipe_costs_its_own_stage_alone(place, line, words):
    exam = load_experiment("exam")
    write_recipe(exam, "rm")
    kept = [
        each for each in exam.recipe("rm").read_text().splitlines() if not each.startswith(f"{line.split(':')[0]}:")
    ]
    kept = [each for each in kept if not each.startswith("lora_alpha:")]
    exam.recipe("rm").write_text("\n".join([*kept, line] if line != "template:" else kept))
    board = lay_out()
    assert [path.stem for path in board.configs] == ["exam_sft", "exam_dpo_judge", "exam_dpo_reward"]
    (note,) = board.notes
    assert note.startswith("exam rm is left out: factory_configs/exam/rm.yaml: ") and words in note


def test_a_run_is_shown_with_the_recipe_that_it_began_with(place):
    exam = load_experiment("exam")
    adapter = trained(exam)
    write_recipe(exam, "sft")
    recipe = read_yaml(exam.recipe("sft"))
    StageState(exam.output_folder("sft")).begin("train", {str(exam.recipe("sft")): {**recipe, "cutoff_len": 1234}})
    lay_out()
    settings = adapter / "llamaboard_config.yaml"
    assert yaml.safe_load(settings.read_text())["train.cutoff_len"] == 1234
    today = place / "llamaboard_config" / "exam_sft.yaml"
    assert yaml.safe_load(today.read_text())["train.cutoff_len"] == recipe["cutoff_len"] == 512
    StageState(exam.output_folder("sft")).begin("train", {str(exam.recipe("sft")): {**recipe, "cutoff_len": 999}})
    lay_out()
    assert yaml.safe_load(settings.read_text())["train.cutoff_len"] == 999, "another run in the same folder"
    (exam.output_folder("sft") / "state.json").write_text("{")
    assert any("the run of exam sft is left out" in note for note in lay_out().notes)
    (exam.output_folder("sft") / "state.json").unlink()
    settings.write_text("top.model_name: own\n")
    lay_out()
    assert settings.read_text() == "top.model_name: own\n", "nobody knows better"


def test_without_experiments_it_is_the_wrong_folder(workplace):
    with pytest.raises(UsageError, match="there is no factory_configs/ here") as caught:
        lay_out()
    assert caught.value.where == str(workplace)
    assert list(workplace.iterdir()) == [workplace / "templates"]
    (workplace / "factory_configs").mkdir()
    with pytest.raises(UsageError, match="there is no experiment that can be read"):
        lay_out()


def test_what_was_not_trained_is_not_published(place):
    exam = load_experiment("exam")
    publish_run(exam, "sft", None)
    assert not exam.adapter_folder("sft").exists() and log_lines(place / "none.log") == []


def test_ports_are_free_and_the_loopback_is_no_exposure():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 cannot be listened on"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1") >= 7860
    with pytest.raises(UsageError, match="no address of this machine"):
        free_port("no.such.host.invalid")
    for address in ("::1", "::", "fe80::1"):
        with pytest.raises(UsageError, match="is an IPv6 address") as caught:
            free_port(address)
        assert "--host 127.0.0.1" in caught.value.remedy
    for address in ("[::1]", "[::1]:80"):
        with pytest.raises(UsageError, match="is an IPv6 address"):
            free_port(address)
    assert exposure("127.0.0.1") is None and exposure("localhost") is None
    assert "prefer 127.0.0.1" in exposure("0.0.0.0")


@pytest.mark.parametrize(
    ("host", "remedy"),
    [
        ("a..b", "--host 127.0.0.1"),
        ("a" * 70, "--host 127.0.0.1"),
        ("\udcff", "--host 127.0.0.1"),  # a byte of the command line that is no text
        ("127.0.0.1:80", "--host 127.0.0.1 --port 80"),
        ("localhost:8080", "--host localhost --port 8080"),
        (":80", "--host 127.0.0.1"),
        ("http://localhost", "--host 127.0.0.1"),
    ],
)
def test_a_host_that_is_none_is_told_with_what_to_give_instead(host, remedy):
    with pytest.raises(UsageError, match="is no address of this machine") as caught:
        free_port(host)
    assert (caught.value.where, caught.value.remedy) == ("--host", remedy)


def test_a_page_that_cannot_start_says_why(place, capsys, monkeypatch):
    with pytest.raises(ArenaError, match="thing ended with exit code"):
        serve_page(
            "no_such_module_at_all", [], "thing", place / "x.log", "127.0.0.1", None, open_browser=False, show=Show()
        )
    with pytest.raises(ArenaError, match="no run here wrote anything for TensorBoard"):
        serve_tensorboard(load_experiment("exam"), "127.0.0.1", None, open_browser=False, show=Show())
    served = []
    monkeypatch.setattr(board, "serve_page", lambda module, *_, **__: served.append(module))
    with only_run(load_experiment("exam").output_folder("sft")):  # its events come with its first step
        serve_tensorboard(load_experiment("exam"), "127.0.0.1", None, open_browser=False, show=Show())
    assert served == ["tensorboard.main"]
