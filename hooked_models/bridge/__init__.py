"""What this package adds to the bridges of TransformerLens: checks of arguments, copies, activations."""
