"""Rewards: what a preference model gives each of two answers, before any link makes probabilities of them.

triples [(prompt_ids, answer_a_ids, answer_b_ids), …]  ->  rewards [battles, 2]

A DPO policy's reward is implicit, beta * (log pi - log pi_ref) of the answer's tokens; a reward model's comes from
its value head. Answers end as they were trained, with their end-of-turn tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ArenaError
from factory.merge import VALUE_HEAD
from scoring.model_loading import BROKEN_WEIGHTS
from scoring.packed_model import Pack, PackedModel, Piece, run_batches

if TYPE_CHECKING:
    import torch

Triple = tuple[Sequence[int], Sequence[int], Sequence[int]]
Name = Callable[[int], str]

# The most logits (positions x vocabulary) that exist at a time: 256 MiB in fp32, and two such tensors beside it.
LOGITS = 2**26
# The most answers of one prompt in one pass.
_TOGETHER = 4


@dataclass(frozen=True)
class ValueHead:
    """The linear layer that makes a score of a hidden state: `weight` [hidden size] and `bias`, both float64."""

    weight: torch.Tensor
    bias: float


def implicit_rewards(
    model: Any,
    triples: Sequence[Triple],
    *,
    beta: float,
    length_normalised: bool,
    reference: bool,
    name: Name = "row {}".format,
    **options: Any,
) -> np.ndarray:
    """Return beta * (log pi - log pi_ref) of both answers, [len(triples), 2] float64.

    The log-probabilities are summed over the answer's tokens, or averaged with `length_normalised`. With `reference`
    `model` has an adapter (TrainedAdapter.load), which is switched off for pi_ref; without it log pi_ref is left out,
    which with `length_normalised` is what the losses orpo and simpo train. `options` are those of run_batches. Raises
    ArenaError that names the row where a triple has an empty part or a reward is not finite. Source: Rafailov et al.
    2023, equation 5 and section 4.
    """
    import torch

    packed = PackedModel.of(model)

    def score(answers: list[Sequence[int]], pack: Pack) -> np.ndarray:
        lengths = torch.tensor([len(answer) for answer in answers])
        targets = torch.tensor([token for answer in answers for token in answer], device=packed.device)
        owners = torch.repeat_interleave(lengths).to(packed.device)
        sums = _log_probabilities(packed, pack, targets, owners)
        if reference:
            with packed.model.disable_adapter():
                sums = sums - _log_probabilities(packed, pack, targets, owners)
        found = sums.cpu().numpy()
        return beta * (found / lengths.numpy() if length_normalised else found)

    def pieces(prompt: Sequence[int], answers: list[Sequence[int]]) -> list[Piece]:
        # A token's distribution stands at the position before it, so an answer begins with the prompt's last token.
        *before, last = prompt
        shared = [Piece(before, wanted=0)] if before else []
        prefix = 0 if before else None
        return shared + [Piece([last, *answer[:-1]], wanted=len(answer), prefix=prefix) for answer in answers]

    return _rewards(packed, triples, pieces, score, name, **options)


def value_rewards(
    model: Any, head: ValueHead, triples: Sequence[Triple], *, name: Name = "row {}".format, **options: Any
) -> np.ndarray:
    """Return the value head's score behind the last token of prompt + answer for both answers, [len(triples), 2].

    That is the token that LLaMA-Factory's reward stage trains on (train/rm/trainer.py: the last one that is not
    padding). `options` are those of run_batches. Raises ArenaError if the head is of another model, and names the row
    where a triple has an empty part or a reward is not finite.
    """
    packed = PackedModel.of(model)
    size = packed.causal.config.get_text_config().hidden_size
    if len(head.weight) != size:
        what = f"the value head takes {len(head.weight)} numbers, the model's hidden states have {size}"
        raise ArenaError(what, where=VALUE_HEAD, remedy="merge the reward model again: its files are of two trainings")
    weight = head.weight.to(packed.device)

    def score(_: list[Sequence[int]], pack: Pack) -> np.ndarray:
        return (packed.states(pack).double() @ weight + head.bias).cpu().numpy()

    def pieces(prompt: Sequence[int], answers: list[Sequence[int]]) -> list[Piece]:
        return [Piece(prompt, wanted=0), *(Piece(answer, prefix=0) for answer in answers)]

    return _rewards(packed, triples, pieces, score, name, **options)


def answer_states(
    model: Any, triples: Sequence[Triple], layers: Sequence[int], *, name: Name = "row {}".format, **options: Any
) -> np.ndarray:
    """Return the hidden states of both answers, [len(triples), 2, layers x (mean, last) x hidden] float32.

    Behind each layer the mean over the answer's tokens and the state of its last one; `options` are those of
    run_batches. Raises as `value_rewards`.
    """
    packed = PackedModel.of(model)

    def score(answers: list[Sequence[int]], pack: Pack) -> np.ndarray:
        import torch

        parts = packed.states_behind(layers, pack).float().split([len(answer) for answer in answers])
        both = torch.stack([torch.stack([part.mean(0), part[-1]]) for part in parts])  # [answers, 2, layers x hidden]
        return both.unflatten(2, (len(layers), -1)).transpose(1, 2).flatten(1).cpu().numpy()

    def pieces(prompt: Sequence[int], answers: list[Sequence[int]]) -> list[Piece]:
        return [Piece(prompt, wanted=0), *(Piece(answer, wanted=len(answer), prefix=0) for answer in answers)]

    return _rewards(packed, triples, pieces, score, name, **options)


def a_beats_b(rewards: np.ndarray) -> np.ndarray:
    """Return P(A beats B) = sigmoid(reward A - reward B) of rewards [n, 2], as [n, 1] (Bradley and Terry 1952)."""
    return 1 / (1 + np.exp(rewards[:, [1]] - rewards[:, [0]]))


def load_value_head(folder: Path) -> ValueHead:
    """Return the value head in a merged reward model's folder; raises ArenaError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / VALUE_HEAD
    remedy = "merge the reward model again; its merge recipe needs `stage: rm`, or the value head is left behind"
    try:
        tensors = load_file(path)
        weight, bias = tensors["v_head.summary.weight"].double(), tensors["v_head.summary.bias"].double()
    except FileNotFoundError:
        raise ArenaError("is not a reward model: the value head is missing", where=str(path), remedy=remedy) from None
    except (SafetensorError, OSError, KeyError) as error:
        raise ArenaError(f"is damaged: {error}", where=str(path), remedy=remedy) from None
    if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,) or not (weight.isfinite().all() and bias.isfinite()):
        raise ArenaError("holds no finite linear layer with one output", where=str(path), remedy=remedy)
    return ValueHead(weight[0], float(bias))


