"""Tests of fusions."""
