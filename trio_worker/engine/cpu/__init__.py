"""What makes the model's arithmetic quick on a CPU."""
