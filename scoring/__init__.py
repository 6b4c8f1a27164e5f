"""Merged model in, class probabilities out: label logits, metrics, baselines, report, submission."""
