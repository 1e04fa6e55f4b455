"""Seeded defects: mistakes that an exporter, a parser or a builder has been seen to make, or could.

A defect changes the graph of a healthy package. `catalogue.DEFECTS` is all of them as data; the modules beside it
hold the changes, by what they touch. Some are wrong always, some in one way of running only (`run_dependent`, written
with the conditions of `facts`), some in rounding only (`rounding`).
"""
