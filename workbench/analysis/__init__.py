"""From tracked runs to tables and figures: data frames in, data frames or matplotlib figures out.

Notebooks and `python -m workbench.report` only load, call and save. It knows neither MLflow nor Optuna: runs come from
`tracking`, trials from `studies`.
"""
