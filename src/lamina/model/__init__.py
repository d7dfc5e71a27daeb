"""Questions about a model: its parameters, their names and ties, patterns, freezing by hand."""
