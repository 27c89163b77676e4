"""How good rules and estimators are."""