def _rewards(
    model: PackedModel,
    triples: Sequence[Triple],
    pieces: Callable[[Sequence[int], list[Sequence[int]]], list[Piece]],
    score: Callable[[list[Sequence[int]], Pack], np.ndarray],
    name: Name,
    **options: Any,
) -> np.ndarray:
    """Return the rewards [triples, 2, …]: `score(answers, pack)`, one row an answer, of what `pieces(prompt, answers)`
    makes.

    Equal answers to one prompt are scored once, so that they have the very same reward, and a few answers of one prompt
    are read in one pass, their prompt once. Raises ArenaError that names a triple with an empty part or a reward that
    is not finite.
    """
    answers: dict[tuple, int] = {}  # (prompt, answer): its number
    of_prompt: dict[tuple, list[tuple]] = {}
    places = np.empty((len(triples), 2), dtype=int)
    for row, (prompt, *both) in enumerate(triples):
        if not len(prompt) or not all(map(len, both)):
            remedy = "give the prompt and both answers with the chat template's tokens"
            raise ArenaError("the prompt or an answer has no tokens", where=name(row), remedy=remedy)
        for side, answer in enumerate(both):
            key = tuple(prompt), tuple(answer)
            if key not in answers:
                of_prompt.setdefault(key[0], []).append(key)
            places[row, side] = answers.setdefault(key, len(answers))
    groups = [those[i : i + _TOGETHER] for those in of_prompt.values() for i in range(0, len(those), _TOGETHER)]
    scores: dict[int, np.ndarray] = {}

    def work(batch: list[int], pack: Pack) -> None:
        those = [key for at in batch for key in groups[at]]
        scores.update(zip((answers[key] for key in those), score([answer for _, answer in those], pack), strict=True))

    def first_row(at: int) -> str:
        return name(int(np.argwhere(places == answers[groups[at][0]])[0, 0]))

    packs = [pieces(those[0][0], [answer for _, answer in those]) for those in groups]
    run_batches(model, packs, work, name=first_row, **options)
    rewards = np.stack([scores[at] for at in range(len(answers))])[places] if answers else np.empty((0, 2))
    bad = np.flatnonzero(~np.isfinite(rewards).all(axis=tuple(range(1, rewards.ndim))))
    if len(bad):
        what = f"the model gave no finite reward for {len(bad)} battle(s), this one first"
        raise ArenaError(what, where=name(bad[0]), remedy=BROKEN_WEIGHTS)
    return rewards


def _log_probabilities(model: PackedModel, pack: Pack, targets: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Return the sum of the targets' log-probabilities by owner, [owners] float64; one wanted state a target."""
    import torch

    states = model.states(pack)
    sums = torch.zeros(int(owners[-1]) + 1, dtype=torch.float64, device=states.device)
    size = max(1, LOGITS // model.causal.config.get_text_config().vocab_size)
    for part in range(0, len(targets), size):
        here = slice(part, part + size)
        logits = model.logits(states[here]).float()
        values = logits.gather(1, targets[here].unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        sums.index_add_(0, owners[here], values.double())
    return sums
