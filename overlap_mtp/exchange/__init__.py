"""What crosses ranks, and how."""
