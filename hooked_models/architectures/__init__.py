"""One file an architecture, the hooked mixer that makes a recurrence of a hidden state; and their table."""
