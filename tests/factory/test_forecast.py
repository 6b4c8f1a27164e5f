"""The forecast: from real exported lengths to memory and hours, with advice where a stage does not fit."""

import io
import json

import numpy as np
import pytest
from forecast_check import PUBLISHED
from rich.console import Console

import factory.forecast
from common.errors import ArenaError, UsageError
from common.stages import STEPS
from factory.devices import CARDS, card_named, card_of
from factory.forecast import forecast, print_forecast, training_work
from factory.memory import scoring_memory, training_memory, weight_bytes
from factory.recipes import write_recipe
from factory.stage_context import StageContext
from factory.workload import ModelSize, TokenLengths, TrainConfig, padded_tokens, sequence_lengths, size_of

MODEL = "Qwen/Qwen3-8B"
RECIPE = {"stage": "sft", "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "bf16": True}
RECIPE |= {"gradient_accumulation_steps": 8, "quantization_bit": 4, "lora_rank": 64, "num_train_epochs": 1.0}


def config(**changed) -> TrainConfig:
    return TrainConfig.of(RECIPE | changed)


@pytest.fixture
def exported(workplace, make_experiment):
    """An experiment with rows, pairs and recipes of a known model, written without a tokenizer."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    experiment = make_experiment(model=MODEL, cutoff_len=2048, swap_copies=True, swap_tta=True)
    experiment.data_folder.mkdir(parents=True)
    rows = {
        "split": ["train"] * 40 + ["valid"] * 8 + ["test"] * 12,
        "verdict": ["a", "b", "tie", "a"] * 12 + [None] * 12,
        "tokens": [100 * (1 + i % 20) for i in range(60)],
    }
    write_table(pa.table(rows), experiment.data_folder / "rows.parquet")
    pairs = {"tokens_a": [50 + i for i in range(60)], "tokens_b": [90 - i for i in range(60)]}
    write_table(pa.table(pairs), experiment.data_folder / "pairs.parquet")
    for step in STEPS:
        write_recipe(experiment, step)
    return experiment


def edit(experiment, stage: str, **values) -> None:
    """Write some lines of a recipe as a user does by hand."""
    path = experiment.recipe(stage)
    kept = [line for line in path.read_text().splitlines() if line.split(":")[0] not in values]
    path.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in values.items())]) + "\n")


def printed(found) -> str:
    stream = io.StringIO()
    print_forecast(Console(file=stream, width=200), found)
    return stream.getvalue()


def test_the_lengths_of_each_stage_are_those_of_its_export(exported):
    sft, judge, reward = (sequence_lengths(StageContext(exported, s)) for s in ("sft", "dpo_judge", "dpo_reward"))
    assert sft.train.shape == (80, 1) and sft.valid.shape == (8, 1)
    assert len(sft.scored) == 2 * 8 + 2 * 12  # both orders of the fold, and of the test set with swap_tta
    assert judge.train.shape == (160, 2)  # both orders, each wrong label
    assert reward.train.shape == (30, 2)  # ties have no pair
    assert reward.train[0].tolist() == [50, 90] and len(reward.scored) == 2 * 20


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_padding_is_that_of_the_batches(batch):
    rows = np.array([[5], [100], [7], [96], [6], [99], [8]])
    grouped, shuffled = (padded_tokens(rows, batch, grouped=grouped) for grouped in (True, False))
    assert TokenLengths(rows, rows, rows.ravel()).longest == 104
    assert rows.sum() <= grouped <= shuffled <= len(rows) * 104
    if batch == 1:
        assert grouped == shuffled == sum(-(-n // 8) * 8 for n in rows.ravel())


def test_four_bits_take_what_bitsandbytes_takes():
    pytest.importorskip("bitsandbytes")
    import torch
    from bitsandbytes import functional

    weight = torch.randn(512, 512)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    size = size_of(MODEL)
    bytes_each = (weight_bytes(size, 4, 2) - 2 * (size.embedding + size.head)) / size.linear
    assert bytes_each == pytest.approx(held / weight.numel(), rel=1e-3)


def test_a_change_of_the_recipe_moves_memory_the_right_way():
    def needed(**changed) -> float:
        return sum(training_memory(size_of(MODEL), config(**changed), 2048).values())

    smaller = {"per_device_train_batch_size": 1, "enable_liger_kernel": True, "lora_rank": 8, "optim": "adamw_8bit"}
    larger = {"disable_gradient_checkpointing": True, "stage": "dpo", "bf16": False}
    larger["additional_target"] = "embed_tokens,lm_head"
    assert all(needed(**{key: value}) < needed() for key, value in smaller.items())
    assert all(needed(**{key: value}) > needed() for key, value in larger.items())
    assert needed() < needed(quantization_bit=8) < needed(quantization_bit=None)
    four, sixteen = (scoring_memory(size_of(MODEL), bits=bits, budget=32768, longest=2048) for bits in (4, None))
    assert sum(four.values()) < 16 < sum(sixteen.values())


def test_work_grows_with_passes_and_rows():
    size, rows = size_of(MODEL), np.full((320, 1), 800)
    lengths = TokenLengths(rows, rows[:16], rows.ravel())
    plain = training_work(size, config(), lengths)
    assert plain.steps == 20
    # three passes over 8.2 billion weights less the embedding, 2 operations each: the known rule of thumb
    assert plain.operations == pytest.approx(6 * (size.linear + size.head) * rows.sum(), rel=0.12)
    assert training_work(size, config(disable_gradient_checkpointing=True), lengths).operations < plain.operations
    half = training_work(size, config(max_steps=10), lengths)
    assert half.operations == pytest.approx(plain.operations / 2, rel=0.01)
    judged = training_work(size, config(eval_strategy="steps", eval_steps=0.25), lengths)
    assert judged.operations > plain.operations


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case.name} {case.tokens}")
def test_figures_that_others_published_of_an_a100_are_met(case):
    """The sources are named where the figures stand."""
    gib, speed = case.forecast()
    assert gib == pytest.approx(case.gigabytes, rel=0.15)
    assert case.speed is None or 1 / speed == pytest.approx(1 / case.speed, rel=0.4)


def test_what_does_not_fit_comes_with_what_to_change(exported):
    found = forecast(exported, ["sft", "dpo_reward"], ["T4", "RTX-4090", "H100"])
    devices = found["stages"]["sft"]["devices"]
    assert devices["H100"]["fits"] and not devices["T4"]["fits"]
    assert devices["H100"]["training_hours"] < devices["RTX-4090"]["training_hours"] < devices["T4"]["training_hours"]
    parts = ("fp16: true", "per_device_train_batch_size", "precision: 8bit")
    assert [part in line for part, line in zip(parts, devices["T4"]["advice"], strict=True)] == [True] * 3
    assert devices["H100"]["advice"] == []
    assert sum(devices["H100"]["memory_parts"].values()) == pytest.approx(devices["H100"]["memory"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_small_model_gets_this_machines_cpu_and_cards_alike_share_a_row(exported, monkeypatch):
    assert list(forecast(exported, ["sft"], [])["stages"]["sft"]["devices"]) == list(CARDS), "8 billion are too many"
    monkeypatch.setattr(factory.forecast, "size_of", lambda *_: ModelSize(64, 2, 8, 8, 8, 128, 1024, tied=False))
    found = forecast(exported, ["sft"], [])
    assert list(found["stages"]["sft"]["devices"]) == [*CARDS, "cpu"]
    assert 0 < found["stages"]["sft"]["devices"]["cpu"]["training_hours"] < 1
    assert "80 rows" in printed(found) and "the longest 2,000" in printed(found)
    (shared,) = (line for line in printed(found).splitlines() if "RTX-4090" in line and "GiB" not in line)
    assert all(name in shared for name in CARDS) and " 60 s " in shared, "a tiny model's time on a card is the start"


def test_without_a_choice_the_stages_that_were_not_exported_are_left_out_with_their_commands(exported):
    assert set(forecast(exported, [], ["T4"])["stages"]) == {"sft", "dpo_judge", "dpo_reward", "rm"}
    (exported.data_folder / "pairs.parquet").unlink()
    exported.recipe("dpo_judge").unlink()
    found = forecast(exported, [], ["T4"])
    assert list(found["stages"]) == ["sft"] and set(found["left_out"]) == {"dpo_judge", "dpo_reward", "rm"}
    assert f"python run.py prepare -e {exported.name} --train FILE --pairs" in found["left_out"]["rm"]
    assert found["left_out"]["dpo_judge"] in printed(found)


def test_what_is_missing_is_an_error_with_the_command_that_makes_it(exported):
    with pytest.raises(UsageError, match="no card GTX"):
        forecast(exported, ["sft"], ["GTX"])
    edit(exported, "dpo_judge", num_train_epochs="two")
    with pytest.raises(ArenaError, match=r"dpo_judge\.yaml: num_train_epochs: "):
        forecast(exported, ["dpo_judge"], ["T4"])
    (exported.data_folder / "pairs.parquet").unlink()
    with pytest.raises(ArenaError, match="--pairs"):
        forecast(exported, ["rm"], ["T4"])


@pytest.mark.parametrize(("stage", "rows"), [("sft", 80), ("dpo_judge", 160), ("dpo_reward", 30)])
def test_max_samples_cuts_the_rows_that_are_trained_on(exported, stage, rows):
    whole = forecast(exported, [stage], ["T4"])["stages"][stage]
    edit(exported, stage, max_samples=6, use_adam_mini="true")  # a package that only the other machine needs
    cut = forecast(exported, [stage], ["T4"])["stages"][stage]
    assert (whole["rows"], cut["rows"]) == (rows, 6) and cut["steps"] < whole["steps"]
    assert cut["devices"]["T4"]["training_hours"] < whole["devices"]["T4"]["training_hours"]
    assert cut["scored_sequences"] == whole["scored_sequences"], "scoring reads every row"


def test_before_votes_and_model_are_on_disk_the_competitions_are_assumed(workplace, make_experiment):
    preset = make_experiment(model=MODEL, cutoff_len=2048)
    for step in STEPS:
        write_recipe(preset, step)
    found = forecast(preset, [], ["4090", "rtx 4090"], gpu_memory=12)
    assert found["assumed"] == {"votes": 57_477, "test": 25_000} and not found["left_out"]
    sft = found["stages"]["sft"]
    assert list(sft["devices"]) == ["RTX-4090", "12 GB"] and sft["longest"] == 2048
    assert 700 < sft["mean_tokens"] < 900, "real battles: 852 before the longest were shortened"
    assert not sft["devices"]["12 GB"]["fits"] and "57,477 votes" in printed(found)
    small = forecast(preset, ["sft"], ["T4"], rows=1000, test_rows=50)["stages"]["sft"]
    assert small["rows"] == 900 * (2 if preset.swap_copies else 1) and small["scored_sequences"] == 200 + 50


def test_the_hidden_test_set_is_as_long_as_the_votes(exported):
    shown, hidden = (forecast(exported, ["sft"], ["T4"], test_rows=n)["stages"]["sft"] for n in (None, 1000))
    assert hidden["scored_sequences"] == 2 * 8 + 2 * 1000 and hidden["rows"] == shown["rows"]


@pytest.mark.parametrize("text, card", [("t4", "T4"), ("GeForce RTX 3090", "RTX-3090"), ("a100-80", "A100-80GB")])
def test_a_card_may_be_written_as_people_write_it(text, card):
    assert card_named(text) == card


def test_this_machines_own_card_comes_first(exported, monkeypatch):
    monkeypatch.setattr("factory.forecast.own_card", lambda: {"this NVIDIA X": card_of(11.0, "NVIDIA X")})
    assert next(iter(forecast(exported, ["sft"])["stages"]["sft"]["devices"])) == "this NVIDIA X"
