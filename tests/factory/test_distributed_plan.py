"""Launches: what each engine asks of LLaMA-Factory, and what is refused before anything starts."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.errors import ArenaError
from factory import distributed as launch_module
from factory.distributed import Launch, plan_launch
from factory.launcher import ACCELERATE_CONFIG, accelerate_options, torchrun_options

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {"stage": "sft", "quantization_bit": 4}
PLACE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch_module, "find_spec", lambda name: name)
    monkeypatch.setattr(launch_module, "_gpus", lambda: 0)


def plan(engine, recipe=RECIPE, **given):
    return plan_launch(engine, recipe, Path("factory_configs/exp/sft.yaml"), given)


def faults_of(engine, recipe=RECIPE, **given) -> str:
    with pytest.raises(ArenaError) as caught:
        plan(engine, recipe, **given)
    assert "docs/distributed.md" in caught.value.remedy and "sft.yaml" in caught.value.where
    return caught.value.what


def test_auto_follows_the_environment():
    assert plan("auto") == Launch(), "one process needs nothing"
    assert plan("auto", FORCE_TORCHRUN="1").engine == plan("auto", NNODES="2", NODE_RANK="0", **PLACE).engine == "ddp"
    assert plan("auto", USE_RAY="1").engine == "ray" and plan("auto", USE_RAY="0", NNODES="1").engine == "auto"
    assert plan("auto", {**RECIPE, "deepspeed": "mine.json"}).engine == "ddp", "DeepSpeed needs torchrun"


def test_each_engine_uses_its_shipped_file():
    for engine, stage in (("zero2", 2), ("zero3", 3)):
        made = plan(engine)
        (option,) = made.options
        assert json.loads(Path(option.removeprefix("deepspeed=")).read_text())["zero_optimization"]["stage"] == stage
        assert made.environment == {"FORCE_TORCHRUN": "1", "USE_RAY": "0"}
        assert made.inputs["distributed"] == engine and "zero_optimization" in made.inputs[f"{engine}.json"]
    made = plan("fsdp")
    config = OmegaConf.load(made.environment[ACCELERATE_CONFIG])
    assert config.distributed_type == "FSDP" and config.fsdp_config.fsdp_use_orig_params is False
    assert "FULL_STATE_DICT" in made.inputs["fsdp.yaml"]


def test_ray_is_told_of_the_cores_that_llamafactory_asks_for():
    made = plan("ray", NPROC_PER_NODE="2")
    assert made.environment["USE_RAY"] == "1" and made.options[0] == "ray_num_workers=2"
    claim = json.loads(made.options[1].removeprefix("ray_init_kwargs="))
    assert claim["num_cpus"] == 20, "ten a worker"
    assert claim["runtime_env"]["worker_process_setup_hook"] == "factory.launcher.guard_worker"
    assert plan("ray", {**RECIPE, "ray_num_workers": 4, "ray_init_kwargs": {}}, RAY_ADDRESS="auto").options == ()


@pytest.mark.parametrize(
    ("engine", "keys", "given", "words"),
    [
        ("ddp", {}, {"NNODES": "2", **PLACE}, "NNODES=2 needs a NODE_RANK"),
        ("ddp", {}, {"NNODES": "2", "NODE_RANK": "2", **PLACE}, "NNODES=2 needs a NODE_RANK below it"),
        ("zero2", {}, {"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR and MASTER_PORT missing"),
        ("ddp", {}, {"NNODES": "two"}, "NNODES='two' is not a whole number of 1 or more"),
        ("auto", {}, {"RDZV_ID": "run", "MAX_RESTARTS": "2"}, "RDZV_ID and MAX_RESTARTS: nodes that come and go"),
        ("zero3", {"quantization_bit": 8}, {}, "zero3 shards 4-bit or 16-bit weights, not 8-bit"),
        ("fsdp", {"quantization_bit": 8}, {}, "fsdp shards 4-bit or 16-bit weights, not 8-bit"),
        ("zero3", {"pure_bf16": True}, {}, "zero3 does not go with pure_bf16"),
        ("zero2", {"deepspeed": "x.json"}, {}, "zero2 excludes the recipe's own deepspeed"),
        ("fsdp", {"fsdp": "full_shard"}, {}, "remove the key fsdp"),
    ],
)
def test_what_does_not_fit_together_is_refused(engine, keys, given, words):
    assert words in faults_of(engine, {**RECIPE, **keys}, **given)


def test_all_faults_come_together_and_missing_packages_have_a_remedy(monkeypatch):
    monkeypatch.setattr(launch_module, "find_spec", lambda name: None)
    told = faults_of("zero3", {**RECIPE, "quantization_bit": 8}, NNODES="2")
    assert told.startswith("4 fault(s)") and "deepspeed is not installed: pip install deepspeed" in told
    assert "ray is not installed: make extra-ray" in faults_of("ray")


def test_torchruns_and_accelerates_options():
    assert plan("ddp", NNODES="2", NODE_RANK="0", **PLACE).is_main_process
    assert not plan("ddp", NNODES="2", NODE_RANK="1", **PLACE).is_main_process
    plain = torchrun_options({"NPROC_PER_NODE": "2", "MASTER_PORT": "1234"}, devices=0)
    assert " ".join(plain) == "--nnodes 1 --node_rank 0 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 1234"
    assert torchrun_options({}, devices=4)[5] == "4"
    told = accelerate_options({"NNODES": "2", "NODE_RANK": "1", **PLACE}, devices=4)
    assert told[:6] == ["--num_processes", "8", "--num_machines", "2", "--machine_rank", "1"]
    from accelerate.commands.launch import launch_command_parser

    config = ["--config_file", "templates/distributed/fsdp.yaml"]
    parsed = launch_command_parser().parse_args([*config, *told, "a script.py", "a recipe.yaml"])
    assert parsed.training_script == "a script.py" and parsed.training_script_args == ["a recipe.yaml"]
    assert parsed.num_processes == 8 and parsed.main_process_port == 29500
