"""A synthetic arena: votes in the competition's own format whose true probabilities are known.

Each answer has a quality that can be read from its own text (marker phrases, fit to the topic, length). The
verdict is drawn from a Davidson model of the two qualities, so the best possible log loss is known:

    files = write_arena(Path("data/synthetic"), seed=1, train_rows=4000, test_rows=1000)
    files.truth     # id,winner_model_a,winner_model_b,winner_tie: never part of the training file
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from common.errors import ArenaError
from common.files import atomic_file, csv_line

TRAIN_COLUMNS = ("id", "model_a", "model_b", "prompt", "response_a", "response_b", *PROBABILITY_COLUMNS)
TEST_COLUMNS = ("id", "prompt", "response_a", "response_b")
TRUTH_COLUMNS = ("id", *PROBABILITY_COLUMNS)


@dataclass(frozen=True)
class ArenaTruth:
    """The Davidson model that the voters follow; a fitted link should recover these numbers."""

    tie: float = 1.8  # nu: at equal quality a tie has the odds nu : 1 against either answer
    position_bias: float = 0.3  # log odds of A over B between equal answers
    scale: float = 1.2  # log odds of A over B for each unit of quality
    length_weight: float = 0.4  # quality for each doubling of the number of words


TRUTH = ArenaTruth()

# What the battles look like; shares are probabilities, pairs are inclusive ranges.
_MULTI_TURN_SHARE = 0.13
_THIRD_TURN_SHARE = 0.2  # of the battles with more than one turn
_SMALL_TALK_SHARE = 0.05  # prompts from a short list, which many users send alike
_SENTENCES = (1, 2)  # plain sentences an answer and turn
_MARKERS = (1, 3)  # marker phrases an answer and turn
_FIT_SHARE = 0.12  # markers that are good on one kind of topic and bad on the other
_TALENT_WEIGHT = 1.5  # log odds of a good marker for each unit of talent
_MOOD = 1.0  # standard deviation of an answer's talent about that of its model

_TEXTS: dict[str, Any] = json.loads(Path(__file__).with_name("synthetic_texts.json").read_text(encoding="utf-8"))
# The contestants and their talent. As in the real competition the names stand in train.csv only.
MODELS: dict[str, float] = _TEXTS["models"]
# Phrases that raise or lower an answer's quality, wherever they stand and whatever the topic.
GOOD_MARKERS: dict[str, float] = _TEXTS["good_markers"]
BAD_MARKERS: dict[str, float] = _TEXTS["bad_markers"]
# Phrases whose worth depends on the topic: good on the kind of topic named first, as bad on the other kind.
FIT_MARKERS: dict[tuple[str, str], float] = {(kind, phrase): weight for kind, phrase, weight in _TEXTS["fit_markers"]}
_WEIGHTS = {
    kind: {**GOOD_MARKERS, **BAD_MARKERS}
    | {phrase: weight if kind == good_on else -weight for (good_on, phrase), weight in FIT_MARKERS.items()}
    for kind in ("practical", "playful")
}
_FIRST_ID = 100_000  # ids of one width, as in the competition


class Topic(NamedTuple):
    """What people ask about: `{subject}` is put into the forms and the plain sentences."""

    kind: str  # practical or playful
    subjects: list[str]
    forms: list[str]
    sentences: list[str]


TOPICS = [Topic(**topic) for topic in _TEXTS["topics"]]
SMALL_TALK = Topic(**_TEXTS["small_talk"])
DETAILS, OPENINGS, FOLLOW_UPS = (_TEXTS[name] for name in ("details", "openings", "follow_ups"))
_WORD = re.compile(r"\w+")


class ArenaFiles(NamedTuple):
    """The three files of a synthetic arena."""

    train: Path
    test: Path
    truth: Path


class ArenaBattle(NamedTuple):
    """A battle with what only the generator knows: the contestants and the three true probabilities."""

    battle: Battle
    models: tuple[str, str]
    probabilities: tuple[float, float, float]


def quality(kind: str, responses: Sequence[str]) -> float:
    """Return what an answer (one string a turn) is worth on a topic of this kind, read from its text alone.

    The sum of the weights of the marker phrases in it, plus `length_weight` for each doubling of its words.
    """
    text = " ".join(responses)
    total = sum(weight * text.count(phrase) for phrase, weight in _WEIGHTS[kind].items())
    return total + TRUTH.length_weight * math.log2(max(1, len(_WORD.findall(text))))


def true_probabilities(quality_a: float, quality_b: float, truth: ArenaTruth = TRUTH) -> tuple[float, float, float]:
    """Return the probabilities of A, B and a tie, in the order of `VERDICTS`.

    With the worths x_a and x_b of the two answers: A : B : tie = x_a : x_b : nu * sqrt(x_a * x_b), the model of
    R. R. Davidson, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments",
    Journal of the American Statistical Association 65 (1970), 317-328. Here log x = scale * quality, and half
    the position bias is added for A and taken from B (an order effect as in Davidson and Beaver, 1977).
    """
    advantage = truth.scale * (quality_a - quality_b) + truth.position_bias
    logits = (advantage / 2, -advantage / 2, math.log(truth.tie))
    odds = [math.exp(logit - max(logits)) for logit in logits]
    a, b, tie = (value / sum(odds) for value in odds)
    return a, b, tie


def synthetic_battles(rows: int, *, seed: int) -> Iterator[ArenaBattle]:
    """Yield `rows` battles, each with its models, its true probabilities and a verdict drawn from them."""
    rng = random.Random(seed)
    for number in range(rows):
        topic = SMALL_TALK if rng.random() < _SMALL_TALK_SHARE else rng.choice(TOPICS)
        subject = rng.choice(topic.subjects)
        turns = 1 if rng.random() >= _MULTI_TURN_SHARE else 3 if rng.random() < _THIRD_TURN_SHARE else 2
        prompts = (_first_prompt(rng, topic, subject), *(rng.choice(FOLLOW_UPS) for _ in range(turns - 1)))
        model_a, model_b = rng.sample(list(MODELS), 2)
        a, b = (_responses(rng, topic, subject, turns, MODELS[model]) for model in (model_a, model_b))
        chances = true_probabilities(quality(topic.kind, a), quality(topic.kind, b))
        battle = Battle(str(_FIRST_ID + number), prompts, a, b, rng.choices(VERDICTS, chances)[0])
        yield ArenaBattle(battle, (model_a, model_b), chances)


def write_arena(folder: Path, *, seed: int, train_rows: int, test_rows: int) -> ArenaFiles:
    """Write train.csv and test.csv in the competition's format, and truth.csv for the rows of both.

    Raises ArenaError where a number of rows is not positive. The same arguments give the same bytes.
    """
    wrong = [f"{name} is {rows}" for name, rows in (("train_rows", train_rows), ("test_rows", test_rows)) if rows < 1]
    if wrong:
        raise ArenaError("; ".join(wrong), where="synthetic arena", remedy="ask for at least one row of each")
    rows = list(synthetic_battles(train_rows + test_rows, seed=seed))
    files = ArenaFiles(folder / "train.csv", folder / "test.csv", folder / "truth.csv")
    _write_csv(files.train, TRAIN_COLUMNS, (_train_row(row) for row in rows[:train_rows]))
    _write_csv(files.test, TEST_COLUMNS, ([row.battle.id, *_cells(row.battle)] for row in rows[train_rows:]))
    _write_csv(files.truth, TRUTH_COLUMNS, ([row.battle.id, *map(repr, row.probabilities)] for row in rows))
    return files


def cell(turns: Sequence[str]) -> str:
    """Return the competition's cell for a list of turns: compact ASCII JSON with escaped slashes."""
    return json.dumps(list(turns), ensure_ascii=True, separators=(",", ":")).replace("/", "\\/")


