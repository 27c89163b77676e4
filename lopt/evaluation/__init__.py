"""Judging a rule: tuned baselines, comparisons on the same held-out tasks, the report of them, what a rule does.

Nothing here trains a rule. What a comparison shows was never seen in meta-training or in the tuning of a baseline, and
where the rule loses is listed beside where it wins.
"""
