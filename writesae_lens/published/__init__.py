"""Published SAEs: reading checkpoints, the Hub, releases, and publishing one's own."""
