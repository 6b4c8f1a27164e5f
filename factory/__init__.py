"""Experiment in, trained and merged model out: recipes for LLaMA-Factory, and the child processes that run them."""

# The experiment that every command takes without `-e`; declared here and nowhere else.
DEFAULT_EXPERIMENT = "qwen3-4b"
