"""What a rule is and does, seen from outside: facts, probes with chosen gradients, and the pictures of them that
`lopt inspect` draws. Nothing here knows how a rule works.
"""
