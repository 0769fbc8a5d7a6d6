"""C++ for CPUs, compiled when it is first used.

    library  compile once per user, load, find torch's threads
    lobcq    LO-BCQ linear layers with weights that stay packed
    lookup   INT8 codes in tables, for Ax-BxP"""
