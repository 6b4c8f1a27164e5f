"""scoring.rewards: rewards are as the trainers define them, the reference is the base, and nothing fails silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import ArenaError
from scoring import rewards
from scoring.packed_model import Reader
from scoring.rewards import implicit_rewards, load_policy, load_value_head, value_rewards

BETA = 0.3
OPTIONS = {"beta": BETA, "length_normalised": False, "reference": True}


def battles(count: int, seed: int = 11) -> list[rewards.Triple]:
    random = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return random.integers(0, 600, random.integers(1, longest)).tolist()

    return [(ids(30), ids(50), ids(50)) for _ in range(count)]


TRIPLES = battles(9)


@pytest.fixture(scope="session")
def plain_sum(plain_logits):
    """A function that returns an answer's log-probability by a loop over one row's full logits."""

    def log_probability(model, prompt, answer) -> float:
        logits = plain_logits(model, [*prompt, *answer]).double().log_softmax(-1)
        return sum(float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(answer))

    return log_probability


def trained_adapter(base: Path, folder: Path, *, train=True, **config) -> Path:
    """Save a LoRA adapter on `base`, with random weights where `train`, as LLaMA-Factory does (fp32, safetensors)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]} | config
    torch.manual_seed(4)
    policy = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, task_type="CAUSAL_LM", **config))
    if train:
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    policy.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_model) -> Path:
    """A saved base model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("qwen3", seed=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base) -> Path:
    """An adapter that changes every linear layer, the embeddings and the head."""
    return trained_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def policy(base, adapter):
    """The loaded policy; tests leave it as it is."""
    return load_policy(str(base), adapter, "cpu", quantization_bit=None)


@pytest.fixture(scope="session")
def parts(base, adapter, plain_sum) -> np.ndarray:
    """(policy, reference) log-probabilities of TRIPLES' answers from two separately loaded models, [2, 9, 2]."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
    return np.array([[[plain_sum(m, p, x) for x in (a, b)] for p, a, b in TRIPLES] for m in (merged, reference)])


def short_of_memory(model, limit: int, sizes: list[int]) -> Reader:
    """Return a reader of a model that can read no more than `limit` tokens at a time."""
    import torch

    reader = Reader(model)

    def read(_, args):
        sizes.append(args[0].numel())
        if args[0].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_input_embeddings().register_forward_pre_hook(read)
    return reader


