"""What was decided and what came of it, written down for good and shared by runs."""
