"""Loading a model, giving it tunables, cutting it in two."""
