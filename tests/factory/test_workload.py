import json

import pytest

from common.errors import ArenaError
from factory.workload import size_of, time_on_cpu

# Billions of parameters, from the models' own cards.
CARDS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.03,
    "google/gemma-2-9b-it": 9.24,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "Qwen/Qwen3-4B-Instruct-2507": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "microsoft/Phi-4-mini-instruct": 3.84,
}


@pytest.mark.parametrize(("model", "billions"), CARDS.items())
def test_a_known_model_has_the_parameters_of_its_card(model, billions):
    assert size_of(model).parameters / 1e9 == pytest.approx(billions, rel=5e-3)


def test_what_a_cpu_takes_follows_from_the_size_and_no_hub_is_asked():
    models = "models/arena-tiny", "models/SmolLM2-135M-Instruct", "Qwen/Qwen3-4B-Instruct-2507", "somebody/unknown"
    assert [time_on_cpu(model) for model in models] == ["minutes", "hours", "days", ""]


@pytest.mark.parametrize("tied", [True, False])
def test_a_folders_size_counts_what_the_real_model_holds(tmp_path, tied):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "intermediate_size": 80, "vocab_size": 100}
    config = Qwen3Config(**sizes, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": json.loads(path.read_text())}))
    assert size_of(str(tmp_path)) == size, "a vision model's text part"
    model = Qwen3ForCausalLM(config)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert size.parameters == model.num_parameters() - norms
    linear = [m for n, m in model.named_modules() if type(m).__name__ == "Linear" and n != "lm_head"]
    assert size.linear == sum(m.weight.numel() for m in linear)
    assert size.lora(8) == sum(8 * (m.in_features + m.out_features) for m in linear)


SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9}
WRONG = [{"hidden_size": "8"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}, {"vocab_size": 1 << 40}]
WRONG += [{"head_dim": [2]}, {"num_key_value_heads": True}]


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", *(json.dumps(SIZES | wrong) for wrong in WRONG)])
def test_a_config_without_sizes_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArenaError, match=r"config\.json"):
        size_of(str(tmp_path))


def test_an_unknown_hub_id_without_network_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArenaError, match=r"nobody/nothing-7B(.|\n)*give a folder"):
        size_of("nobody/nothing-7B")
