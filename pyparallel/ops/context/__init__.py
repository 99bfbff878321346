"""Attention over a sequence that is cut over ranks: its two algorithms, their parts and their choice.

A family of its own, since its files are one operation, and none of them is an op of the table.
"""
