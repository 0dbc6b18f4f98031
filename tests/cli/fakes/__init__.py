"""Stand-ins for the three services: real processes with the real command lines, and nothing inside."""
