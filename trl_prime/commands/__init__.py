"""One module for each command of `trl-prime`, each with a function `prepare(argv)` that returns the job.

`prepare` reads arguments and data and builds what is needed: a `ValueError` there means that they are wrong, exit code 2. The job
takes no arguments, does the work and returns the exit code: whatever it raises went wrong on the way, exit code 1.
"""
