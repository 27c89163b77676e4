"""Recommendation to new users: how far guesses are off that know a handful of a user's ratings.

`users.py` draws the users and lets rules learn them; `factorization.py` is what people do without learning to learn, on
the same users; `pictures.py` draws both.
"""
