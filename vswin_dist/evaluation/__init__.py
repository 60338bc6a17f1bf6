"""Exact multi-view scores: every video once, or counted as missing."""
