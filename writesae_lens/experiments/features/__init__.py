"""Features of a dictionary: the sides they belong to, what codes meet and promote, what their use costs."""
