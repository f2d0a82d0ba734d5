"""From a name, folder or file to a model: sources, checkpoint layouts, and reading files as data."""
