"""Studies: many runs that answer one question, with the evidence."""
