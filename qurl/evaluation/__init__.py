"""`qurl eval`: a model of any precision on named benchmarks, with confidence intervals, resumable. evaluate.py is the driver."""
