"""Rewards: what a preference model gives each of two answers, before any link makes probabilities of them.

triples [(prompt_ids, answer_a_ids, answer_b_ids), …]  ->  rewards [battles, 2]

A DPO policy's reward is implicit, beta * (log pi - log pi_ref) of the answer's tokens; a reward model's comes from
its value head. Answers end as they were trained, with their end-of-turn tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ArenaError
from common.files import read_json
from scoring.batches import DoesNotFit, ScoreProgress, run_batches, tell
from scoring.engines.torch_engine import LOADING_ERRORS, weight_dtype
from scoring.packed_model import Pack, Piece, Reader

if TYPE_CHECKING:
    import torch

Triple = tuple[Sequence[int], Sequence[int], Sequence[int]]

VALUE_HEAD = "value_head.safetensors"
# The most logits (positions x vocabulary) that exist at a time: 256 MiB in fp32, and two such tensors beside it.
LOGITS = 2**26
# The most answers of one prompt in one pass.
_TOGETHER = 4
_PROBE_LENGTH = 8


@dataclass(frozen=True)
class ValueHead:
    """The linear layer that makes a score of a hidden state: `weight` [hidden size] and `bias`, both float64."""

    weight: torch.Tensor
    bias: float


def load_policy(
    base: str,
    adapter: Path,
    device: str,
    *,
    quantization_bit: int | None,
    revision: str = "main",
    trust_remote_code: bool = False,
    precision: str | None = None,
    quantization_type: str = "nf4",
    double_quantization: bool = True,
) -> Any:
    """Load a base model as LLaMA-Factory trained on it, with the trained adapter on it, unmerged.

    `base` must be the model that the training started from: it is also the reference. Only safetensors are read.
    Raises ArenaError if either cannot be loaded, the adapter belongs to another base or does not fit this one, or
    switching it off does not give the base back.
    """
    import torch

    _check_adapter(adapter, base)
    dtype = weight_dtype(device, precision)
    config = quantization(quantization_bit, quantization_type, double_quantization, dtype, device)
    model = _load_base(base, device, dtype, config, revision=revision, trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        before = _probe(model)
    policy = _with_adapter(model, adapter, base)
    with torch.inference_mode(), policy.disable_adapter():
        after = _probe(policy)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise ArenaError(
            "switching the adapter off does not give the base back, so there is no reference to compare with",
            where=str(adapter),
            remedy="train without the key that changes the base itself (pissa_init, resize_vocab, a trained bias)",
        )
    return policy


def implicit_rewards(
    model: Any,
    triples: Sequence[Triple],
    *,
    beta: float,
    length_normalised: bool,
    reference: bool,
    token_budget: int | None = None,
    progress: Callable[[ScoreProgress], None] = lambda _: None,
    name: Callable[[int], str] = "row {}".format,
    note: Callable[[str], None] = tell,
) -> np.ndarray:
    """Return beta * (log pi - log pi_ref) of both answers, [len(triples), 2] float64.

    The log-probabilities are summed over the answer's tokens, or averaged with `length_normalised`. With `reference`
    `model` is a policy of `load_policy` (or a Reader of one), whose adapter is switched off for pi_ref; without it
    log pi_ref is left out, which with `length_normalised` is what the losses orpo and simpo train. Raises ArenaError
    that names the row where a triple is empty or a reward is not finite. Source: Rafailov et al. 2023, equation 5 and
    section 4.
    """
    import torch

    found, reader = _distinct(triples, name), Reader.of(model)
    result = np.full(len(found.answers), np.nan)

    def work(pairs: list[int], pack: Pack) -> None:
        targets = torch.tensor([token for i in pairs for token in found.answers[i]], device=reader.device)
        owners = torch.repeat_interleave(torch.tensor([len(found.answers[i]) for i in pairs])).to(reader.device)
        scores = _log_probabilities(reader, pack, targets, owners)
        if reference:
            with reader.model.disable_adapter():
                scores = scores - _log_probabilities(reader, pack, targets, owners)
        result[pairs] = scores.cpu().numpy()

    def group(prompt: Sequence[int], answers: list[Sequence[int]]) -> list[Piece]:
        # A token's distribution stands at the position before it, so an answer begins with the prompt's last token.
        *before, last = prompt
        shared = [Piece(before, wanted=0)] if before else []
        return shared + [
            Piece([last, *answer[:-1]], wanted=len(answer), prefix=0 if before else None) for answer in answers
        ]

    _run(reader, found, group, work, token_budget, progress, name, note)
    if length_normalised:
        result /= [len(answer) for answer in found.answers]
    return _finite(beta * result[found.places], name)


def value_rewards(
    model: Any,
    head: ValueHead,
    triples: Sequence[Triple],
    *,
    token_budget: int | None = None,
    progress: Callable[[ScoreProgress], None] = lambda _: None,
    name: Callable[[int], str] = "row {}".format,
    note: Callable[[str], None] = tell,
) -> np.ndarray:
    """Return the value head's score behind the last token of prompt + answer for both answers, [len(triples), 2].

    That is the token that LLaMA-Factory's reward stage trains on (train/rm/trainer.py: the last one that is not
    padding). Raises ArenaError if the head is of another model, and names the row where a triple is empty or a
    reward is not finite.
    """
    found, reader = _distinct(triples, name), Reader.of(model)
    size = reader.causal.config.get_text_config().hidden_size
    if len(head.weight) != size:
        raise ArenaError(
            f"the value head takes {len(head.weight)} numbers, the model's hidden states have {size}",
            where=VALUE_HEAD,
            remedy="merge the reward model again: the two files are of different trainings",
        )
    weight = head.weight.to(reader.device)
    result = np.full(len(found.answers), np.nan)

    def work(pairs: list[int], pack: Pack) -> None:
        result[pairs] = (reader.states(pack).double() @ weight + head.bias).cpu().numpy()

    def group(prompt: Sequence[int], answers: list[Sequence[int]]) -> list[Piece]:
        return [Piece(prompt, wanted=0), *(Piece(answer, prefix=0) for answer in answers)]

    _run(reader, found, group, work, token_budget, progress, name, note)
    return _finite(result[found.places], name)


def beats(rewards: np.ndarray) -> np.ndarray:
    """Return P(A beats B) = sigmoid(reward A - reward B) of rewards [n, 2], as [n, 1] (Bradley and Terry 1952)."""
    return 1 / (1 + np.exp(rewards[:, [1]] - rewards[:, [0]]))


def load_value_head(folder: Path) -> ValueHead:
    """Read the value head that LLaMA-Factory puts beside a merged reward model; raises ArenaError if it is no such."""
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
        raise ArenaError(f"is damaged: {_first_line(error)}", where=str(path), remedy=remedy) from None
    if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,) or not (weight.isfinite().all() and bias.isfinite()):
        raise ArenaError("holds no finite linear layer with one output", where=str(path), remedy=remedy)
    return ValueHead(weight[0], float(bias))


def _log_probabilities(reader: Reader, pack: Pack, targets: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Return the sum of the targets' log-probabilities by owner, [owners] float64; one wanted state a target."""
    import torch

    states = reader.states(pack)
    sums = torch.zeros(int(owners[-1]) + 1, dtype=torch.float64, device=states.device)
    size = max(1, LOGITS // reader.causal.config.get_text_config().vocab_size)
    for part in range(0, len(targets), size):
        here = slice(part, part + size)
        logits = reader.logits(states[here]).float()
        values = logits.gather(1, targets[here].unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        sums.index_add_(0, owners[here], values.double())
    return sums


@dataclass(frozen=True)
class _Answers:
    """The distinct answers of some triples, each once behind its prompt.

    `answers[i]` stands behind `prompts[prompt_of[i]]`; `places` [triples, 2] are the answers of each triple.
    Equal answers then have the very same reward, whatever batches they would have come into.
    """

    prompts: list[Sequence[int]]
    answers: list[Sequence[int]]
    prompt_of: list[int]
    places: np.ndarray

    def row(self, answer: int) -> int:
        """Return the first triple that an answer stands in."""
        return int(np.argwhere(self.places == answer)[0, 0])

    def together(self) -> list[list[int]]:
        """Return the answers grouped by prompt, a few of one prompt together."""
        groups: dict[int, list[int]] = {}
        for answer, prompt in enumerate(self.prompt_of):
            groups.setdefault(prompt, []).append(answer)
        return [group[i : i + _TOGETHER] for group in groups.values() for i in range(0, len(group), _TOGETHER)]


def _distinct(triples: Sequence[Triple], name: Callable[[int], str]) -> _Answers:
    prompts: dict[tuple, int] = {}
    found: dict[tuple, int] = {}
    places = np.empty((len(triples), 2), dtype=int)
    for row, (prompt, *answers) in enumerate(triples):
        if not len(prompt) or not all(map(len, answers)):
            raise ArenaError(
                "the prompt or an answer has no tokens",
                where=name(row),
                remedy="give the prompt and both answers with the chat template's tokens",
            )
        at = prompts.setdefault(tuple(prompt), len(prompts))
        for side, answer in enumerate(answers):
            places[row, side] = found.setdefault((at, tuple(answer)), len(found))
    return _Answers(list(prompts), [answer for _, answer in found], [at for at, _ in found], places)


def _run(
    reader: Reader,
    found: _Answers,
    group: Callable[[Sequence[int], list[Sequence[int]]], list[Piece]],
    work: Callable[[list[int], Pack], None],
    token_budget: int | None,
    progress: Callable,
    name: Callable[[int], str],
    note: Callable[[str], None],
) -> None:
    """Call `work(answers, pack)` on all answers, those of one prompt in one pass, where the prompt is read once.

    Answers that do not fit in memory together are read each by itself.
    """
    waiting = found.together()
    while waiting:
        done: set[int] = set()

        def work_on(batch: list[int], pack: Pack, groups: list = waiting, done: set = done) -> None:
            work([i for at in batch for i in groups[at]], pack)
            done.update(batch)

        try:
            run_batches(
                reader,
                [group(found.prompts[found.prompt_of[g[0]]], [found.answers[i] for i in g]) for g in waiting],
                work_on,
                token_budget=token_budget,
                progress=progress,
                name=lambda at, groups=waiting: name(found.row(groups[at][0])),
                note=note,
            )
            return
        except DoesNotFit as error:
            alone = waiting[error.index]
            if len(alone) == 1:
                raise
        left = [g for at, g in enumerate(waiting) if at not in done and g is not alone]
        waiting = [[i] for i in alone] + left


def _finite(rewards: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(rewards).all(axis=1))
    if len(bad):
        raise _not_finite(len(bad), name(bad[0]))
    return rewards


def _not_finite(count: int, first: str) -> ArenaError:
    return ArenaError(
        f"the model gave no finite reward for {count} battle(s), this one first",
        where=first,
        remedy="the weights are broken (a diverged training, or an overflow in 16 bit): look at the loss curve",
    )


def _probe(model: Any) -> torch.Tensor:
    import torch

    ids = torch.arange(_PROBE_LENGTH, device=model.device).unsqueeze(0)
    return model(input_ids=ids, use_cache=False).logits.float()


def quantization(bit: int | None, kind: str, double: bool, dtype: torch.dtype, device: str) -> Any:
    """Return what LLaMA-Factory's own quantisation is (model/model_utils/quantization.py), or None."""
    if bit is None:
        return None
    from transformers import BitsAndBytesConfig

    if bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if device == "cpu":
        # With avx512_bf16, bitsandbytes repacks nf4 weights in the first pass and computes in bf16 from then on:
        # that is neither the function that was trained nor the fp32 that is asked for here.
        import bitsandbytes.nn.modules as modules

        modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_type=kind,
        bnb_4bit_quant_storage=dtype,
    )


def _load_base(base: str, device: str, dtype: torch.dtype, config: Any, **options) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if config is not None:
        options |= {"quantization_config": config, "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, **options)
    except LOADING_ERRORS as error:
        raise ArenaError(
            f"the base model cannot be loaded: {_first_line(error)}",
            where=base,
            remedy="the folder or hub id must be the one that the training started from",
        ) from None
    # bitsandbytes puts quantised weights in their place itself
    return (model if config is not None else model.to(device)).eval()


def _check_adapter(adapter: Path, base: str) -> None:
    """Raise ArenaError unless `adapter` is a folder with safetensors that was trained on `base`."""
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (adapter / name).is_file()]
    if missing:
        raise _misfit(adapter, f"is no finished adapter: {' and '.join(missing)} missing")
    try:
        trained_on = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _misfit(adapter, f"adapter_config.json is damaged: {error}") from None
    if trained_on and not isinstance(trained_on, str):
        raise _misfit(adapter, "adapter_config.json is damaged: base_model_name_or_path is no text")
    if trained_on and not _same_model(trained_on, base):
        raise _misfit(adapter, f"was trained on {trained_on}, not on {base}: another reference gives other rewards")


def _same_model(one: str, other: str) -> bool:
    folders = [Path(name) for name in (one, other)]
    if all(folder.is_dir() for folder in folders):
        return folders[0].samefile(folders[1])
    # A hub id may have been kept as the folder of its download (ModelScope writes "." as "___"); that of a merged
    # judge is never taken for another's.
    ends = {Path(name).name.replace("___", ".").lower() for name in (one, other)}
    return one == other or (len(ends) == 1 and not any(folder.is_dir() for folder in folders))


def _with_adapter(model: Any, adapter: Path, base: str) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT warns of missing weights, which are an error here, and of tied ones where none are.
            warnings.simplefilter("ignore", UserWarning)
            policy = PeftModel.from_pretrained(model, str(adapter)).eval()
    except LOADING_ERRORS as error:
        raise _misfit(adapter, f"cannot be put on {base}: {_first_line(error)}") from None
    _check_weights(policy, adapter)
    return policy


def _check_weights(policy: Any, adapter: Path) -> None:
    """Raise ArenaError unless the file's weights are exactly those that the policy has places for.

    PEFT only warns of such a thing, and the rewards would all be nearly zero.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    expected = set(get_peft_model_state_dict(policy, save_embedding_layers=False))
    if missing := sorted(expected - saved):
        raise _misfit(adapter, f"lacks {len(missing)} weights that its configuration names, such as {missing[0]}")
    if extra := sorted(saved - expected - set(policy.state_dict())):
        raise _misfit(adapter, f"has {len(extra)} weights that the base has no place for, such as {extra[0]}")


def _misfit(adapter: Path, what: str) -> ArenaError:
    return ArenaError(what, where=str(adapter), remedy="train again, that stage with --fresh")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
