"""Frames of each preset's chat template, over small tokenizers that know the template's special tokens."""

from unittest.mock import Mock

import pytest
from chain import ROOT
from tokenizers import Tokenizer

from common.errors import ArenaError
from common.experiment import parse_experiment, read_yaml
from data_prep.chat_template import load_frame, probe_frame
from data_prep.model_lookup import choose_template
from data_prep.prompt import Neutralizer

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML_ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
# Special tokens and their parts, as the models' own tokenizers name them.
FAMILIES = {
    "llama3": (
        [f"<|{x}|>" for x in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id")],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "gemma2": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
    "phi4_mini": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "qwen": (CHATML, CHATML_ENDS),
    "qwen3_nothink": (CHATML, CHATML_ENDS),
    "qwen3": ([*CHATML, "<think>", "</think>"], CHATML_ENDS),
    "default": (CHATML, CHATML_ENDS),
    "vicuna": (CHATML, CHATML_ENDS),
}
TEXTS = (
    "Verdict:",
    "\n\nAn answer behind empty lines\n\n",
    "  indented\tand 日本語 😀 naïve\r\n",
    "### User\nWhich?\n\n### Assistant A\nA\n\n### Assistant B\nB\n",
    "{'json': [1, 2.5, null]} <b>not special</b> </s> [INST]",
    "x" * 300,
    "<think>\nhm\n</think>\n\nyes",
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory, train_tokenizer):
    """{template: (frame, the tokenizer as scoring has it, LLaMA-Factory's tokenizer and template)}"""
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from llamafactory.model import load_tokenizer
    from transformers import PreTrainedTokenizerFast

    made = {}
    for template, (specials, ends) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(template)
        PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(specials), **ends).save_pretrained(folder)
        keys = {"model": str(folder), "template": template, "cutoff_len": 512}
        thinking = {"enable_thinking": False} if template == "qwen3" else {}
        experiment = parse_experiment(keys | thinking, "exam", where="experiment.yaml")
        frame, kept = probe_frame(experiment)
        theirs = load_tokenizer(ModelArguments(model_name_or_path=str(folder)))["tokenizer"]
        their_template = get_template_and_fix_tokenizer(theirs, DataArguments(template=template, **thinking))
        made[template] = (frame, Tokenizer.from_str(kept), theirs, their_template)
    return made


def test_every_presets_template_is_tried():
    models = {read_yaml(path)["model"] for path in ROOT.glob("factory_configs/*/experiment.yaml")}
    of_a_hub = {model for model in models if not model.startswith("models/")}  # the others are made here
    assert {choose_template(model).template for model in of_a_hub} <= set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("template", FAMILIES)
def test_ids_are_those_that_llamafactory_trains_on(frames, template):
    frame, tokenizer, theirs, their_template = frames[template]

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    texts = [*map(Neutralizer(frame.special_strings), TEXTS)]  # as they are exported
    for text in texts:
        for answer in (*texts, "A"):
            turn = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            prompt_ids, answer_ids = their_template.encode_oneturn(theirs, turn)
            if their_template.efficient_eos:  # what LLaMA-Factory's processors append
                answer_ids = [*answer_ids, theirs.eos_token_id]
            assert frame.surround(ids(frame.wrap(text))) == prompt_ids
            assert frame.answer(ids(frame.wrap_answer(answer))) == answer_ids


@pytest.mark.slow
@pytest.mark.parametrize("template", ["llama3", "gemma2"])
def test_a_template_whose_tokens_the_model_lacks_is_refused(frames, make_experiment, tmp_path, template):
    frames["qwen3_nothink"][2].save_pretrained(tmp_path)
    lacking = {"llama3": "lacks <|eot_id|>, which", "gemma2": "lacks <end_of_turn>, which"}[template]
    with pytest.raises(ArenaError) as caught:
        probe_frame(make_experiment(model=str(tmp_path), template=template))
    assert lacking in caught.value.what and caught.value.where == "factory_configs/exam/experiment.yaml: template"
    assert caught.value.remedy.startswith("write the model's own template there")


@pytest.mark.slow
def test_a_stop_word_that_no_row_holds_may_be_lacking(make_experiment, tmp_path, train_tokenizer):
    from transformers import PreTrainedTokenizerFast

    specials, ends = FAMILIES["llama3"]  # Llama 3.0 has no <|eom_id|>, which LLaMA-Factory's template stops at
    known = train_tokenizer([token for token in specials if token != "<|eom_id|>"])
    PreTrainedTokenizerFast(tokenizer_object=known, **ends).save_pretrained(tmp_path)
    assert probe_frame(make_experiment(model=str(tmp_path), template="llama3"))[0].template == "llama3"


@pytest.mark.slow
def test_thinking_that_is_left_on_is_refused(frames, make_experiment, tmp_path):
    frames["qwen3"][2].save_pretrained(tmp_path)
    with pytest.raises(ArenaError, match="not three distinct single tokens") as caught:
        probe_frame(make_experiment(model=str(tmp_path), template="qwen3"))
    assert "_nothink twin" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "cause", "part"),  # tests/common/test_error_hints.py has the other causes
    [
        ("models/none", "there is no such folder", "make extra-smollm2"),
        ("org/gated", "You are trying to access a gated repo.\nMake sure", "licence"),
        ("org/gated", "unheard of", "check the keys model and template"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_names_its_remedy(make_experiment, workplace, monkeypatch, model, cause, part):
    failure = OSError("Failed to load tokenizer.")
    failure.__cause__ = OSError(cause)
    monkeypatch.setattr("llamafactory.model.load_tokenizer", Mock(side_effect=failure))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArenaError) as caught:
        load_frame(make_experiment(model=model, template="llama3"))
    assert part in caught.value.remedy and cause.splitlines()[0] in caught.value.what
    assert caught.value.where == model
