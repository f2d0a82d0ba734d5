"""The paper's runs by name: train, every experiment, and a table with the paper's figures beside ours."""

from writesae_lens.reproduce.estimates import estimate
from writesae_lens.reproduce.paper import CONFIGS, Paper, config
from writesae_lens.reproduce.run import as_markdown, reproduce

__all__ = ["CONFIGS", "Paper", "as_markdown", "config", "estimate", "reproduce"]
