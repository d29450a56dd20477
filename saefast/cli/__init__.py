"""What `saefast` does at a terminal: one file per verb, `main.py` picks one."""
