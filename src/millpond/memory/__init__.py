"""Bytes: how a budget is split, who holds how many, and what the machine has."""