class TestImplicitRewards:
    @pytest.mark.parametrize("budget", [1, 64, 4096])
    def test_they_are_beta_times_the_log_ratio_of_two_separate_models(self, policy, parts, budget):
        result = implicit_rewards(policy, TRIPLES, token_budget=budget, **OPTIONS)
        assert result.dtype == np.float64
        assert parts.std() > 10
        np.testing.assert_allclose(result, BETA * (parts[0] - parts[1]), atol=1e-4, rtol=0)

    def test_normalised_they_are_means_over_the_tokens(self, policy, parts):
        lengths = np.array([[len(a), len(b)] for _, a, b in TRIPLES])
        result = implicit_rewards(policy, TRIPLES, beta=BETA, length_normalised=True, reference=True)
        np.testing.assert_allclose(result, BETA * (parts[0] - parts[1]) / lengths, atol=1e-5, rtol=0)

    def test_without_a_reference_they_are_the_policy_alone(self, policy, parts):
        lengths = np.array([[len(a), len(b)] for _, a, b in TRIPLES])
        result = implicit_rewards(policy, TRIPLES, beta=2.0, length_normalised=True, reference=False)
        np.testing.assert_allclose(result, 2.0 * parts[0] / lengths, atol=1e-4, rtol=0)

    def test_the_model_s_own_code_behind_the_head_counts(self, family_model, plain_sum):
        result = implicit_rewards(family_model, TRIPLES, beta=1.0, length_normalised=False, reference=False)
        expected = [[plain_sum(family_model, p, x) for x in (a, b)] for p, a, b in TRIPLES]
        np.testing.assert_allclose(result, expected, atol=1e-3, rtol=1e-5)

    def test_small_slices_through_the_head_change_nothing(self, policy, monkeypatch):
        whole = implicit_rewards(policy, TRIPLES, **OPTIONS)
        sizes = []
        head = policy.get_output_embeddings()
        handle = head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
        monkeypatch.setattr(rewards, "LOGITS", 7 * 600 + 5)
        sliced = implicit_rewards(policy, TRIPLES, **OPTIONS)
        handle.remove()
        assert max(sizes) == 7 * 600
        answers = sum(len(a) + len(b) for _, a, b in TRIPLES)
        assert sum(sizes) == 2 * answers * 600, "only answer positions go through the head"
        np.testing.assert_allclose(sliced, whole, atol=1e-5, rtol=0)

    def test_an_untrained_adapter_has_no_reward(self, base, tmp_path):
        fresh = load_policy(str(base), trained_adapter(base, tmp_path, train=False), "cpu", quantization_bit=None)
        np.testing.assert_allclose(implicit_rewards(fresh, TRIPLES, **OPTIONS), 0, atol=1e-6)

    def test_equal_answers_have_the_very_same_reward_and_are_read_once(self, policy):
        (prompt, a, b), seen = TRIPLES[0], []
        triples = [(prompt, a, a), (prompt, b, a), (prompt, a, b)]
        result = implicit_rewards(policy, triples, token_budget=1, progress=seen.append, **OPTIONS)
        assert result[0, 0] == result[0, 1] == result[1, 1] == result[2, 0]
        assert result[1, 0] == result[2, 1]
        assert seen[-1].rows == seen[-1].total_rows == 1, "one prompt with its answers"
        assert seen[-1].tokens == len(prompt) - 1 + len(a) + len(b), "the prompt is read once, and no last token"

    def test_the_policy_is_itself_again_afterwards(self, policy, plain_logits):
        before = plain_logits(policy, [5, 6, 7])
        implicit_rewards(policy, TRIPLES[:2], **OPTIONS)
        assert (plain_logits(policy, [5, 6, 7]) == before).all()
        assert "forward" not in policy.get_base_model().base_model.__dict__

    @pytest.mark.parametrize("limit", [200, 75])
    def test_out_of_memory_reads_less_at_a_time_and_loses_nothing(self, tiny_model, limit):
        options = {"beta": 1.0, "length_normalised": False, "reference": False}
        expected, sizes, said = implicit_rewards(tiny_model(), TRIPLES, **options), [], []
        reader = short_of_memory(tiny_model(), limit, sizes)
        result = implicit_rewards(reader, TRIPLES, note=said.append, **options)
        np.testing.assert_allclose(result, expected, atol=1e-3)
        assert max(sizes) > limit
        assert said or limit == 75, "below one battle, its answers are read one by one without a word about batches"

    def test_a_row_that_never_fits_is_named(self, tiny_model):
        reader = short_of_memory(tiny_model(), 50, [])
        with pytest.raises(ArenaError, match=r"row \d: its \d+ tokens alone do not fit") as caught:
            implicit_rewards(reader, TRIPLES, beta=1.0, length_normalised=False, reference=False, note=lambda _: None)
        prompt, *answers = TRIPLES[int(caught.value.where.removeprefix("row "))]
        assert len(prompt) + max(map(len, answers)) - 1 > 50

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_reward_that_is_not_finite_names_its_row(self, tiny_model, value):
        model = tiny_model(seed=2)
        model.get_input_embeddings().weight.data[599] = value
        triples = [([1, 2], [3], [4]), ([1, 2], [3, 5, 4], [599, 5]), ([599], [3], [4])]
        with pytest.raises(ArenaError, match="no finite reward for 2") as caught:
            implicit_rewards(model, triples, beta=1.0, length_normalised=False, reference=False)
        assert caught.value.where == "row 1"
        assert "loss curve" in caught.value.remedy

    @pytest.mark.parametrize("empty", [0, 1, 2])
    def test_a_triple_with_an_empty_part_names_its_row(self, policy, empty):
        triple = [[1], [2], [3]]
        triple[empty] = []
        with pytest.raises(ArenaError, match="row 1: the prompt or an answer has no tokens"):
            implicit_rewards(policy, [TRIPLES[0], tuple(triple)], **OPTIONS)

    def test_no_battle_is_no_work(self, policy):
        assert implicit_rewards(policy, [], **OPTIONS).shape == (0, 2)


