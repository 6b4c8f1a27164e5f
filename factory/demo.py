"""The demo's own two things, drawn from one seed: a synthetic arena, and the embedded base model.

The base is a tiny Qwen3 with a tokenizer of its own, as a Hugging Face folder: drawn at random, then taught to compare
two answers by made-up values of their words. What people prefer it never saw: that was learned by the adapter, and by
the embeddings and the head that are trained with it. Being an ordinary folder, it is trained and scored like any model.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from common.battle import Battle
from common.errors import ArenaError
from common.experiment import Experiment
from common.files import atomic_folder, read_json, write_json
from common.llamafactory_schema import templates
from common.progress import Show
from data_prep.export_folder import check_overwrite
from data_prep.export_reader import earlier_manifest
from data_prep.prompt import JudgePrompt
from data_prep.readers import VoteReader
from data_prep.synthetic import ArenaFiles, ArenaTruth, true_probabilities, write_arena
from factory.recipes import check_first_values
from factory.stage_context import StageContext
from factory.status import readable_experiments, running_stages

# The folder that stands for the embedded base wherever an experiment names it as its model.
EMBEDDED_BASE = "models/arena-tiny"
ARENA = Path("data") / "synthetic_arena"
DEFAULT_SEED = 1
TRAIN_ROWS, TEST_ROWS = 12_000, 500
_FILES = ("train.csv", "test.csv", "truth.csv", "drawn.json")
SPECIAL_TOKENS = END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def refuse_other_votes(experiment: Experiment) -> None:
    """Raise ArenaError where the experiment's export is of other votes than an arena's: the demo would replace it."""
    manifest = earlier_manifest(experiment.data_folder)
    votes = Path(manifest["sources"]["train"]["file"]) if manifest else ARENA
    if not votes.is_relative_to(ARENA):
        raise ArenaError(
            f"holds an export of {votes}, which the demo would replace by its arena",
            where=str(experiment.data_folder),
            remedy="python run.py demo --fresh does so, and puts the SFT results on these votes aside",
        )


def demo_arena(experiment: Experiment, seed: int, show: Show) -> ArenaFiles:
    """Return the arena of this seed, drawn together with its base where either of them is not there.

    Raises ArenaError, before anything is replaced, where files that are not the demo's would be lost or a run reads the
    base.
    """
    check_overwrite(experiment.data_folder)
    if _read(ARENA / "drawn.json") != _drawn(seed) or not Path(experiment.model).is_dir():
        if experiment.model != EMBEDDED_BASE:
            raise ArenaError(
                f"names the model {experiment.model}, and the demo would build its own tiny base in that place",
                where=str(experiment.folder / "experiment.yaml"),
                remedy=f"write model: {EMBEDDED_BASE}, and make another experiment for your model: "
                "run.py new EXP --model",
            )
        _draw(experiment, seed, show)
    return ArenaFiles(ARENA / "train.csv", ARENA / "test.csv", ARENA / "truth.csv")


def trained_on_another(experiment: Experiment) -> bool:
    """Tell whether the judge, finished or begun, learned from another arena than is prepared now.

    What it began with says so, not what this call drew: an earlier call may have been interrupted after that.
    """
    return bool(StageContext(experiment, "sft").outdated_files(("train",)))


def ensure_embedded_base(experiment: Experiment, show: Show) -> None:
    """Build the embedded base if the experiment names it and it is not there yet: that of the arena, if one is."""
    if experiment.model != EMBEDDED_BASE or Path(experiment.model).is_dir():
        return
    _draw(experiment, (_read(ARENA / "drawn.json") or _drawn(DEFAULT_SEED))["seed"], show)


def _draw(experiment: Experiment, seed: int, show: Show) -> None:
    """Write the arena of a seed, then its base; raises ArenaError where other files or a running stage need the places.

    drawn.json is complete last: a call that was interrupted before that draws both again.
    """
    for each in readable_experiments()[0]:
        if each.model == EMBEDDED_BASE and (running := running_stages(each)):
            raise ArenaError(
                f"{' and '.join(running)} of {each.name} is at work on this base, which would be replaced",
                where=EMBEDDED_BASE,
                remedy="wait for it or end it",
            )
    prompt = _checked_prompt(experiment)
    drawn, own = _drawn(seed), _FILES if (ARENA / "drawn.json").is_file() else ()
    check_overwrite(ARENA, own=own.__contains__, maker="demo")
    with atomic_folder(ARENA) as folder:
        write_arena(folder, seed=seed, train_rows=TRAIN_ROWS, test_rows=TEST_ROWS)
        write_json(folder / "drawn.json", {**drawn, "base": "is being built"})
    show.note(f"drew the demo's {TRAIN_ROWS:,} battles and {TEST_ROWS} to submit (seed {seed}): {ARENA}")
    with show.line("embedded base") as line:
        line.update("training a tokenizer, drawing random weights")
        battles = [battle for _, battle in VoteReader(ARENA / "train.csv", labelled=True)]
        texts, labels = [prompt.message(battle) for battle in battles], experiment.labels.in_order()
        chances = comparisons(battles[:LESSONS], seed=seed)
        lessons = [(text, dict(zip(labels, each, strict=True))) for text, each in zip(texts, chances, strict=False)]

        def told(share: float) -> None:
            line.update("learning to compare answers by made-up values", share)

        # the tokenizer learns from whole judge prompts, so that their fixed parts take few tokens
        build_base_model(Path(experiment.model), texts, lessons, seed=seed, progress=told)
    show.note(f"built a tiny base model that can compare, and knows no vote (seed {seed}): {experiment.model}")
    write_json(ARENA / "drawn.json", drawn)


def _checked_prompt(experiment: Experiment) -> JudgePrompt:
    """Return the judge prompt; raises ArenaError for a key that the export would refuse once the base is built."""
    check_first_values(experiment)
    template, where = templates().get(experiment.template), f"{experiment.folder / 'experiment.yaml'}"
    if template is None or not set(template.tokens) <= set(SPECIAL_TOKENS):
        what = f"{experiment.template} is no chat template of the embedded base"
        raise ArenaError(what, where=f"{where}: template", remedy="write qwen3_nothink")
    if not all(len(label) == 1 and label.isascii() for label in experiment.labels.in_order()):
        what = "the embedded base has no token for a label of several characters"
        raise ArenaError(what, where=f"{where}: labels", remedy="write single letters, such as A, B, C")
    return JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)


def _drawn(seed: int) -> dict[str, int]:
    return {"seed": seed, "train_rows": TRAIN_ROWS, "test_rows": TEST_ROWS}


def _read(path: Path) -> dict | None:
    return read_json(path) if path.is_file() else None


@dataclass(frozen=True)
class BaseModelSize:
    """The shape of the network; the vocabulary is an upper bound, a small corpus fills less."""

    vocabulary: int = 2048
    hidden: int = 64
    layers: int = 2
    heads: int = 8
    feed_forward: int = 128
    positions: int = 4096


SIZE = BaseModelSize()
# Where the tokenizer splits a text; no other tokenizer does, llama.cpp's neither.
SENTENCE_ENDS = r"(?<=[.!?:]) |\n+"
# How a base learns to compare; more of any of them was not better.
LESSONS, _ROUNDS, _BATCH, _RATE = 5400, 4, 16, 3e-3
_LESSON = ArenaTruth(position_bias=0.0, scale=1.0)


def comparisons(battles: Sequence[Battle], *, seed: int) -> list[tuple[float, float, float]]:
    """Return chances of A, B and a tie by made-up values of words, which the seed draws and no voter knows.

    An answer is worth the sum of its words, in units in which the leads have a standard deviation of 3.
    """
    rng = random.Random(seed)
    value: dict[str, float] = defaultdict(lambda: rng.gauss(0, 1))
    answers = [(" ".join(each.responses_a), " ".join(each.responses_b)) for each in battles]
    worths = np.array([[sum(value[word] for word in text.split()) for text in pair] for pair in answers])
    unit = float(np.std(worths[:, 0] - worths[:, 1])) or 1.0
    return [true_probabilities(3 * a / unit, 3 * b / unit, _LESSON) for a, b in worths]


def build_base_model(
    folder: Path,
    texts: Iterable[str],
    lessons: Sequence[tuple[str, dict[str, float]]] = (),
    *,
    seed: int,
    size: BaseModelSize = SIZE,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Train a byte-level BPE tokenizer on `texts`, draw a random model by `seed`, teach it, and save both in `folder`.

    A lesson is a message with the chance of each one-letter answer. The same arguments give the same bytes. An earlier
    folder is replaced as a whole. Raises ArenaError where `texts` holds no text.
    """
    from transformers.utils import logging

    tokenizer = _train_tokenizer(texts, size)
    model = _random_model(tokenizer, seed, size)
    if lessons:
        _teach(model, tokenizer, lessons, seed, progress)
    logging.disable_progress_bar()  # of two megabytes
    with atomic_folder(folder) as fresh:
        tokenizer.save_pretrained(fresh)
        model.save_pretrained(fresh)


