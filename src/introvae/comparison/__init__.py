"""Objectives on data, over seeds: what to run, running it, and what came of it."""
