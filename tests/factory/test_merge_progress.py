import io

from common.progress import Show
from factory.merge import MergeProgress

BAR = "Loading weights:  43%|████▎     | 125/290 [00:05<00:07, 23.1it/s]"


def weights(folder, **sizes):
    folder.mkdir(exist_ok=True)
    for name, mebibytes in sizes.items():
        with (folder / f"{name}.safetensors").open("wb") as file:
            file.truncate(mebibytes * 2**20)
    return folder


def watched(tmp_path, recipe):
    said = io.StringIO()
    show = Show(said, attended=False, interval=0)
    with show.line("sft") as line:
        yield MergeProgress(line, recipe, tmp_path / "merged"), said


def test_the_childs_own_bar_says_how_much_is_loaded(tmp_path):
    for progress, said in watched(tmp_path, {"model_name_or_path": str(tmp_path)}):
        progress.read("[INFO|modeling_utils.py:706] >> loading weights file models/arena-tiny/model.safetensors")
        assert said.getvalue() == ""
        progress.read(BAR)
        assert said.getvalue() == "sft: 43%  of the weights loaded\n"


def test_what_lies_on_the_disk_says_how_much_is_written(tmp_path):
    base = weights(tmp_path / "base", a=60, b=40)
    for progress, said in watched(tmp_path, {"model_name_or_path": str(base)}):
        progress.look()
        assert said.getvalue() == "", "nothing is written yet"
        for sizes in ({"a": 10}, {"a": 60}, {"a": 60, "b": 50}):
            weights(tmp_path / "merged", **sizes)
            progress.look()
        first, second, third = said.getvalue().splitlines()
        assert first == "sft: 10%  of the merged model written, 10 of 100 MiB"
        assert second == "sft: 60%  of the merged model written, 60 of 100 MiB"
        assert third.startswith("sft: 100%"), "a merged model may be larger than its base"


def test_a_tiny_model_has_its_size_in_a_smaller_unit(tmp_path):
    base = tmp_path / "base"
    for folder, size in ((base, 300_000), (tmp_path / "merged", 150_000)):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(size))
    for progress, said in watched(tmp_path, {"model_name_or_path": str(base)}):
        progress.look()
        assert said.getvalue() == "sft: 50%  of the merged model written, 146 of 292 KiB\n"


def test_a_hub_model_that_cannot_be_found_leaves_the_size_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for progress, said in watched(tmp_path, {"model_name_or_path": "nobody/nothing"}):
        weights(tmp_path / "merged", a=10)
        progress.look()
        assert said.getvalue() == "sft: writing the merged model, 10 MiB so far\n"
