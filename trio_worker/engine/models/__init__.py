"""From the name of a model to a model that computes: found, checked, loaded."""
