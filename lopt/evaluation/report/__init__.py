"""The report of an evaluation: a self-contained HTML page, the pictures of its curves, and a table for a terminal, all
made from the plain data of `lopt.evaluation.results`.
"""
