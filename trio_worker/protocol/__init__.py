"""What the worker and the engine process say to each other: one vocabulary for both."""
