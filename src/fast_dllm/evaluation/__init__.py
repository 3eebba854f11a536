"""How good the answers of a model are, and what decoding them in parallel costs of that."""
