"""Loops that torch has not: compiled code behind the arithmetic of the formats."""