class TestLoadPolicy:
    def test_switched_off_it_is_the_base_to_the_bit(self, policy, base, plain_logits):
        from transformers import AutoModelForCausalLM

        expected = plain_logits(AutoModelForCausalLM.from_pretrained(base).eval(), range(40))
        assert (plain_logits(policy, range(40)) - expected).abs().max() > 0.1
        with policy.disable_adapter():
            assert (plain_logits(policy, range(40)) == expected).all()

    def test_a_head_tied_to_the_embeddings_comes_back_too(self, tiny_model, tmp_path, plain_logits):
        model = tiny_model("llama", tied=True)
        model.save_pretrained(tmp_path / "base")
        trained = trained_adapter(tmp_path / "base", tmp_path / "adapter")
        policy = load_policy(str(tmp_path / "base"), trained, "cpu", quantization_bit=None)
        with policy.disable_adapter():
            assert (plain_logits(policy, [1, 2, 3]) == plain_logits(model, [1, 2, 3])).all()

    @pytest.mark.parametrize("bit", [4, 8])
    def test_quantised_the_reference_is_the_quantised_base(self, base, adapter, bit, plain_sum):
        pytest.importorskip("bitsandbytes")
        policy = load_policy(str(base), adapter, "cpu", quantization_bit=bit)
        kinds = {type(module).__name__ for module in policy.modules()}
        assert ("Linear4bit" if bit == 4 else "Linear8bitLt") in kinds
        triples = TRIPLES[:2]
        result = implicit_rewards(policy, triples, **OPTIONS)
        again = implicit_rewards(policy, triples, **OPTIONS)
        np.testing.assert_array_equal(result, again)  # the first pass has not changed the weights
        expected = np.array([[plain_sum(policy, p, x) for x in (a, b)] for p, a, b in triples])
        with policy.disable_adapter():
            expected -= [[plain_sum(policy, p, x) for x in (a, b)] for p, a, b in triples]
        np.testing.assert_allclose(
            result, BETA * expected, atol=4e-2 if bit == 8 else 1e-4
        )  # int8 looks at a whole batch

    def test_an_adapter_of_another_base_is_refused(self, adapter, tiny_model, tmp_path):
        tiny_model("qwen3", seed=8).save_pretrained(tmp_path)
        with pytest.raises(ArenaError, match=r"was trained on .* another reference"):
            load_policy(str(tmp_path), adapter, "cpu", quantization_bit=None)

    @pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
    def test_an_unfinished_adapter_is_named(self, base, adapter, tmp_path, missing):
        for file in adapter.iterdir():
            if file.is_file() and file.name != missing:
                (tmp_path / file.name).write_bytes(file.read_bytes())
        with pytest.raises(ArenaError, match=f"no finished adapter: {missing} missing") as caught:
            load_policy(str(base), tmp_path, "cpu", quantization_bit=None)
        assert caught.value.where == str(tmp_path)

    @pytest.mark.parametrize(
        "dropped, told", [("lora_B", r"lacks 14 weights .*lora_B"), ("embed_tokens", "cannot be put on .*embed_tokens")]
    )
    def test_weights_that_are_missing_are_not_passed_over(self, base, adapter, tmp_path, dropped, told):
        copy_with(adapter, tmp_path, lambda tensors: {k: v for k, v in tensors.items() if dropped not in k})
        with pytest.raises(ArenaError, match=told):
            load_policy(str(base), tmp_path, "cpu", quantization_bit=None)

    def test_weights_without_a_place_are_not_passed_over(self, base, adapter, tmp_path):
        copy_with(adapter, tmp_path, lambda t: t | {k.replace("layers.1", "layers.7"): v.clone() for k, v in t.items()})
        with pytest.raises(ArenaError, match="no place for"):
            load_policy(str(base), tmp_path, "cpu", quantization_bit=None)

    def test_weights_of_another_size_are_an_error_with_a_remedy(self, base, adapter, tmp_path):
        copy_with(adapter, tmp_path, lambda t: {k: v[..., :-1].contiguous() for k, v in t.items()})
        with pytest.raises(ArenaError, match="cannot be put on") as caught:
            load_policy(str(base), tmp_path, "cpu", quantization_bit=None)
        assert "train again" in caught.value.remedy

    def test_an_adapter_that_changed_the_base_itself_has_no_reference(self, base, tmp_path):
        trained_adapter(base, tmp_path, train=False, init_lora_weights="pissa")
        with pytest.raises(ArenaError, match="does not give the base back"):
            load_policy(str(base), tmp_path, "cpu", quantization_bit=None)

    def test_a_base_that_is_not_there_is_named(self, adapter, tmp_path):
        copy_with(adapter, tmp_path / "adapter", dict)
        base = str(tmp_path / "gone")
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(ArenaError, match="the base model cannot be loaded") as caught:
            load_policy(base, tmp_path / "adapter", "cpu", quantization_bit=None)
        assert caught.value.where == base

    @pytest.mark.parametrize(
        "one, other, same",
        [
            ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", True),
            ("hub/models/Qwen/Qwen2___5-7B", "Qwen/Qwen2.5-7B", True),
            ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", False),
            (".", "./", True),
            (".", "..", False),
            (".", "Qwen/Qwen3-4B", False),
        ],
    )
    def test_names_of_one_model(self, one, other, same):
        assert rewards._same_model(one, other) is same


