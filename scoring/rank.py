"""Ratings of the models behind the battles: Bradley and Terry's, from votes, from a judge's opinions, or from both.

rows = battles_with_names(Path("votes.csv"))   # one row a battle: models, outcome for A, lengths, prompt group
rate(rows, others, style=True).table           # model, rating, low, high, battles

A tie counts as half a win for each side. Few votes and many opinions are joined so that the judge's error is taken off
(prediction-powered inference): the ratings stay those that people would give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from common.console import name_of
from common.errors import ArenaError, UsageError
from common.files import atomic_file, csv_line
from data_prep.audit import row_statistics
from data_prep.readers import VoteReader
from factory.stage_context import StageContext
from scoring.predictions import read_table, scored_file
from scoring.report.page import write_rank_page

# LMArena's scale: 400 points are odds of ten to one, and the mean of the models is 1000.
POINTS, MEAN = 400 / math.log(10), 1000.0
_Z = 1.959963984540054  # of a two-sided 95% interval
_OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5}
_STEPS, _ENOUGH = 100, 1e-10
_MOST_MODELS, _LONGEST = 1000, 100  # memory grows with rows x models; characters of a name in the terminal
_TRUST = np.linspace(0, 1, 21)  # weights of the judge's opinions that are tried


@dataclass(frozen=True)
class Ranked:
    """Ratings in points with 95% intervals, best first, and how they were made.

    `table`: model, rating, low, high, battles. `length_effect`: what a longer answer adds, in points a standard
    deviation of the relative difference of lengths, with its interval; None without style control. `trust`: the weight
    of the judge's opinions. `left_out`: models that no chain of wins and losses connects with the others.
    """

    table: pd.DataFrame
    votes: int
    judged: int
    length_effect: tuple[float, float, float] | None
    trust: float | None
    left_out: tuple[str, ...]


def rank(
    context: StageContext | None,
    *,
    votes: Path | None,
    judged: Path | None,
    style: bool,
    columns: Mapping[str, str],
    output: Path,
) -> Ranked:
    """Rate the models of two tables and write the result; `context` is the stage that scored `judged`.

    Raises UsageError without a table, ArenaError where `judged` was not scored or a table has no model names.
    """
    if not (votes or judged):
        raise UsageError("there is nothing to rate from", remedy="give --votes, --judged or both")
    opinions = {}
    if judged:
        opinions = {
            "votes": context.folder / "probabilities_valid.csv",
            "judged": scored_file(context.folder, judged),
        }
        if not opinions["judged"].is_file():
            again = f"python run.py score -e {context.experiment.name} --stage {context.name} --input {judged}"
            raise ArenaError("was not scored yet", where=str(judged), remedy=again)
    parts = [
        path and battles_with_names(path, columns, opinions.get(name))
        for name, path in (("votes", votes), ("judged", judged))
    ]
    ranked = rate(*parts, style=style)
    write_ratings(ranked, output)
    return ranked


def battles_with_names(
    path: Path, columns: Mapping[str, str] | None = None, probabilities: Path | None = None
) -> pd.DataFrame:
    """Return one row a battle of a table: id, a, b (models), outcome (NaN without a verdict), length, group, opinion.

    `length` is the relative difference of the answers' characters; `opinion` what a judge says of the outcome, from its
    table of `probabilities`, NaN where it says nothing. Raises ArenaError for a table without model names.
    """
    opinions: dict[str, float] = {}
    if probabilities:
        ids, values = read_table(probabilities)
        opinions = dict(zip(ids, values[:, 0] + values[:, 2] / 2, strict=True))
    rows = []
    for _, battle in VoteReader(path, labelled=False, columns=columns):
        if battle.model_a and battle.model_b and battle.model_a != battle.model_b:
            facts = row_statistics(battle)
            a, b = facts["chars_a"], facts["chars_b"]
            shares = battle.shares
            outcome = shares[0] + shares[2] / 2 if shares else _OUTCOMES.get(battle.verdict, math.nan)
            length = (a - b) / max(a + b, 1)
            opinion = opinions.get(battle.id, math.nan)
            rows.append((battle.id, battle.model_a, battle.model_b, outcome, length, facts["group"], opinion))
    if not rows:
        raise ArenaError(
            "no row names two different models",
            where=str(path),
            remedy="give a table with the columns model_a and model_b, or name yours: --columns model_a=left_model,…",
        )
    return pd.DataFrame(rows, columns=["id", "a", "b", "outcome", "length", "group", "opinion"])


def rate(votes: pd.DataFrame | None, judged: pd.DataFrame | None = None, *, style: bool = False) -> Ranked:
    """Return the ratings from battles with votes, with a judge's opinions, or both.

    Raises ArenaError where both are given and no vote has an opinion, by which the judge's error could be measured.
    Sources: Bradley and Terry 1952; the sandwich of Huber 1967, by prompt group; style control as LMArena's; the joint
    estimate as Angelopoulos, Duchi, Zrnic 2023 ("PPI++", equation 3, its weight chosen by the intervals' width).
    """
    people = votes[votes["outcome"].notna()] if votes is not None else None
    others = judged[judged["opinion"].notna()] if judged is not None else None
    both = [part for part in (people, others) if part is not None and len(part)]
    if not both:
        raise ArenaError("no battle has a vote or an opinion", where="rank", remedy="give votes, or score the battles")
    names, left_out = _connected(pd.concat(both))
    parts = [part[part["a"].isin(names) & part["b"].isin(names)] for part in both]
    everything = pd.concat(parts)
    scale = float(everything["length"].std() or 1.0) if style else None
    design = [_design(part, names, scale) for part in parts]
    trust = None
    if len(both) == 1:
        target = "outcome" if people is not None and len(people) else "opinion"
        rows = [(design[0], parts[0][target].to_numpy(), np.full(len(parts[0]), 1 / len(parts[0])))]
        found, spread = _solve(rows, parts[0]["group"], len(names))
    else:
        trust, found, spread = _joined(parts, design, len(names))
    points, wide = found[: len(names)] * POINTS + MEAN, np.sqrt(np.diag(spread)) * _Z * POINTS
    counts = pd.concat([everything["a"], everything["b"]]).value_counts()
    table = pd.DataFrame({"model": names, "rating": points, "low": points - wide[: len(names)]})
    table = table.assign(high=points + wide[: len(names)], battles=[int(counts[name]) for name in names])
    effect = None
    if style:
        middle, width = float(found[-1] * POINTS), float(wide[-1])
        effect = (middle, middle - width, middle + width)
    table = table.sort_values("rating", ascending=False, ignore_index=True)
    counted = {"votes": len(people) if people is not None else 0, "judged": len(others) if others is not None else 0}
    return Ranked(table, **counted, length_effect=effect, trust=trust, left_out=left_out)


def _joined(parts: list[pd.DataFrame], design: list[np.ndarray], models: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the weight of the opinions, the coefficients and their covariance, from votes and opinions together."""
    people, others = parts
    known = people["opinion"].notna().to_numpy()
    if known.sum() < 2:
        raise ArenaError(
            "no vote has the judge's opinion, so the judge's error cannot be measured",
            where="--judged",
            remedy="score votes that the judge was not trained on, such as its validation fold",
        )
    groups = pd.concat([people["group"], others["group"]])
    inside = np.concatenate([known, np.zeros(len(others), bool)])
    outside = np.concatenate([np.zeros(len(people), bool), np.ones(len(others), bool)])
    every = np.concatenate(design)
    outcome = np.concatenate([people["outcome"].to_numpy(), np.zeros(len(others))])
    opinion = np.nan_to_num(np.concatenate([people["opinion"].to_numpy(), others["opinion"].to_numpy()]))
    best = None
    for trust in _TRUST:
        rows = [
            (every, outcome, ~outside / len(people)),
            (every, opinion, trust * (outside / len(others) - inside / known.sum())),
        ]
        found, spread = _solve(rows, groups, models)
        if best is None or np.trace(spread) < np.trace(best[2]):
            best = float(trust), found, spread
    return best


def _design(rows: pd.DataFrame, names: Sequence[str], scale: float | None) -> np.ndarray:
    """Return [rows, models (+ 1 for the length)]: +1 for the model of A, -1 for that of B."""
    place = {name: at for at, name in enumerate(names)}
    design = np.zeros((len(rows), len(names) + (scale is not None)))
    at = np.arange(len(rows))
    design[at, rows["a"].map(place)] = 1
    design[at, rows["b"].map(place)] = -1
    if scale is not None:
        design[:, -1] = rows["length"] / scale
    return design


def _solve(
    terms: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], groups: pd.Series, models: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the root of the sum of w x (sigmoid(x θ) - t) over all rows of all terms, and its covariance.

    Each term: design [rows, k], targets [rows], weights [rows] (negative ones allowed); rows at the same place of all
    terms are of one battle. Only differences of the ratings, the first `models` coefficients, matter: their mean is 0.
    """
    size = terms[0][0].shape[1]
    found = np.zeros(size)
    for _ in range(_STEPS):
        slope, force = np.zeros((size, size)), np.zeros(size)
        slope[:models, :models] = 1 / models  # fixes the mean, along which nothing else acts
        for design, target, weight in terms:
            chance = expit(design @ found)
            force += design.T @ (weight * (chance - target))
            slope += (design * (weight * chance * (1 - chance))[:, None]).T @ design
        step = np.linalg.solve(slope, force)
        found -= np.clip(step, -2, 2)
        if np.abs(step).max() < _ENOUGH:
            break
    each = sum(design * (weight * (expit(design @ found) - target))[:, None] for design, target, weight in terms)
    codes, names = pd.factorize(groups)
    by_group = np.zeros((len(names), size))
    np.add.at(by_group, codes, each)
    inverse = np.linalg.inv(slope)
    return found, inverse @ (by_group.T @ by_group) @ inverse


def _connected(rows: pd.DataFrame) -> tuple[list[str], tuple[str, ...]]:
    """Return the models whose ratings exist, and the others.

    They exist where each model can be reached from each other one by a chain of wins or ties (Ford 1957).
    """
    score = rows["outcome"].fillna(rows["opinion"]).to_numpy()
    codes, names = pd.factorize(pd.concat([rows["a"], rows["b"]]))
    if len(names) > _MOST_MODELS:
        what, remedy = f"{len(names):,} models, more than {_MOST_MODELS:,}", "check the columns model_a and model_b"
        raise ArenaError(what, where="rank", remedy=remedy)
    a, b = codes[: len(rows)], codes[len(rows) :]
    wins = [(a[score > 0], b[score > 0]), (b[score < 1], a[score < 1])]
    winner, loser = (np.concatenate([pair[side] for pair in wins]) for side in (0, 1))
    graph = coo_array((np.ones(len(winner)), (winner, loser)), shape=(len(names),) * 2)
    _, component = connected_components(graph, connection="strong")
    largest = np.bincount(component).argmax()
    kept = sorted(name for name, own in zip(names, component, strict=True) if own == largest)
    if len(kept) < 2:
        raise ArenaError(
            "no two models have both won against each other, directly or through others",
            where="rank",
            remedy="give more battles",
        )
    return kept, tuple(sorted(set(names) - set(kept)))


def write_ratings(ranked: Ranked, folder: Path) -> list[Path]:
    """Write ratings.csv and ratings.html into a folder; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "ratings.csv", folder / "ratings.html"
    with atomic_file(table) as file:
        file.write(csv_line(ranked.table.columns))
        for row in ranked.table.itertuples(index=False):
            points = (f"{value:.1f}" for value in (row.rating, row.low, row.high))
            file.write(csv_line([row.model, *points, row.battles]))
    write_rank_page(ranked, page)
    return [table, page]


def print_ratings(console: Console, ranked: Ranked, folder: Path) -> None:
    """Print the ratings as a table, and where they were written."""
    table = Table(title="Ratings (400 points: odds of ten to one)", title_justify="left")
    for name in ("model", "rating", "95% interval", "battles"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in ranked.table.itertuples(index=False):
        ends = f"{row.low:,.0f} to {row.high:,.0f}"
        table.add_row(_shown(row.model), f"{row.rating:,.0f}", ends, f"{row.battles:,}")
    console.print(table)
    if ranked.length_effect:
        effect, low, high = ranked.length_effect
        console.print(f"a longer answer: {effect:+,.0f} points a standard deviation ({low:+,.0f} to {high:+,.0f})")
    if ranked.trust is not None:
        console.print(f"joined with weight {ranked.trust:.2f} for the judge's opinions, its error taken off")
    if ranked.left_out:
        console.print(f"left out, not connected by wins and losses: {', '.join(map(_shown, ranked.left_out))}")
    console.print(f"written: {folder / 'ratings.csv'}, {folder / 'ratings.html'}", soft_wrap=True)


def _shown(name: str) -> str:
    return name if len(name) <= _LONGEST else name_of(name)
