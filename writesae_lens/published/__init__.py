"""Published SAEs: reading their checkpoints, finding them on the Hub, and publishing one's own."""
