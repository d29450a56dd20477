"""What `saefast` does at a terminal: one file per verb, and main.py, which picks one."""
