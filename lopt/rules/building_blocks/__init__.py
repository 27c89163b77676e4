"""What several rules are made of; no rule is defined here."""
