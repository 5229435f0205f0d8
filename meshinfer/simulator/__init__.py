"""Deterministic simulation: the real cores under virtual time, with faults drawn from a seed."""
