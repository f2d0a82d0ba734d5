"""Parts of the install experiment: its targets, the writes that it adds, and what the added writes cost."""
