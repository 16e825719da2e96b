"""Evaluation of students: protocols, feature networks, scores."""
