"""Finding and reading the files of a model: sources, checkpoint layouts, tokenizers."""
