"""Runs on puzzles: recipes, the supervision step through an engine, evaluation, pictures. The models are in model/reasoning."""
