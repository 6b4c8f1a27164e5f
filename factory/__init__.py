"""Experiment in, trained and merged model out: recipes for LLaMA-Factory, and the child processes that run them."""
