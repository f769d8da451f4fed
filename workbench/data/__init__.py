"""Preference pairs: rows as people have them, pairs as training takes them, and what is encoded in between."""
