"""Evaluation: tasks, methods and metrics behind `acre eval` and `acre.evaluate`."""
