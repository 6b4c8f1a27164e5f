"""What computes a judge's label logits: torch, llama.cpp."""
