"""DeepSpeed training of the full-precision policy, and the source of the weight stream.

    LearnerGroup (group.py)  all ranks, seen from the driver; imports no deepspeed
    Learner (learner.py)     one rank, in its own process

Importing this package imports neither."""
