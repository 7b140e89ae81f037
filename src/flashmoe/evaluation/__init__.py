"""How good a bundle's answers are: perplexity, divergence from a better bundle, tasks with known answers."""
