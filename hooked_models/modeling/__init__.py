"""Models that transformers does not have, in pure PyTorch."""
