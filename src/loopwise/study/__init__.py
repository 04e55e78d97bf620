"""Comparisons and claims: many runs, statistics over seeds and items, declarations, verdicts, pages."""
