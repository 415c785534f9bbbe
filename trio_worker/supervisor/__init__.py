"""The engine process from the worker's side: started, watched, restarted."""
