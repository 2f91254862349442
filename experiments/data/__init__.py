"""Rows to train and evaluate on: as read, as encoded, and in which order they are drawn."""
