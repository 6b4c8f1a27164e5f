"""Votes in, a LLaMA-Factory data set out: read, check, fold, fit to the token budget, export."""