def _teach(
    model: Any,
    tokenizer: Any,
    lessons: Sequence[tuple[str, dict[str, float]]],
    seed: int,
    progress: Callable[[float], None],
) -> None:
    """Train the whole network to give the answers of the lessons, framed as LLaMA-Factory's qwen3_nothink does."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    framed = [f"{TURN_START}user\n{message}{TURN_END}\n{TURN_START}assistant\n" for message, _ in lessons]
    rows = tokenizer(framed, add_special_tokens=False)["input_ids"]
    answers = tokenizer.convert_tokens_to_ids(list(lessons[0][1]))
    chances = torch.tensor([list(each.values()) for _, each in lessons])
    rng, batches = random.Random(seed), []
    for _ in range(_ROUNDS):
        order = sorted(rng.sample(range(len(rows)), len(rows)), key=lambda row: len(rows[row]))
        batches += rng.sample(alike := [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)], len(alike))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one would only wait for a network this small
    for number, batch in enumerate(batches):
        inputs = tokenizer.pad({"input_ids": [rows[row] for row in batch]}, return_tensors="pt")
        last = inputs["attention_mask"].sum(1) - 1
        states = model.model(**inputs).last_hidden_state[torch.arange(len(batch)), last]
        logits = model.lm_head(states).log_softmax(1)[:, answers]
        optimizer.zero_grad()
        (-(chances[batch] * logits).sum(1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress((number + 1) / len(batches))
    torch.set_num_threads(threads)


def _train_tokenizer(texts: Iterable[str], size: BaseModelSize) -> Any:
    from transformers import PreTrainedTokenizerFast

    corpus = [text for text in texts if text.strip()]
    if not corpus:
        raise ArenaError("no text to train a tokenizer on", where="base model", remedy="give it the arena's texts")
    tokenizer = Tokenizer(models.BPE())
    # A token may span the words of a sentence (as in SuperBPE, arXiv:2503.13423), so that a prompt takes half as many.
    sentences = pre_tokenizers.Split(Regex(SENTENCE_ENDS), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([sentences, plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any byte is a token: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=size.positions,
        clean_up_tokenization_spaces=False,
    )


def _random_model(tokenizer: Any, seed: int, size: BaseModelSize) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=size.positions,
        # Without these it takes several times as many steps to learn what a comparison is.
        initializer_range=size.hidden**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,  # embeddings and head are trained apart and merged apart
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
