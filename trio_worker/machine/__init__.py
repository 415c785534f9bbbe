"""The machine and its operating system: memory, the service manager."""
