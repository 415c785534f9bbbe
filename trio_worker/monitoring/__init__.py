"""What can be seen of a worker, and how: counts, the snapshot, health, the HTTP pages."""
