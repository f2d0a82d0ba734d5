"""The paper's runs by name: train, every experiment, and a table with the paper's figures beside ours."""

from writesae_lens.reproduce.run import CONFIGS, config, estimate, reproduce

__all__ = ["CONFIGS", "config", "estimate", "reproduce"]
