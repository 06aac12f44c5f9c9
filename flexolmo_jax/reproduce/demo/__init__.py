"""`flexolmo demo`: the whole story on an open model, in less than an hour on a CPU."""
