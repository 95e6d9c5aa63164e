"""Options and helpers of the entry scripts."""
