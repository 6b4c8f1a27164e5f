"""scoring.probe: it finds the layer that knows something, and exchanging the answers exchanges the probabilities."""

import numpy as np
import pytest

from common.errors import ArenaError
from scoring.links import softmax
from scoring.probe import Probe, fit_probe
from tests.votes import drawn

LAYERS, HIDDEN, ROWS = (3, 7), 8, 600


def votes(seed: int = 0):
    """States [rows, 2, layers x pools x hidden] of which one number of layer 7's last state decides; lengths; truth."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(ROWS, 2, len(LAYERS) * 2 * HIDDEN)).astype(np.float32)
    gap = 2 * (states[:, 0, -1] - states[:, 1, -1])
    chances = softmax(np.column_stack([gap / 2, -gap / 2, np.full(ROWS, -0.5)]))
    truth = drawn(chances, random)
    return states, random.integers(1, 900, (ROWS, 4)).astype(float), truth


def fitted(states, lengths, truth):
    groups = np.arange(len(truth)) // 2
    return fit_probe(states[:, 0] - states[:, 1], lengths, truth, groups, layers=LAYERS, precision="fp32", seed=1)


def test_the_layer_that_knows_is_chosen_and_the_order_of_the_answers_is_none(tmp_path):
    states, lengths, truth = votes()
    probe, tried = fitted(states, lengths, truth)
    assert (probe.layers, probe.pools) == ((7,), ("last",)) and len(tried) == 3 * 3 * 5
    assert min(each["log_loss"] for each in tried) < 0.9
    probe.save(tmp_path / "probe.npz")
    again = Probe.load(tmp_path / "probe.npz")
    only = states[:, :, 2 * HIDDEN :]  # of the chosen layer, all that is read later
    found = np.exp(again.logits(only, lengths))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    exchanged = np.exp(again.logits(only[:, ::-1], lengths[:, [0, 2, 1, 3]]))
    np.testing.assert_allclose(found, exchanged[:, [1, 0, 2]], rtol=1e-6)
    assert -np.log(found[np.arange(ROWS), truth]).mean() < 0.85


def test_too_few_votes_and_a_damaged_file_are_told(tmp_path):
    states, lengths, truth = (each[:40] for each in votes())
    with pytest.raises(ArenaError, match="at least 50"):
        fitted(states, lengths, truth)
    with pytest.raises(ArenaError, match="the training set has no row of class tie"):
        fitted(*(each[votes()[2] < 2] for each in votes()))
    for content in (b"", b"PK"):
        (tmp_path / "probe.npz").write_bytes(content)
        with pytest.raises(ArenaError, match="is no readable probe"):
            Probe.load(tmp_path / "probe.npz")
