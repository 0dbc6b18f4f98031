"""Policies under the same arrivals: the sweep behind `make bench-policies`."""
