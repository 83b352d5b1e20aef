"""Replicas of hot experts: where they are placed, and how they are moved."""
