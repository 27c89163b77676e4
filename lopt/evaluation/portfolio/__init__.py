"""How a portfolio is learned: settings drawn as in a random search, run on families, and chosen greedily."""
