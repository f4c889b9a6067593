"""A decoder with multi-token prediction, and its losses."""
