"""What keeps a run alive: whole files, saves in between, signals, failed steps, trials."""
