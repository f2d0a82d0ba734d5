"""Working with features: reading a prompt through SAEs, steering, attribution, export, labels."""
