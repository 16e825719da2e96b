"""What `experiments/run.py` does: read a study, run its jobs, write its tables, verdicts and
pictures into its page.
"""
