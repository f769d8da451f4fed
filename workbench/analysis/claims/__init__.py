"""The paper's claims as rules in code, the evidence they need, and the table of verdicts."""
