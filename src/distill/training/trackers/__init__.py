"""Trackers of runs beside `metrics.csv`: W&B, MLflow, Trackio and TensorBoard.

kinds.py   the classes that `logger=wandb`, `mlflow` and `trackio` build
checks.py  package, login and network, before there is a run folder
logged.py  what a tracker gets beside rows: the configuration, pictures, scores, the report
"""
