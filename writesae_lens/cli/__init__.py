"""The command line ``writesae-lens``."""
