"""What `trio-worker` does: one command a file."""
