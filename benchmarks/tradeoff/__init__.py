"""The study of docs/tradeoff.md: what it compares, what its table says, and the small models of its label dropouts."""
