"""The SAE itself: configuration, rank-1 algebra, activation functions, inference and training."""
