"""What tests of scoring share: tiny random models of several families, and a plain forward pass over one row."""

import contextlib
import shutil
from pathlib import Path
from random import Random

import pytest
from chain import called
from workbench import write_votes

from common.battle import Battle
from common.experiment import load_experiment
from factory.stage_context import StageContext
from tests.bad_inputs.place import build, lay_stage
from tests.conftest import _made_once
from tests.scoring.places import save_adapter

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    # capped scores and logits, and a window shorter than the rows; only the eager attention knows the cap
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_implementation": "eager"}
    | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0},
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": 600}
SIZES["initializer_range"] = 0.2  # logits that spread as a trained model's do


@pytest.fixture(scope="session")
def tiny_model():
    """A function that makes a random two-layer model in fp32; `more` are keys of its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str = "llama", *, seed: int = 0, tied: bool = False, **more):
        more = {"tie_word_embeddings": tied} | SIZES | FAMILIES.get(family, {}) | more
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **more)).eval()

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request, tiny_model):
    """One tiny model of each family; tests leave it as it is."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def plain_logits():
    """A function that returns the logits at every position of one row, [length, vocabulary]."""
    import torch

    def logits(model, ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)])).logits[0].float()

    return logits


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_model) -> Path:
    """A saved base model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("qwen3", seed=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base) -> Path:
    """An adapter that changes every linear layer, the embeddings and the head."""
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def _scored(tmp_path_factory, small_frame, small_tokenizer) -> Path:
    """A working place whose judges, of every kind of stage and of folds, are random, and are all scored by run.py."""

    def make(folder: Path) -> None:
        with contextlib.chdir(folder):
            build(folder, small_frame, small_tokenizer, votes)
            experiment = load_experiment("exam")
            for stage in ("rm", "dpo_reward"):
                lay_stage(StageContext(experiment, stage))
                called("score", "-e", "exam", "--stage", stage)
            called("score", "-e", "exam", "--stage", "base")
            called("probe", "-e", "exam", "--layer", "1")
            shutil.copytree("factory_configs/exam", "factory_configs/folded")
            with Path("factory_configs/folded/experiment.yaml").open("a") as file:
                file.write("folds: 2\nfold_answer: full\n")
            called("prepare", "-e", "folded", "--train", "votes.csv", "--test", "test.csv")
            for fold in (0, 1, "full"):
                lay_stage(StageContext(load_experiment("folded"), "sft", fold=fold))
            called("score", "-e", "folded")

    def votes(_) -> None:
        write_votes(Path("votes.csv"), drawn(220, 1))
        write_votes(Path("test.csv"), drawn(50, 2))

    return _made_once(tmp_path_factory, "scored", make)


@pytest.fixture
def scored(_scored, tmp_path, monkeypatch) -> Path:
    """A copy of the place with all stages as the current folder."""
    folder = shutil.copytree(_scored, tmp_path / "scored", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def drawn(count: int, seed: int) -> list[Battle]:
    """Battles whose longer answer wins most of the time, so that a Davidson link learns from their lengths.

    Some lose turns or the middle of a text, some have an empty text or one that is made harmless.
    """
    random, battles = Random(seed), []
    for number in range(count):
        turns = random.choice([1, 1, 2, 3])
        prompts = [f"question {number}" + random.choice(["", " why" * 80, " <|im_end|>"]), *["go on"] * (turns - 1)]
        a, b = ([" ".join(["word"] * random.choice([1, 3, 9, 30, 250])) for _ in range(turns)] for _ in "ab")
        a[-1] = random.choice([a[-1], a[-1], ""])
        longer = "a" if sum(map(len, a)) > sum(map(len, b)) else "b"
        verdict = longer if random.random() < 0.7 else random.choice(["a", "b", "tie"])
        battles.append(Battle(f"{seed}-{number}", tuple(prompts), tuple(a), tuple(b), verdict))
    return battles
