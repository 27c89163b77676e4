"""What a rule is and does: probes of its policy, figures and pictures."""
