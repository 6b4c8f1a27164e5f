"""Rewards are as the trainers define them, the reference is the base, and nothing fails silently."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import ArenaError
from scoring.model_loading import TrainedAdapter
from scoring.packed_model import PackedModel
from scoring.rewards import VALUE_HEAD, Triple, implicit_rewards, load_value_head, value_rewards
from tests.scoring.fakes import token_rows

BETA = 0.3
OPTIONS = {"beta": BETA, "length_normalised": False, "reference": True}
ALONE = {"beta": 1.0, "length_normalised": False, "reference": False}
TRIPLES: list[Triple] = list(zip(token_rows(9, 11, 30), token_rows(9, 12, 50), token_rows(9, 13, 50), strict=True))
LENGTHS = np.array([[len(a), len(b)] for _, a, b in TRIPLES])


@pytest.fixture(scope="session")
def plain_sum(plain_logits):
    """A function that returns an answer's log-probability by a loop over one row's full logits."""

    def log_probability(model, prompt, answer) -> float:
        logits = plain_logits(model, [*prompt, *answer]).double().log_softmax(-1)
        return sum(float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(answer))

    return log_probability


@pytest.fixture(scope="session")
def policy(base, adapter):
    """The loaded policy; tests leave it as it is."""
    return TrainedAdapter(adapter, str(base)).load("cpu")


@pytest.fixture(scope="session")
def parts(base, adapter, plain_sum) -> np.ndarray:
    """(policy, reference) log-probabilities of TRIPLES' answers from two separately loaded models, [2, 9, 2]."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
    return np.array([[[plain_sum(m, p, x) for x in (a, b)] for p, a, b in TRIPLES] for m in (merged, reference)])


def save_head(folder: Path, *, size: int = 32, **replaced) -> Path:
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(6)
    tensors = {"v_head.summary.weight": torch.randn(1, size, generator=draw)}
    tensors["v_head.summary.bias"] = torch.randn(1, generator=draw)
    folder.mkdir(exist_ok=True)
    save_file(tensors | replaced, folder / VALUE_HEAD)
    return folder


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_implicit_rewards_are_beta_times_the_log_ratio_of_two_separate_models(policy, parts, budget):
    result = implicit_rewards(policy, TRIPLES, token_budget=budget, **OPTIONS)
    assert result.dtype == np.float64 and parts.std() > 10
    np.testing.assert_allclose(result, BETA * (parts[0] - parts[1]), atol=1e-4, rtol=0)
    normalised = implicit_rewards(policy, TRIPLES, token_budget=budget, **OPTIONS | {"length_normalised": True})
    np.testing.assert_allclose(normalised, BETA * (parts[0] - parts[1]) / LENGTHS, atol=1e-5, rtol=0)
    alone = implicit_rewards(policy, TRIPLES, beta=2.0, length_normalised=True, reference=False)
    np.testing.assert_allclose(alone, 2.0 * parts[0] / LENGTHS, atol=1e-4, rtol=0)


def test_the_model_s_own_code_behind_the_head_counts(family_model, plain_sum):
    expected = [[plain_sum(family_model, p, x) for x in (a, b)] for p, a, b in TRIPLES]
    np.testing.assert_allclose(implicit_rewards(family_model, TRIPLES, **ALONE), expected, atol=1e-3, rtol=1e-5)


def test_equal_answers_have_the_very_same_reward_and_are_read_once(policy):
    (prompt, a, b), sizes = TRIPLES[0], []
    hook = policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    packed = PackedModel(policy)
    sizes.clear()
    result = implicit_rewards(packed, [(prompt, a, a), (prompt, b, a), (prompt, a, b)], token_budget=1, **ALONE)
    hook.remove()
    assert result[0, 0] == result[0, 1] == result[1, 1] == result[2, 0] and result[1, 0] == result[2, 1]
    assert sizes == [len(prompt) - 1 + len(a) + len(b)], "the prompt is read once, and no last token"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_names_its_row(tiny_model, tmp_path, value):
    model, head = tiny_model(seed=2), load_value_head(save_head(tmp_path))
    model.get_input_embeddings().weight.data[599] = value
    triples = [([1, 2], [3], [4]), ([1, 2], [3, 5, 4], [599, 5]), ([599], [3], [4])]
    for score in (lambda: implicit_rewards(model, triples, **ALONE), lambda: value_rewards(model, head, triples)):
        with pytest.raises(ArenaError, match="no finite reward for 2") as caught:
            score()
        assert caught.value.where == "row 1" and "loss curve" in caught.value.remedy


