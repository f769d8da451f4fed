"""The paper's claims as rules in code, the evidence they need, and the table of verdicts.

`rules` has one function a claim, `evidence` what they read, `checks` and `theory` what needs no arms; `verdicts` says
which claims hold, `table` lays that out.
"""