def _first_prompt(rng: random.Random, topic: Topic, subject: str) -> str:
    form = rng.choice(topic.forms)
    if topic is SMALL_TALK:
        return form
    form = f"{form.format(subject=subject)} {rng.choice(DETAILS)}"
    return rng.choice(OPENINGS).format(form=form)


def _responses(rng: random.Random, topic: Topic, subject: str, turns: int, talent: float) -> tuple[str, ...]:
    """Return one text a turn: plain sentences and markers, which are good with a chance that the talent decides."""
    talent += rng.gauss(0, _MOOD)
    chance = 1 / (1 + math.exp(-_TALENT_WEIGHT * talent))
    return tuple(_response(rng, topic, subject, chance) for _ in range(turns))


def _response(rng: random.Random, topic: Topic, subject: str, chance: float) -> str:
    plain = rng.sample(topic.sentences, rng.randint(*_SENTENCES))
    parts = [sentence.format(subject=subject) for sentence in plain]
    for _ in range(rng.randint(*_MARKERS)):
        good = rng.random() < chance
        fits = [phrase for _, phrase in FIT_MARKERS if (_WEIGHTS[topic.kind][phrase] > 0) == good]
        parts.append(rng.choice(fits if rng.random() < _FIT_SHARE else list(GOOD_MARKERS if good else BAD_MARKERS)))
    rng.shuffle(parts)
    return " ".join(parts)


def _cells(battle: Battle) -> list[str]:
    return [cell(turns) for turns in battle.texts]


def _train_row(row: ArenaBattle) -> list[str]:
    won = ["1" if row.battle.verdict == verdict else "0" for verdict in VERDICTS]
    return [row.battle.id, *row.models, *_cells(row.battle), *won]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[list[str]]) -> None:
    with atomic_file(path) as file:
        file.writelines(map(csv_line, (columns, *rows)))