def test_a_triple_with_an_empty_part_names_its_row(policy):
    for triple in (([], [2], [3]), ([1], [], [3]), ([1], [2], [])):
        with pytest.raises(ArenaError, match="row 1: the prompt or an answer has no tokens"):
            implicit_rewards(policy, [TRIPLES[0], triple], **OPTIONS)
    assert implicit_rewards(policy, [], **OPTIONS).shape == (0, 2)


@pytest.mark.parametrize("bit", [4, 8])
def test_quantised_the_reference_is_the_quantised_base(base, adapter, bit, plain_sum):
    policy = TrainedAdapter(adapter, str(base), quantization_bit=bit).load("cpu")
    kinds = {type(module).__name__ for module in policy.modules()}
    assert ("Linear4bit" if bit == 4 else "Linear8bitLt") in kinds
    triples = TRIPLES[:2]
    result = implicit_rewards(policy, triples, **OPTIONS)
    again = implicit_rewards(policy, triples, **OPTIONS)
    np.testing.assert_array_equal(result, again)  # the first pass has not changed the weights
    expected = np.array([[plain_sum(policy, p, x) for x in (a, b)] for p, a, b in triples])
    with policy.disable_adapter():
        expected -= [[plain_sum(policy, p, x) for x in (a, b)] for p, a, b in triples]
    np.testing.assert_allclose(result, BETA * expected, atol=1e-1 if bit == 8 else 1e-4)  # int8 sees a whole batch


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_value_rewards_are_the_head_on_the_last_token_s_final_state(family_model, tmp_path, budget):
    import torch

    head, captured, expected = load_value_head(save_head(tmp_path)), [], []
    handle = family_model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: captured.append(inputs[0][0, -1].double())
    )
    for prompt, *answers in TRIPLES:
        for answer in answers:
            with torch.no_grad():
                family_model(input_ids=torch.tensor([[*prompt, *answer]]))
            expected.append(float(captured.pop() @ head.weight + head.bias))
    handle.remove()
    assert np.std(expected) > 1
    result = value_rewards(family_model, head, TRIPLES, token_budget=budget)
    np.testing.assert_allclose(result.ravel(), expected, atol=1e-4, rtol=0)


def test_a_head_that_is_missing_damaged_or_of_another_model_is_refused(tmp_path, tiny_model):
    import torch

    with pytest.raises(ArenaError, match=r"value head is missing(.|\n)*stage: rm"):
        load_value_head(tmp_path)
    (tmp_path / VALUE_HEAD).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00no header")
    with pytest.raises(ArenaError, match="is damaged"):
        load_value_head(tmp_path)
    with pytest.raises(ArenaError, match="takes 48 numbers, the model's hidden states have 32"):
        value_rewards(tiny_model(), load_value_head(save_head(tmp_path, size=48)), TRIPLES)
    for name, shape, value in (("weight", (2, 32), 0), ("weight", (32,), 0), ("bias", (2,), 0), ("bias", (1,), np.nan)):
        save_head(tmp_path, **{f"v_head.summary.{name}": torch.full(shape, float(value))})
        with pytest.raises(ArenaError, match="no finite linear layer with one output"):
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
        collate = PairwiseDataCollatorWithPadding(template=template, tokenizer=tokenizer, pad_to_multiple_of=8)
        return [self._triple(feature) for feature in features], collate(features), tokenizer

    @staticmethod
    def _triple(feature) -> Triple:
        answers = [[i for i in feature[f"{side}_labels"] if i != -100] for side in ("chosen", "rejected")]
        prompt = feature["chosen_input_ids"][: -len(answers[0])]
        return prompt, *answers

    def test_implicit_rewards_are_those_that_its_dpo_trainer_logs(self, batch, policy):
        from types import SimpleNamespace

        import torch
        from llamafactory.train.dpo.trainer import CustomDPOTrainer

        triples, collated, _ = batch
        trainer = SimpleNamespace(ref_model=None, ld_alpha=None, loss_type="sigmoid")
        trainer.finetuning_args = SimpleNamespace(use_ref_model=True)
        trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
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
        assert not trained.load_state_dict(load_file(folder / VALUE_HEAD), strict=False).unexpected_keys
        with torch.no_grad():
            _, (_, chosen, rejected) = PairwiseTrainer.compute_loss(None, trained.eval(), collated, return_outputs=True)
        result = value_rewards(model, load_value_head(folder), triples)
        np.testing.assert_allclose(result, torch.stack([chosen, rejected], 1).numpy(), atol=1e-4)
