"""Campaigns of faults: what is injected, what came of it, and the table of `make faults`.

A campaign is a module of this package with ``campaign(seed, count) -> list[Row]``; one that is added and
named in CAMPAIGNS joins the table.
"""
