"""The AV-ASR models: networks, search and command-line options."""
