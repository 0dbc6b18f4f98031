"""Which requests may begin, and in which order."""
