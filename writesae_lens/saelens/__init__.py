"""Everything that touches SAELens from the inside: registration, activation store, runners, their logs."""
