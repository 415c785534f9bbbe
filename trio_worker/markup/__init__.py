"""What a model writes around its answer, reasoning and tool calls: text in, pieces out."""
