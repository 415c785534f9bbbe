"""What starts a worker with the machine: units for systemd and launchd, made for one place."""
