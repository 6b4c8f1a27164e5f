"""Broken inputs with the error that each must give; tests/test_bad_inputs.py goes through all of them."""

from tests.bad_inputs import configs, results, tables

CASES = [*tables.CASES, *configs.CASES, *results.CASES]
