"""Evaluation: streams with known answers, accuracy, and what it was measured on."""
