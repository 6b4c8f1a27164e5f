"""Checks of a run, of a merge and of a finished result."""