def copy_with(adapter: Path, folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(change(load_file(adapter / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def save_head(folder: Path, *, size: int = 32, seed: int = 6, **replaced) -> Path:
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "v_head.summary.weight": torch.randn(1, size, generator=draw),
        "v_head.summary.bias": torch.randn(1, generator=draw),
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors | replaced, folder / rewards.VALUE_HEAD)
    return folder


class TestValueRewards:
    @pytest.mark.parametrize("budget", [1, 64, 4096])
    def test_they_are_the_head_on_the_last_token_s_final_state(self, family_model, tmp_path, budget):
        import torch

        head = load_value_head(save_head(tmp_path))
        captured = []
        handle = family_model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: captured.append(inputs[0][0, -1].double())
        )
        expected = []
        for prompt, *answers in TRIPLES:
            for answer in answers:
                with torch.no_grad():
                    family_model(input_ids=torch.tensor([[*prompt, *answer]]))
                expected.append(float(captured.pop() @ head.weight + head.bias))
        handle.remove()
        result = value_rewards(family_model, head, TRIPLES, token_budget=budget)
        assert np.std(expected) > 1
        np.testing.assert_allclose(result.ravel(), expected, atol=1e-4, rtol=0)

    def test_a_reward_is_not_rounded(self, tiny_model, tmp_path):
        result = value_rewards(tiny_model(), load_value_head(save_head(tmp_path)), TRIPLES)
        assert np.abs(result - result.round(2)).max() > 1e-3

    def test_a_head_of_another_model_is_refused(self, tiny_model, tmp_path):
        head = load_value_head(save_head(tmp_path, size=48))
        with pytest.raises(ArenaError, match="takes 48 numbers, the model's hidden states have 32"):
            value_rewards(tiny_model(), head, TRIPLES)

    def test_a_reward_that_is_not_finite_names_its_row(self, tiny_model, tmp_path):
        model = tiny_model()
        model.get_input_embeddings().weight.data[599] = float("nan")
        head = load_value_head(save_head(tmp_path))
        with pytest.raises(ArenaError, match="no finite reward for 1 ") as caught:
            value_rewards(model, head, [([1], [2], [3]), ([1], [2], [599])])
        assert caught.value.where == "row 1"

    def test_a_missing_head_says_what_the_merge_needs(self, tmp_path):
        with pytest.raises(ArenaError, match="value head is missing") as caught:
            load_value_head(tmp_path)
        assert "stage: rm" in caught.value.remedy

    def test_a_damaged_head_is_an_error(self, tmp_path):
        (tmp_path / rewards.VALUE_HEAD).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00no header")
        with pytest.raises(ArenaError, match="is damaged"):
            load_value_head(tmp_path)

    @pytest.mark.parametrize("name, shape", [("weight", (2, 32)), ("weight", (32,)), ("bias", (2,))])
    def test_a_layer_of_another_shape_is_an_error(self, tmp_path, name, shape):
        import torch

        save_head(tmp_path, **{f"v_head.summary.{name}": torch.zeros(shape)})
        with pytest.raises(ArenaError, match="one output"):
            load_value_head(tmp_path)

    def test_a_diverged_head_is_an_error(self, tmp_path):
        import torch

        save_head(tmp_path, **{"v_head.summary.bias": torch.tensor([float("nan")])})
        with pytest.raises(ArenaError, match="no finite"):
            load_value_head(tmp_path)


@pytest.mark.slow
class TestAgainstLlamaFactory:
    """The trainers' own code, called on rows that its own processor and collator made, is the reference."""

    TEXTS = (("hi", "Hello!", "Hey there, what's up?"), ("naïve 日本語", "x", "def f(x):\n    return x + 1"))

    @pytest.fixture(scope="class")
    def batch(self, small_tokenizer):
        """(triples, a collated batch of chosen then rejected rows, the tokenizer)."""
        from llamafactory.data import PairwiseDataCollatorWithPadding
        from llamafactory.data.processor import PairwiseDatasetProcessor
        from llamafactory.data.template import get_template_and_fix_tokenizer
        from llamafactory.hparams import DataArguments
        from transformers import PreTrainedTokenizerFast

        data = DataArguments(template="qwen3_nothink", cutoff_len=256)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer, padding_side="right")
        template = get_template_and_fix_tokenizer(tokenizer, data)
        processor = PairwiseDatasetProcessor(template, tokenizer, None, data)
        columns = {
            "_prompt": [[{"role": "user", "content": prompt}] for prompt, _, _ in self.TEXTS],
            "_response": [[{"role": "assistant", "content": text} for text in pair] for _, *pair in self.TEXTS],
        }
        rest = {key: [None] * len(self.TEXTS) for key in ("_system", "_tools", "_images", "_videos", "_audios")}
        rows = processor.preprocess_dataset(columns | rest)
        features = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        collated = PairwiseDataCollatorWithPadding(template=template, tokenizer=tokenizer, pad_to_multiple_of=8)(
            features
        )
        return [self._triple(feature) for feature in features], collated, tokenizer

    @staticmethod
    def _triple(feature) -> rewards.Triple:
        answers = [[i for i in feature[f"{side}_labels"] if i != -100] for side in ("chosen", "rejected")]
        prompt = feature["chosen_input_ids"][: -len(answers[0])]
        return prompt, *answers

    def test_implicit_rewards_are_those_that_its_dpo_trainer_logs(self, batch, policy):
        from types import SimpleNamespace

        import torch
        from llamafactory.train.dpo.trainer import CustomDPOTrainer

        triples, collated, _ = batch
        trainer = SimpleNamespace(
            finetuning_args=SimpleNamespace(use_ref_model=True),
            accelerator=SimpleNamespace(unwrap_model=lambda model: model),
            ref_model=None,
            ld_alpha=None,
            loss_type="sigmoid",
        )
        trainer.concatenated_forward = lambda *a, **k: CustomDPOTrainer.concatenated_forward(trainer, *a, **k)
        with torch.no_grad():
            own = trainer.concatenated_forward(policy, collated)
            reference = CustomDPOTrainer.compute_reference_log_probs(trainer, policy, collated)
        expected = torch.stack([own["chosen_logps"] - reference[0], own["rejected_logps"] - reference[1]], 1)
        result = implicit_rewards(policy, triples, **OPTIONS)
        assert expected.std() > 1
        np.testing.assert_allclose(result, BETA * expected.numpy(), atol=1e-4)
        averaged = implicit_rewards(policy, triples, beta=1.0, length_normalised=True, reference=False)
        np.testing.assert_allclose(averaged[:, 0], own["chosen_logps_avg"].numpy(), atol=1e-5)

    @pytest.mark.parametrize("bit", [4, 8])
    def test_a_quantised_policy_is_the_one_that_its_own_loader_makes(self, tiny_base, tmp_path, bit, plain_logits):
        pytest.importorskip("bitsandbytes")
        from llamafactory.hparams import get_infer_args
        from llamafactory.model import load_model, load_tokenizer

        adapter = trained_adapter(tiny_base, tmp_path)
        policy = load_policy(str(tiny_base), adapter, "cpu", quantization_bit=bit)
        keys = {"model_name_or_path": str(tiny_base), "adapter_name_or_path": str(adapter), "quantization_bit": bit}
        model_args, _, method_args, _ = get_infer_args(keys | {"template": "qwen3_nothink", "infer_dtype": "float32"})
        theirs = load_model(load_tokenizer(model_args)["tokenizer"], model_args, method_args)
        ids = range(3, 60)
        assert (plain_logits(policy, ids) == plain_logits(theirs, ids)).all()
        with policy.disable_adapter(), theirs.disable_adapter():
            assert (plain_logits(policy, ids) == plain_logits(theirs, ids)).all()

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
    def test_value_rewards_are_the_scores_that_its_reward_stage_trains(self, batch, tiny_model, tmp_path, family):
        import torch
        from llamafactory.train.rm.trainer import PairwiseTrainer
        from safetensors.torch import load_file
        from trl import AutoModelForCausalLMWithValueHead

        triples, collated, tokenizer = batch
        assert tokenizer.decode(triples[0][1][-2:]) == "<|im_end|>\n", "the last token stands behind the end of turn"
        model, folder = tiny_model(family), save_head(tmp_path)
        trained = AutoModelForCausalLMWithValueHead.from_pretrained(model)
        assert not trained.load_state_dict(load_file(folder / rewards.VALUE_HEAD), strict=False).unexpected_keys
        with torch.no_grad():
            _, (_, chosen, rejected) = PairwiseTrainer.compute_loss(None, trained.eval(), collated, return_outputs=True)
        result = value_rewards(model, load_value_head(folder), triples)
        np.testing.assert_allclose(result, torch.stack([chosen, rejected], 1).numpy(), atol=1e-4)
