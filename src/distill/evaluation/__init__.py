"""How good a student is: protocols, feature networks, scores."""
