"""The ports without the world: real implementations in the event loop, on any clock."""
