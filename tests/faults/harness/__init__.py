"""Faults put into the command line while it writes: what they are, where they strike, and what must hold afterwards."""
