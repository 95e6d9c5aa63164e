"""From label lists and media files to batches."""
